"""The pairs to analyse: each run's target, and the source that it was trained against."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.utils import random_seed

from stochca import checkpoint as files
from stochca.analysis.options import AnalyzeOptions
from stochca.config import FinetuneOptions
from stochca.evaluation import rebuild
from stochca.recipe import create_model, resolve_preparation
from stochca.vit import TimmViT

FILES = {"best": files.BEST, "last": files.LAST, "swad": files.SWAD}


@dataclass(frozen=True)
class Run:
    """A target whose models are not loaded yet.

    Args:
        name: In tables and plots.
        path: Of its weights.
        options: It was trained with, as far as they are known.
        facts: Of the weights, by name.
        digest: SHA-256 of the source that it was trained against, where that was recorded.
        num_classes: Of the target; None for weights whose classifier is left out.
        data_config: How its images are prepared; None takes the model's.
        classes: Names of the target's classes, where they are known.
    """

    name: str
    path: Path
    options: FinetuneOptions
    facts: dict[str, str]
    digest: str | None = None
    num_classes: int | None = None
    data_config: dict[str, Any] | None = None
    classes: list[str] | None = None


@dataclass(frozen=True)
class Models:
    """A loaded run.

    Args:
        target: As it was saved.
        source: Before the fine-tuning.
        data_config: How images are prepared for the target.
        origin: Where the source's weights come from, and how far that is certain.
    """

    target: TimmViT
    source: TimmViT
    data_config: dict[str, Any]
    origin: str


def find_runs(options: AnalyzeOptions) -> list[Run]:
    """Look up the runs, without loading a model.

    Raises:
        FileNotFoundError: No such run or file.
        ValueError: A file of something else, or names that are not clear.
    """
    if not options.runs:
        raise ValueError("nothing to analyse: give folders of stochca finetune, or --model and its weights")
    paths = [_weights_of(Path(run), options) for run in options.runs]
    names = options.names or _names([Path(run) for run in options.runs])
    if options.source is not None and not Path(options.source).is_file():
        raise FileNotFoundError(f"--source {options.source} is not a file")
    if options.model is not None:
        return [_timm_weights(name, path, options) for name, path in zip(names, paths, strict=True)]
    return [_finetuned(name, path) for name, path in zip(names, paths, strict=True)]


def load(run: Run, source: str | None) -> Models:
    """Build both models of a run on the CPU.

    The source is built as training built it: with the run's seed, from the weights that its options name.
    Where the run recorded a digest of its source, that has to be the same.

    Args:
        run: The run.
        source: File of the source's weights, instead of those that the run's options name.

    Raises:
        FileNotFoundError: No file of weights.
        ValueError: Weights of another model, or another source than the run's.
    """
    options = run.options if source is None else _with_source(run.options, source)
    random_seed(options.seed)
    model = create_model(options, run.num_classes or 0)
    target = model.target
    if run.num_classes is not None:
        # Files hold the plain model, whatever it was trained as: with adapters, or CLIP's projection.
        target, _ = rebuild(run.path)
        target.pretrained_cfg = model.target.pretrained_cfg
    origin = _origin(run, options, model.source, is_given=source is not None)
    return Models(target, model.source, run.data_config or resolve_preparation(options, target), origin)


def _with_source(options: FinetuneOptions, source: str) -> FinetuneOptions:
    """The options of a run whose source's weights lie elsewhere."""
    if options.source_model is not None or options.source_path is not None:
        return dataclasses.replace(options, source_path=source)
    return dataclasses.replace(options, pretrained=True, pretrained_path=source)


def _weights_of(run: Path, options: AnalyzeOptions) -> Path:
    if not run.is_dir():
        if not run.is_file():
            raise FileNotFoundError(f"there is no run {run}")
        return run
    path = run / FILES[options.weights]
    if options.model is not None or not path.is_file():
        found = ", ".join(sorted(file.name for file in run.glob("*.safetensors"))) or "no weights"
        wanted = "a file of weights, as --model is given" if options.model is not None else path.name
        raise FileNotFoundError(f"{run} must be or hold {wanted}, it has: {found}")
    return path


def _names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell the runs from each other."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"each run can be given once, got {', '.join(map(str, runs))}")
    parts = [run.resolve().parts for run in runs]
    depth = max(map(len, parts))
    count = next(n for n in range(1, depth + 1) if len({part[-n:] for part in parts}) == len(runs))
    return ["/".join(part[-count:]) for part in parts]


def _finetuned(name: str, path: Path) -> Run:
    metadata = files.read_metadata(path)
    config, state = path.parent / files.CONFIG, path.parent / files.STATE
    facts = {
        "file": str(path),
        "written by": f"stochca {metadata['stochca']}",
        "step": str(metadata["step"]),
    }
    if metrics := metadata["metrics"]:
        facts["top-1 in validation"] = f"{metrics['top1']:.2f} %"
    return Run(
        name,
        path,
        _options_of(config) if config.is_file() else _options_from(metadata),
        facts,
        files.load_state(state)["source_digest"] if state.is_file() else None,
        metadata["num_classes"],
        metadata["data_config"],
        metadata["classes"],
    )


def _options_of(config: Path) -> FinetuneOptions:
    values = files.read_config(config)
    names = {field.name for field in dataclasses.fields(FinetuneOptions)}
    if not {"model", "pretrained", "seed"} <= values.keys():
        raise ValueError(f"{config} holds no options of stochca finetune")
    return _without_speed({name: value for name, value in values.items() if name in names})


def _options_from(metadata: dict[str, Any]) -> FinetuneOptions:
    """The options that a file of weights knows of: it says nothing of what the run started from."""
    kwargs = {name: value for name, value in metadata["model_kwargs"].items() if name != "num_classes"}
    return _without_speed(
        {
            "model": metadata["model"],
            "img_size": kwargs.pop("img_size", None),
            "norm_eps": metadata.get("norm_eps"),
            "model_kwargs": kwargs,
        }
    )


def _without_speed(values: dict[str, Any]) -> FinetuneOptions:
    """Options without those that training alone needs, some of which ask for other packages."""
    return FinetuneOptions(**{**values, "source_dtype": None, "torchcompile": False, "impl": "auto"})


def _timm_weights(name: str, path: Path, options: AnalyzeOptions) -> Run:
    assert options.model is not None
    model = FinetuneOptions(
        model=options.model,
        model_kwargs=options.model_kwargs,
        img_size=options.img_size,
        pretrained_path=str(path),
        source_model=options.model,
    )
    return Run(name, path, model, {"file": str(path)})


def _origin(run: Run, options: FinetuneOptions, source: TimmViT, *, is_given: bool) -> str:
    """Say where the source comes from; refuse one that is not the run's, unless it was asked for."""
    where = _whereabouts(options)
    if run.digest is None:
        return f"{where} (the run recorded no digest of its source)"
    found = files.digest(source)
    if found == run.digest:
        return f"{where} (the digest is that of the run's source)"
    if is_given:
        return f"{where} (not the source of the run: its digest is another)"
    raise ValueError(
        f"{where} is not what {run.path} was trained against: the digest of its source is "
        f"{run.digest[:12]}..., that of these weights {found[:12]}...; give the right ones as --source"
    )


def _whereabouts(options: FinetuneOptions) -> str:
    if options.source_model is not None or options.source_path is not None:
        return options.source_path or f"timm's pretrained weights of {options.source_model}"
    if not options.pretrained:
        return f"random initialisation with seed {options.seed}"
    return options.pretrained_path or f"timm's pretrained weights of {options.model}"
