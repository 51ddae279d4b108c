"""`stochca export`: a run of `stochca finetune` in other forms."""

from pathlib import Path
from typing import Any

from stochca.checkpoint import BEST, LAST, SWAD
from stochca.evaluation import rebuild
from stochca.export.model import check_hub, export_model, push_model
from stochca.export.options import ExportOptions

_FILES = {"best": BEST, "last": LAST, "swad": SWAD}


def export(options: ExportOptions) -> dict[str, Any]:
    """Export the weights of a run, and publish them if asked for.

    Model, classes and preparation of the images come from the checkpoint.

    Args:
        options: Of the export.

    Returns:
        `checkpoint`; `output`, the folder; `files` in it; `errors` of programs, by format, relative to the
        largest logit; `commit`, its address on the hub, None where nothing was published.

    Raises:
        FileExistsError: The folder holds something.
        FileNotFoundError: No such run or checkpoint.
        ValueError: The checkpoint or an option does not fit, or an export differs from the model.
        OSError: It cannot be published; what was written stays.
    """
    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    path = _checkpoint(options)
    model, metadata = rebuild(path)
    about: dict[str, Any] = {
        "classes": metadata["classes"],
        "data_config": metadata["data_config"],
        "model_args": metadata["model_kwargs"],
        "card": _card(metadata, options),
    }
    result = export_model(
        model,
        options.output,
        formats=options.formats,
        tolerance=options.tolerance,
        **about,
    )
    commit = None
    if options.push_to_hub is not None:
        commit = push_model(model, options.push_to_hub, private=options.private, **about)
    return {
        "checkpoint": str(path),
        "output": str(result.output),
        "files": [file.name for file in result.files],
        "errors": result.errors,
        "commit": commit,
    }


def _checkpoint(options: ExportOptions) -> Path:
    path = Path(options.checkpoint)
    if not path.is_dir():
        if options.which is not None:
            raise ValueError(f"--which is for the folder of a run, {path} is none")
        return path
    return path / _FILES[options.which or "best"]


def _card(metadata: dict[str, Any], options: ExportOptions) -> dict[str, Any]:
    details: dict[str, Any] = {"Started from": metadata["model"], "Optimizer steps": metadata["step"]}
    if metrics := metadata["metrics"]:
        details["Validation"] = f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %"
    return {"details": details, **({} if options.license is None else {"license": options.license})}
