"""The command `stochca` within this process."""

import contextlib
import io
import json
from pathlib import Path

from tests.weights.others import NAME, SIZES


def call(arguments: list[str]) -> tuple[int, str]:
    """Run it: its exit code, and what it wrote to stderr. An error that it lets pass is raised."""
    from stochca.cli import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, errors.getvalue()


def finetuning(data_dir: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a run of one epoch of a small model without pretrained weights."""
    kwargs = json.dumps({name: value for name, value in SIZES.items() if name != "img_size"})
    model = [
        "--model",
        NAME,
        "--no-pretrained",
        "--img-size",
        str(SIZES["img_size"]),
        "--model-kwargs",
        kwargs,
    ]
    training = [
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    return ["finetune", *model, *training, "--data-dir", str(data_dir), "--output", str(output), *more]
