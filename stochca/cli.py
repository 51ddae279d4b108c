"""The command `stochca`: finetune, evaluate, info. Imports torch only when a subcommand runs."""

import dataclasses
import inspect
import json
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from stochca import __version__
from stochca.config import EvaluateOptions, FinetuneOptions, InfoOptions, flag


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0; 2 for something the user can mend, with one line that says what; 130 or 143 if a run was
        interrupted by SIGINT or SIGTERM, and saved.
    """
    arguments = sys.argv[1:] if argv is None else argv
    commands: dict[str, tuple[type, Callable[[Any], int], str]] = {
        "finetune": (FinetuneOptions, _finetune, "fine-tune a timm Vision Transformer with StochCA"),
        "evaluate": (EvaluateOptions, _evaluate, "evaluate a checkpoint on a dataset"),
        "info": (InfoOptions, _info, "versions, device, and which implementation runs on it"),
    }
    parser = ArgumentParser(
        prog="stochca",
        description="Fine-tune Vision Transformers with stochastic cross-attention.",
        version=__version__,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, (options_class, _, text) in commands.items():
        subcommands.add_subcommand(name, _parser(options_class, text), help=text)

    parsed = parser.parse_args(arguments)
    if parsed.command == "finetune" and parsed.finetune.resume is not None:
        # A resumed run has its own options; the command line goes on top of them.
        config = _config_of(Path(parsed.finetune.resume))
        if config.is_file():
            parsed = parser.parse_args(["finetune", "--config", str(config), *arguments[1:]])

    options_class, run, _ = commands[parsed.command]
    values = parsed[parsed.command].as_dict()
    values.pop("config", None)
    try:
        return run(options_class(**values))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"stochca {parsed.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser(options_class: type, description: str) -> ArgumentParser:
    """A parser with one group of flags per part of the options, and a YAML file of them all."""
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    hints = typing.get_type_hints(options_class)
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    for part in reversed(options_class.__mro__):
        if own := [name for name in fields if name in inspect.get_annotations(part)]:
            group = parser.add_argument_group((part.__doc__ or "").rstrip("."))
            for name in own:
                _add_flag(group, fields[name], hints[name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field, hint: Any) -> None:
    default = field.default
    if default is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        default = field.default_factory()
    text = field.metadata["help"]
    if field.name == "checkpoint":
        group.add_argument(field.name, type=hint, help=text)
    elif field.name.startswith("no_"):
        group.add_argument(flag(field.name), action="store_true", help=text)
    elif hint is bool:
        group.add_argument(flag(field.name), action=ActionYesNo(no_prefix="no-"), default=default, help=text)
    elif hint in (list[float], list[float] | None):
        group.add_argument(flag(field.name), type=float, nargs="+", default=default, help=text)
    else:
        group.add_argument(
            flag(field.name), *field.metadata["aliases"], type=hint, default=default, help=text
        )


def _config_of(resume: Path) -> Path:
    return (resume.parent if resume.is_file() else resume) / "config.yaml"


def _finetune(options: FinetuneOptions) -> int:
    from stochca.progress import Interrupted
    from stochca.train import finetune

    try:
        summary = finetune(options)
    except Interrupted as interruption:
        sys.stderr.write(f"stochca finetune: {interruption}\n")
        return 128 + interruption.signum
    skipped = summary["skipped"]
    sys.stdout.write(
        f"{summary['steps']} steps done: best top-1 {summary['best_top1']:.2f} % "
        f"at step {summary['best_step']}, last {summary['last_top1']:.2f} %; "
        f"{summary['images_per_second']:.1f} images/s; "
        f"{summary['source_fraction']:.0%} of the source's blocks ran\n"
        f"unreadable images left out: {len(skipped)}{': ' * bool(skipped)}{', '.join(skipped)}\n"
        f"best and last checkpoint, metrics and options are in {summary['output']}\n"
    )
    return 0


def _evaluate(options: EvaluateOptions) -> int:
    from stochca.evaluation import evaluate_checkpoint

    result = evaluate_checkpoint(options)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    skipped = result["skipped"]
    sys.stdout.write(
        f"{result['model']} on {result['images']} images: top-1 {result['top1']:.2f} %, "
        f"top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}\n"
    )
    if skipped:
        sys.stdout.write(f"unreadable images left out: {len(skipped)}: {', '.join(skipped)}\n")
    return 0


def _info(options: InfoOptions) -> int:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from stochca.distributed import resolve_device
    from stochca_kernels.dispatch import select_impl

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    device = resolve_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    impl, reason = select_impl(device, getattr(torch, options.amp_dtype), options.head_dim)
    lines = {
        "stochca": __version__,
        **{package: version_of(package) for package in ("torch", "timm", "triton")},
        "CUDA": torch.version.cuda or "not in this build of torch",
        "device": f"{device} ({name})",
        "implementation": f"{impl}: {reason}",
    }
    sys.stdout.writelines(f"{key + ':':16}{value}\n" for key, value in lines.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
