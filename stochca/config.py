"""Options of the command line, one dataclass per subcommand. No torch here: help comes at once."""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from stochca.statistics import Spread

# What timm resizes with, in training as in evaluation.
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")

# The largest that NumPy's global generator takes.
MAX_SEED = 2**32 - 1


def _option(default: Any, text: str, *aliases: str) -> Any:
    """A field of an options class with its line of help and its short flags."""
    metadata = {"help": text, "aliases": aliases}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ModelOptions:
    """The model."""

    model: str = _option("vit_base_patch16_224", "name of a timm Vision Transformer")
    pretrained: bool = _option(True, "start target and source from timm's pretrained weights")
    pretrained_path: str | None = _option(
        None, "file to read the pretrained weights from, instead of timm's, in a layout of docs/weights.md"
    )
    norm_eps: float | None = _option(
        None, "epsilon of the layer norms, for weights that do not say it; the model's if not given"
    )
    clip_projection: bool = _option(
        False, "classify after CLIP's projection; timm leaves it out where the classes are other ones"
    )
    num_classes: int | None = _option(None, "number of classes; read from the dataset if not given")
    img_size: int | None = _option(None, "height and width of the images in pixels; the model's if not given")
    drop_path: float = _option(0.0, "stochastic depth rate of the target")
    model_kwargs: dict[str, Any] = _option({}, "further arguments of the timm model, as {depth: 2, ...}")
    grad_checkpointing: bool = _option(False, "recompute each block in the backward pass, to save memory")
    recompute: bool = _option(
        False, "recompute norms, activations and the source's keys and values in the backward, to save memory"
    )
    torchcompile: bool = _option(False, "compile the blocks with torch.compile")
    pos_embed_interpolation: Literal["timm", "torchvision"] = _option(
        "timm", "whose way to resample position embeddings where --img-size is not that of the weights"
    )


@dataclass(kw_only=True)
class StochCAOptions:
    """Stochastic cross-attention."""

    p: float | list[float] = _option(
        0.1, "probability that a block attends to the frozen source: a number, or a list with one per block"
    )
    p_schedule: list[float] | None = _option(None, "probability in each epoch, instead of --p")
    per: Literal["batch", "sample"] = _option("batch", "draw one coin per block, or one per block and sample")
    mode: Literal["stochastic", "mix", "sum", "concat"] = _option(
        "stochastic", "the paper's coin, or a deterministic alternative: (1-p) SA + p CA, SA + CA, joint keys"
    )
    source_dtype: Literal["float32", "bfloat16", "float16", "float8"] | None = _option(
        None, "hold the source's weights so; --amp-dtype if not given; float8 is not exact and needs torchao"
    )
    impl: Literal["auto", "triton", "sdpa", "reference"] = _option("auto", "implementation of the attention")
    independent_coins: bool = _option(
        False,
        "each process draws coins of its own; by default all draw the same, and run as much of the source",
    )


@dataclass(kw_only=True)
class SourceOptions:
    """The frozen source, where it is not what the target starts from."""

    source_model: str | None = _option(
        None, "name of another timm model of the same architecture, with timm's weights of its tag"
    )
    source_path: str | None = _option(None, "file to read its weights from, as for --pretrained-path")
    source_img_size: int | None = _option(
        None, "height and width of its images in pixels; --img-size if not given, else the model's"
    )


@dataclass(kw_only=True)
class LoRAOptions:
    """Low-rank adapters instead of all weights; the source shares the weights below them."""

    lora_rank: int = _option(0, "rank of LoRA's matrices, by peft; 0 trains all weights instead")
    lora_alpha: float = _option(16.0, "what they add is multiplied by --lora-alpha over --lora-rank")
    lora_dropout: float = _option(0.0, "dropout of the tokens that they see")
    lora_targets: list[str] = _option(
        ["qkv", "q_proj", "k_proj", "v_proj", "proj"], "layers of the blocks that have them, by timm's names"
    )

    @property
    def lora_scale(self) -> float:
        """What the product of LoRA's matrices is multiplied by."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0


@dataclass(kw_only=True)
class LossOptions:
    """The loss."""

    losses: list[str | dict[str, dict[str, Any] | None]] = _option(
        [], "losses beside cross-entropy, by name or with options: [bss, {miro: {weight: 1.0}}]"
    )
    smoothing: float = _option(0.1, "label smoothing")
    mixup: float = _option(0.0, "alpha of mixup; 0 for none")
    cutmix: float = _option(0.0, "alpha of cutmix; 0 for none")
    mixup_prob: float = _option(1.0, "probability that a batch is mixed, where --mixup or --cutmix is given")
    mixup_switch_prob: float = _option(0.5, "probability of cutmix instead of mixup, where both are given")
    mixup_mode: Literal["batch", "pair", "elem"] = _option("batch", "what shares its mixing factor")
    mixup_off_epoch: int = _option(0, "epoch from which batches are no longer mixed; 0 for never")


@dataclass(kw_only=True)
class DatasetOptions:
    """The dataset."""

    data_dir: str | None = _option(None, "folder with one folder of classes per split, or the dataset's root")
    dataset: str = _option("", "dataset as timm names it, as torch/cifar10; an image folder if empty", "-d")
    dataset_download: bool = _option(False, "download the dataset where timm supports it")
    val_split: str = _option("validation", "split to evaluate on; '' for the classes in --data-dir itself")
    val_num_samples: int | None = _option(
        None, "images of --val-split, of a streamed dataset that does not say it"
    )


@dataclass(kw_only=True)
class BatchOptions:
    """Batches."""

    batch_size: int = _option(32, "images per step, accumulation and process", "-b")
    skip_corrupt: bool = _option(False, "leave out unreadable images and report them, instead of stopping")


@dataclass(kw_only=True)
class TrainDataOptions:
    """Training images."""

    train_split: str = _option("train", "split to train on")
    train_num_samples: int | None = _option(
        None, "images of --train-split, of a streamed dataset that does not say it"
    )
    test_split: str | None = _option(None, "split on which the best checkpoint is evaluated once, at the end")
    layout: str | None = _option(
        None, "check that --data-dir looks as one of docs/datasets.md: cub, cars, ..."
    )
    train_subset: float = _option(1.0, "share of the training images of each class that is used")
    subset_seed: int | None = _option(None, "of the choice of --train-subset; --seed if not given")


@dataclass(kw_only=True)
class PreparationOptions:
    """How images are prepared."""

    validation_batch_size: int | None = _option(
        None, "images per evaluation batch; --batch-size if not given", "-vb"
    )
    mean: list[float] | None = _option(None, "mean of the pixels per channel; the model's if not given")
    std: list[float] | None = _option(None, "standard deviation of the pixels; the model's if not given")
    crop_pct: float | None = _option(
        None, "share of the image that evaluation crops; the model's if not given"
    )
    crop_mode: Literal["center", "squash", "border"] | None = _option(
        None, "how evaluation resizes before it crops: by the shorter side, to a square, or to fit and padded"
    )
    interpolation: str | None = _option(None, "how images are resized; the model's way if not given")
    train_crop_mode: Literal["rrc", "rkrc", "rkrr", "squash"] = _option(
        "rrc", "random crop of a random size; timm's rkrc and rkrr; or of a square that evaluation crops too"
    )
    no_aug: bool = _option(False, "no augmentation at all")
    scale: list[float] = _option([0.08, 1.0], "range of the random crop's area, relative to the image")
    ratio: list[float] = _option([0.75, 4 / 3], "range of the random crop's aspect ratio")
    hflip: float = _option(0.5, "probability of a horizontal flip")
    color_jitter: float | list[float] = _option(
        0.4, "strength of random brightness, contrast and saturation, or of each of them and hue"
    )
    grayscale_prob: float = _option(0.0, "probability that an image loses its colours")
    aa: str | None = _option(None, "auto-augmentation policy, as rand-m9-mstd0.5")
    reprob: float = _option(0.0, "probability that a random rectangle is erased")


@dataclass(kw_only=True)
class OptimizerOptions:
    """Optimizer and schedule."""

    opt: str = _option("adamw", "optimizer, by timm's name")
    lr: float = _option(5e-5, "learning rate after the warm-up")
    weight_decay: float = _option(0.05, "weight decay; biases and norms have none")
    momentum: float = _option(0.9, "momentum, for optimizers that have one")
    layer_decay: float | None = _option(None, "factor on the learning rate from each layer to the one below")
    head_lr_mult: float = _option(1.0, "factor on the learning rate of the classifier")
    clip_grad: float | None = _option(None, "clip the gradient to this norm")
    grad_accum_steps: int = _option(1, "batches whose gradients are averaged for one step")
    epochs: int = _option(10, "epochs to train")
    steps: int | None = _option(None, "optimizer steps to train, instead of --epochs")
    sched: Literal["cosine", "tanh", "poly", "constant"] = _option("cosine", "schedule of the learning rate")
    warmup_epochs: float = _option(1.0, "epochs of linear warm-up")
    warmup_steps: int | None = _option(None, "optimizer steps of warm-up, instead of --warmup-epochs")
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up")
    min_lr: float = _option(0.0, "learning rate at the end of the schedule")


@dataclass(kw_only=True)
class DeviceOptions:
    """The machine."""

    device: str = _option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    amp: bool = _option(False, "mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = _option("bfloat16", "lower precision of --amp")
    workers: int = _option(
        min(4, os.cpu_count() or 1), "processes that load images; 0 loads them in the main one", "-j"
    )
    tf32: bool = _option(False, "products of float32 in TF32, on GPUs that have it")


@dataclass(kw_only=True)
class DistributedOptions:
    """Several processes, as `torchrun` starts them."""

    distribute: Literal["ddp", "fsdp"] = _option(
        "ddp", "each process holds the model, or a part of weights, gradients and optimizer (FSDP2)"
    )


@dataclass(kw_only=True)
class AverageOptions:
    """Averages of the target's weights."""

    model_ema: bool = _option(False, "evaluate and save a moving average of the target's weights")
    model_ema_decay: float = _option(0.9998, "share of the average that each step keeps")
    model_ema_warmup: bool = _option(False, "keep less of it in the first steps")
    swad: bool = _option(False, "also save the mean of the weights along the flat part of the run (SWAD)")
    swad_converge: int = _option(3, "evaluations of which the first is the best, where SWAD begins")
    swad_tolerance: int = _option(6, "evaluations above the threshold, before which SWAD ends")
    swad_tolerance_ratio: float = _option(0.3, "threshold of SWAD, above the loss where it begins")


@dataclass(kw_only=True)
class RunOptions:
    """The run."""

    output: str = _option("output/finetune", "folder of the run; one that holds a run already is refused")
    resume: str | None = _option(None, "folder of an interrupted run to continue, with its options")
    seed: int = _option(0, "of initialisation, images, augmentation, dropout and coins")
    val_interval: int = _option(1, "epochs between evaluations; the last step is always evaluated")
    val_steps: int | None = _option(None, "steps between evaluations, instead of --val-interval")
    patience: int | None = _option(None, "stop after so many evaluations without a better one")
    recovery_interval: int = _option(0, "steps between checkpoints within an epoch; 0 for none")
    eval_metric: Literal["top1", "loss"] = _option("top1", "what selects the best checkpoint")
    log_interval: int = _option(10, "steps between updates of the loss that is shown")
    log_tensorboard: bool = _option(False, "also log to TensorBoard, in the folder of the run")
    log_wandb: bool = _option(False, "also log to Weights & Biases")
    wandb_project: str | None = _option(None, "its project")


@dataclass(kw_only=True)
class RecipeOptions(
    RunOptions,
    DistributedOptions,
    DeviceOptions,
    AverageOptions,
    OptimizerOptions,
    LossOptions,
    PreparationOptions,
    BatchOptions,
    LoRAOptions,
    SourceOptions,
    StochCAOptions,
    ModelOptions,
):
    """What training has in common, whatever the images."""

    def __post_init__(self) -> None:
        _check(
            self,
            at_least_one=(
                "batch_size validation_batch_size grad_accum_steps epochs steps val_interval val_steps"
                " patience log_interval num_classes img_size source_img_size swad_converge swad_tolerance"
            ),
            not_negative=(
                "lr warmup_lr min_lr weight_decay head_lr_mult warmup_epochs warmup_steps workers"
                " recovery_interval seed mixup cutmix mixup_off_epoch swad_tolerance_ratio"
                " lora_rank lora_alpha"
            ),
            unit=(
                "drop_path smoothing hflip reprob grayscale_prob mixup_prob mixup_switch_prob model_ema_decay"
                " lora_dropout"
            ),
            share="layer_decay crop_pct",
        )
        arithmetic = self.amp_dtype if self.amp else "float32"
        fitting = (arithmetic, "float8") if arithmetic == "bfloat16" else (arithmetic,)
        if self.source_dtype not in (None, *fitting):
            raise ValueError(
                f"--source-dtype {self.source_dtype} does not fit steps in {arithmetic}, "
                f"which take {' or '.join(fitting)}: see --amp and --amp-dtype"
            )
        if self.lora_rank:
            if self.swad:
                raise ValueError("--swad averages weights, which --lora-rank does not train: use one of them")
            if self.distribute == "fsdp":
                raise ValueError(
                    "--distribute fsdp shards weights that are trained: use ddp with --lora-rank"
                )
            if self.source_dtype is not None:
                raise ValueError(
                    f"--source-dtype {self.source_dtype} casts the source's weights, which are the target's "
                    "with --lora-rank: leave it out"
                )
        if self.swad and self.distribute == "fsdp":
            raise ValueError("--swad needs whole weights in each process: use --distribute ddp")
        if self.distribute == "fsdp" and arithmetic == "float16":
            raise ValueError("--distribute fsdp has no loss scaling: use --amp-dtype bfloat16")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"--mixup and --cutmix need an even --batch-size, got {self.batch_size}")
        if self.p_schedule is not None and not all(0 <= p <= 1 for p in self.p_schedule):
            raise ValueError(f"--p-schedule must be between 0 and 1, got {self.p_schedule}")
        for name in ("clip_grad", "norm_eps"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{flag(name)} must be positive, got {value}")
        if self.seed > MAX_SEED:
            raise ValueError(f"--seed must be at most {MAX_SEED}, got {self.seed}")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"--std must be positive, got {self.std}")
        _check_range("scale", self.scale, 1.0, "above 0 and at most 1")
        _check_range("ratio", self.ratio, sys.float_info.max, "above 0")
        if self.interpolation not in (None, *INTERPOLATIONS):
            raise ValueError(
                f"--interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation}"
            )
        _check_model_kwargs(self.model_kwargs)


@dataclass(kw_only=True)
class FinetuneOptions(RecipeOptions, TrainDataOptions, DatasetOptions):
    """Options of `stochca finetune`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self,
            at_least_one="train_num_samples val_num_samples",
            not_negative="subset_seed",
            share="train_subset",
        )


@dataclass(kw_only=True)
class DomainOptions:
    """Domains."""

    data_dir: str | None = _option(None, "folder with one folder per domain, and in each one per class")
    layout: str | None = _option(
        None, "check that --data-dir looks as one of docs/datasets.md: pacs, vlcs, ..."
    )
    test_domains: list[str] | None = _option(
        None, "domains to leave out, one after the other; all if not given"
    )
    methods: list[Literal["erm", "stochca", "miro", "miro_stochca"]] = _option(
        ["erm", "stochca"],
        "what is compared: plain fine-tuning, StochCA with --p, and each of them with MIRO",
    )
    miro_weight: float = _option(1.0, "weight of MIRO")
    seeds: list[int] = _option([0, 1, 2], "one run each, split of the domains included")
    holdout_fraction: float = _option(0.2, "share of each domain that is held out, to select by")
    spread: Spread = _option("standard error", "over seeds, in the tables")


@dataclass(kw_only=True)
class DomainBedOptions(RecipeOptions, DomainOptions):
    """Options of `stochca domainbed`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, at_least_one="", not_negative="miro_weight")
        if not 0 < self.holdout_fraction < 1:
            raise ValueError(f"--holdout-fraction must be between 0 and 1, got {self.holdout_fraction}")
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{flag(name)} must be different values, at least one, got {values}")
        if bad := [seed for seed in self.seeds if not 0 <= seed <= MAX_SEED]:
            raise ValueError(f"--seeds must be from 0 to {MAX_SEED}, got {bad}")


@dataclass(kw_only=True)
class EvaluateOptions(DeviceOptions, BatchOptions, DatasetOptions):
    """Options of `stochca evaluate`."""

    checkpoint: str = _option("", "safetensors file of a run of stochca finetune")
    json: bool = _option(False, "print the result as JSON")

    def __post_init__(self) -> None:
        _check(self, at_least_one="batch_size", not_negative="workers")


@dataclass(kw_only=True)
class InfoOptions:
    """Options of `stochca info`."""

    device: str = _option("auto", "device to ask about")
    amp_dtype: Literal["bfloat16", "float16", "float32"] = _option("bfloat16", "dtype to ask about")
    head_dim: int = _option(64, "head size to ask about")


# What a resumed run may change: nothing that decides its result.
RESUMABLE = {
    "data_dir", "dataset_download", "device", "log_interval", "log_tensorboard", "log_wandb", "output",
    "recovery_interval", "resume", "validation_batch_size", "wandb_project", "workers",
}  # fmt: skip


def changed_options(saved: dict[str, Any], options: RecipeOptions) -> list[str]:
    """Name the options of a saved run that a resuming one may not change and did, with both values."""
    now = dataclasses.asdict(options)
    then = {
        **dataclasses.asdict(type(options)()),
        **saved,
    }  # an option younger than the run had its default
    return [
        f"{flag(name)} was {then[name]}, is {now[name]}"
        for name in now
        if name not in RESUMABLE and then[name] != now[name]
    ]


def flag(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def _check(options: Any, at_least_one: str, not_negative: str, unit: str = "", share: str = "") -> None:
    def refuse(names: str, wanted: str, is_bad: Any) -> None:
        for name in names.split():
            value = getattr(options, name)
            if value is not None and is_bad(value):
                raise ValueError(f"{flag(name)} must be {wanted}, got {value}")

    refuse(at_least_one, "at least 1", lambda value: value < 1)
    refuse(not_negative, "at least 0", lambda value: not value >= 0)
    refuse(unit, "between 0 and 1", lambda value: not 0 <= value <= 1)
    refuse(share, "above 0 and at most 1", lambda value: not 0 < value <= 1)


def _check_range(name: str, values: list[float], highest: float, wanted: str) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest:
        raise ValueError(f"{flag(name)} must be two numbers {wanted}, the lower one first, got {values}")


def _check_model_kwargs(model_kwargs: dict[str, Any]) -> None:
    if model_kwargs.get("in_chans", 3) != 3:
        raise ValueError(
            f"in_chans in --model-kwargs must be 3, as images are read as RGB, got {model_kwargs['in_chans']}"
        )
    names = {field.name for field in dataclasses.fields(FinetuneOptions)}
    for key in model_kwargs:
        name = {"drop_path_rate": "drop_path"}.get(key, key)
        if name in names:
            raise ValueError(f"{key} in --model-kwargs has a flag of its own: give it as {flag(name)}")
