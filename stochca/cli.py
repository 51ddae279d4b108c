"""The command `stochca`, whose subcommands `main` lists. Imports torch when one of them runs."""

import dataclasses
import difflib
import inspect
import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser

from stochca import __version__
from stochca.analysis.options import AnalyzeOptions
from stochca.config import DomainBedOptions, EvaluateOptions, FinetuneOptions, InfoOptions, flag
from stochca.export.options import ExportOptions
from stochca.recipes import recipe_names, recipe_path
from stochca.sweep.options import SweepOptions
from stochca.weights.options import ConvertOptions


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0; 1 if runs of a sweep failed; 2 for something the user can mend, with one line that says
        what; 130 or 143 if a run was interrupted by SIGINT or SIGTERM, and saved.
    """
    # Older releases of timm, and readers of datasets, would have torch run the code in a pickle.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    arguments = _with_recipes(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[type, Callable[[Any], int], str]] = {
        "finetune": (FinetuneOptions, _finetune, "fine-tune a timm Vision Transformer with StochCA"),
        "domainbed": (DomainBedOptions, _domainbed, "leave each domain out once, and compare methods"),
        "sweep": (SweepOptions, _sweep, "compare settings of finetune over seeds, several runs at once"),
        "evaluate": (EvaluateOptions, _evaluate, "evaluate a checkpoint on a dataset"),
        "export": (ExportOptions, _export, "write a checkpoint for timm, ONNX, torch.export or the hub"),
        "convert": (
            ConvertOptions,
            _convert,
            "weights in another layout, for timm or torchvision",
        ),
        "analyze": (AnalyzeOptions, _analyze, "compare targets with their sources: q, k, v and attention"),
        "info": (InfoOptions, _info, "versions, device, and which implementation runs on it"),
    }
    parser = _Parser(
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
        rank = os.environ.get("RANK", "0")
        process = f" (process {rank})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        sys.stderr.write(f"stochca {parsed.command}{process}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class _Parser(ArgumentParser):
    """A parser whose errors are short, and name the option that is nearest to an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = self.prog.removeprefix("stochca").replace("[options]", "").strip()
        message = _in_words(message)
        unknown = re.search(r"(?:option '|arguments: --)([\w.-]+)", message)
        hint = ""
        if unknown:
            name = unknown[1].replace("-", "_")
            options = {option.lstrip("-").replace("-", "_") for option in self._options(command or message)}
            near = difflib.get_close_matches(name, sorted(options), n=1, cutoff=0.0)
            hint = f": did you mean {flag(near[0])}?" if near else ""
        shown = f"stochca {command}".strip()
        sys.stderr.write(f"{shown}: {message}{hint}\n`{shown} --help` lists the options\n")
        sys.exit(2)

    def _options(self, command: str) -> list[str]:
        """Options of this parser, or of the subcommand that a message is about."""
        parsers = [self]
        for action in self._actions:
            choices = getattr(action, "choices", None)
            if isinstance(choices, dict):
                parsers += [sub for name, sub in choices.items() if name in command]
        return [
            option for parser in parsers for action in parser._actions for option in action.option_strings
        ]


def _in_words(message: str) -> str:
    """What jsonargparse says of a value of the wrong type, on one line and in plain words."""
    message = re.sub(r'Parser key "(\w+)":\s*', lambda key: f"{flag(key[1])}: ", message)
    message = re.sub(
        r"Does not validate against any of the Union subtypes\s+"
        r"Subtypes: [\[(](.*)[\])]\n.*Given value: (.*)",
        lambda union: f"Expected a {union[1].replace(', ', ' or ')}. Got value: {union[2]}",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(r"<class '(\w+)'>", lambda kind: kind[1].replace("NoneType", "null"), message)
    return re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", message).strip()


def _with_recipes(arguments: list[str]) -> list[str]:
    """Replace the name of a recipe that is given as `--config` by its file."""

    def resolved(name: str) -> str:
        return str(recipe_path(name)) if name in recipe_names() and not Path(name).exists() else name

    result = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if previous == "--config":
            argument = resolved(argument)
        elif argument.startswith("--config="):
            argument = f"--config={resolved(argument.removeprefix('--config='))}"
        result.append(argument)
    return result


def _parser(options_class: type, description: str) -> ArgumentParser:
    """A parser with one group of flags per part of the options, and a YAML file of them all."""
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these options, or the name of a recipe"
    )
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
    elif field.name == "runs":
        group.add_argument(field.name, type=str, nargs="+", help=text)
    elif field.name.startswith("no_"):
        group.add_argument(flag(field.name), action="store_true", help=text)
    elif hint is bool:
        group.add_argument(flag(field.name), action=ActionYesNo(no_prefix="no-"), default=default, help=text)
    elif (item := _item_of(hint)) is not None:
        group.add_argument(flag(field.name), type=item, nargs="+", default=default, help=text)
    else:
        group.add_argument(
            flag(field.name), *field.metadata["aliases"], type=hint, default=default, help=text
        )


def _item_of(hint: Any) -> Any:
    """The type of the items of a list of plain values, which are given one after the other; else None."""
    lists = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is list]
    others = {*typing.get_args(hint)} - {*lists, type(None)} if hint not in lists else set()
    if len(lists) != 1 or others:
        return None
    (item,) = typing.get_args(lists[0])
    return item if item in (float, int, str) or typing.get_origin(item) is typing.Literal else None


def _config_of(resume: Path) -> Path:
    return (resume.parent if resume.is_file() else resume) / "config.yaml"


def _finetune(options: FinetuneOptions) -> int:
    from stochca.progress import Interrupted
    from stochca.train import finetune

    try:
        summary = finetune(options)
    except Interrupted as interruption:
        return _interrupted("finetune", interruption)
    if not _is_primary():
        return 0
    skipped = summary["skipped"]
    tested = f", on {options.test_split} {summary['test_top1']:.2f} %" if options.test_split else ""
    sys.stdout.write(
        f"{summary['steps']} steps done: best top-1 {summary['best_top1']:.2f} % "
        f"at step {summary['best_step']}{tested}, last {summary['last_top1']:.2f} %; "
        f"{summary['images_per_second']:.1f} images/s; "
        f"{summary['source_fraction']:.0%} of the source's blocks ran\n"
        f"unreadable images left out: {len(skipped)}{': ' * bool(skipped)}{', '.join(skipped)}\n"
        f"best and last checkpoint, metrics and options are in {summary['output']}\n"
    )
    return 0


def _domainbed(options: DomainBedOptions) -> int:
    from stochca.domainbed import domainbed
    from stochca.progress import Interrupted

    try:
        result = domainbed(options)
    except Interrupted as interruption:
        return _interrupted("domainbed", interruption)
    if _is_primary():
        sys.stdout.write(f"{result['markdown']}\nall runs and tables are in {result['output']}\n")
    return 0


def _sweep(options: SweepOptions) -> int:
    from stochca.sweep.command import SweepInterrupted, sweep

    try:
        result = sweep(options)
    except SweepInterrupted as interruption:
        return _interrupted("sweep", interruption)
    sys.stdout.write(f"{result['markdown']}\n")
    for path in result["plots"]:
        sys.stdout.write(f"plot: {path}\n")
    for name, message in result["failed"].items():
        sys.stderr.write(f"stochca sweep: {name} failed: {message}\n")
    sys.stdout.write(f"{result['complete']} of {result['runs']} runs are in {result['output']}\n")
    return 1 if result["failed"] else 0


def _interrupted(command: str, interruption: Any) -> int:
    if _is_primary():
        sys.stderr.write(f"stochca {command}: {interruption}\n")
    return 128 + interruption.signum


def _is_primary() -> bool:
    return os.environ.get("RANK", "0") == "0"


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


def _export(options: ExportOptions) -> int:
    from stochca.export.command import export

    result = export(options)
    sys.stdout.write(f"{result['checkpoint']} is in {result['output']}: {', '.join(result['files'])}\n")
    for name, error in result["errors"].items():
        sys.stdout.write(f"{name} computes the model's logits, within {error:.1e} of the largest one\n")
    if result["commit"] is not None:
        sys.stdout.write(f"published: {result['commit']}\n")
    return 0


def _convert(options: ConvertOptions) -> int:
    from stochca.weights.convert import convert

    result = convert(options)
    sys.stdout.write(
        f"{result['found']}\n{result['model']} with {result['num_classes']} classes, and "
        f"{result['norm_eps']} as the epsilon of its layer norms: {result['output']}\n"
    )
    return 0


def _analyze(options: AnalyzeOptions) -> int:
    from stochca.analysis.command import analyze

    result = analyze(options)
    if skipped := result["skipped"]:
        sys.stdout.write(f"unreadable images left out: {len(skipped)}: {', '.join(skipped)}\n")
    sys.stdout.write(
        f"{result['markdown']}\nreport: {result['report']}\ntables and plots are in {result['output']}\n"
    )
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
