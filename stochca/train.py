"""Fine-tuning: the loop, its optimizer, and what it writes."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler, dispatch_clip_grad, random_seed
from torch import Tensor, nn
from tqdm import tqdm

import stochca
from stochca import checkpoint as files
from stochca.config import FinetuneOptions, changed_options
from stochca.data import check_classes, make_loader, number_of_classes, open_images
from stochca.evaluation import autocast, evaluate, resolve_device
from stochca.model import StochCA


class Interrupted(Exception):
    """A signal stopped the run, which can be resumed.

    Args:
        signum: The signal.
        step: Steps done.
        output: Folder of the run.
    """

    def __init__(self, signum: int, step: int, output: Path) -> None:
        self.signum, self.output = signum, output
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; "
            f"continue with: stochca finetune --resume {output}"
        )


def create_model(options: FinetuneOptions, num_classes: int) -> StochCA:
    """The model that the options describe."""
    overlay: dict[str, Any] = {}
    if options.pretrained_path is not None:
        overlay = {"pretrained_cfg_overlay": {"file": options.pretrained_path}}
    model = StochCA.from_timm(
        options.model,
        pretrained=options.pretrained,
        p=options.p,
        per=options.per,
        mode=options.mode,
        seed=options.seed,
        impl=options.impl,
        drop_path_rate=options.drop_path,
        **overlay,
        **target_kwargs(options, num_classes),
    )
    model.set_grad_checkpointing(options.grad_checkpointing)
    if options.torchcompile:
        model.compile()
    return model


def target_kwargs(options: FinetuneOptions, num_classes: int) -> dict[str, Any]:
    """What `timm.create_model` needs besides the name to build the target that a checkpoint fits."""
    size = {"img_size": options.img_size} if options.img_size else {}
    return {**options.model_kwargs, **size, "num_classes": num_classes}


def create_optimizer(target: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """The optimizer of timm, with a learning rate of its own for the classifier.

    Layer decay and the classifier's factor are `lr_scale` of a parameter group, by which timm's schedulers
    multiply the learning rate in every step.
    """
    no_decay = target.no_weight_decay()  # type: ignore[operator]
    head = {id(parameter) for parameter in target.get_classifier().parameters()}  # type: ignore[operator]
    if not head:
        raise ValueError(f"{options.model} has no classifier to train")
    if options.layer_decay is None:
        groups = param_groups_weight_decay(target, options.weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            target, options.weight_decay, no_weight_decay_list=no_decay, layer_decay=options.layer_decay
        )
    split = []
    for group in groups:
        for in_head, factor in ((False, 1.0), (True, options.head_lr_mult)):
            parameters = [p for p in group["params"] if (id(p) in head) == in_head]
            if parameters:
                scale = group.get("lr_scale", 1.0) * factor
                split.append({**group, "params": parameters, "lr_scale": scale})
    return create_optimizer_v2(split, opt=options.opt, lr=options.lr, momentum=options.momentum)


def create_schedule(
    optimizer: torch.optim.Optimizer, options: FinetuneOptions, total_steps: int, steps_per_epoch: int
) -> Scheduler:
    """The scheduler of timm, over optimizer steps."""
    warmup = options.warmup_steps
    if warmup is None:
        warmup = round(options.warmup_epochs * steps_per_epoch)
    is_constant = options.sched == "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # A step schedule that never steps; timm's "constant" is younger.
        sched="step" if is_constant else options.sched,
        decay_epochs=total_steps,
        decay_rate=1.0,
        num_epochs=total_steps,
        min_lr=options.min_lr,
        warmup_lr=options.warmup_lr,
        warmup_epochs=min(warmup, total_steps - 1),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


class Trainer:
    """One run: everything that it holds, and the loop over its steps.

    Args:
        options: Of the run.

    Raises:
        FileNotFoundError: Missing data, or nothing to resume.
        FileExistsError: The output folder holds a run.
        ValueError: An option, the data or the state to resume from does not fit.
    """

    def __init__(self, options: FinetuneOptions) -> None:
        if options.resume is not None:
            resume = Path(options.resume)
            options = dataclasses.replace(options, output=str(resume.parent if resume.is_file() else resume))
        self.options = options
        self.output = Path(options.output)
        state = files.open_output(self.output, resume=options.resume is not None)
        if state is not None and (changed := changed_options(state["options"], options)):
            raise ValueError(f"a resumed run keeps its options, but {'; '.join(changed)}")
        self.device = resolve_device(options.device)

        opened = [
            open_images(
                options.data_dir,
                options.dataset,
                split,
                is_training=is_training,
                seed=options.seed,
                download=options.dataset_download,
            )
            for split, is_training in ((options.train_split, True), (options.val_split, False))
        ]
        self.train_images, self.val_images = opened
        check_classes(
            self.train_images.classes,
            self.val_images.classes,
            f"the split {options.val_split!r}",
            f"{options.train_split!r}",
        )
        self.num_classes = number_of_classes(self.train_images, options.num_classes)

        random_seed(options.seed)
        self.model = create_model(options, self.num_classes).to(self.device)
        self.source_digest = files.digest(self.model.target)
        self.data_config = resolve_data_config(
            {
                "img_size": options.img_size or options.model_kwargs.get("img_size"),
                "mean": options.mean,
                "std": options.std,
                "crop_pct": options.crop_pct,
                "interpolation": options.interpolation,
            },
            model=self.model.target,
        )
        augmentation = ("no_aug", "scale", "ratio", "hflip", "color_jitter", "reprob")
        self.loader, sampler = make_loader(
            self.train_images,
            self.data_config,
            options.batch_size,
            device=self.device,
            workers=options.workers,
            auto_augment=options.aa,
            **{name: getattr(options, name) for name in augmentation},
        )
        assert sampler is not None
        self.sampler = sampler
        self.val_loader, _ = make_loader(
            self.val_images,
            self.data_config,
            options.validation_batch_size or options.batch_size,
            device=self.device,
            workers=options.workers,
        )
        self.batches_per_epoch = len(self.loader)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / options.grad_accum_steps)
        self.total_steps = options.steps or options.epochs * self.steps_per_epoch

        self.criterion = nn.CrossEntropyLoss(label_smoothing=options.smoothing)
        self.optimizer = create_optimizer(self.model.target, options)
        self.schedule = create_schedule(self.optimizer, options, self.total_steps, self.steps_per_epoch)
        needs_scaler = options.amp and options.amp_dtype == "float16"
        self.scaler = NativeScaler(self.device.type) if needs_scaler else None

        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.running = _Running(self.device)
        self.stop_signal = 0
        if state is not None:
            self._restore(state)
        else:
            files.save_config(self.output / files.CONFIG, dataclasses.asdict(options))

    def run(self) -> dict[str, Any]:
        """Train to the end and return a summary.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run was saved after the step at work.
        """
        with self._signals(), self._tensorboard() as log, self._bar() as bar:
            if self.step and self._evaluation_is_due():
                self._evaluate(log)
            while self.step < self.total_steps:
                self._epoch(bar, log)
        best = self._best()
        return {
            "output": str(self.output),
            "steps": self.step,
            "best_step": best["step"],
            "best_top1": best["top1"],
            "last_top1": self.history[-1]["top1"],
            "images_per_second": self.history[-1]["images_per_second"],
            "source_fraction": sum(row["source_fraction"] for row in self.history) / len(self.history),
            "skipped": self.train_images.unreadable_names() + self.val_images.unreadable_names(),
        }

    def _epoch(self, bar: tqdm, log: Callable[[dict[str, Any]], None]) -> None:
        """Run the rest of the epoch that `step` is in."""
        self.model.train()
        epoch, done = divmod(self.step, self.steps_per_epoch)
        accumulate = self.options.grad_accum_steps
        self.sampler.epoch = epoch
        self.sampler.start = done * accumulate * self.options.batch_size
        batches = iter(self.loader)
        for index in range(done, min(self.steps_per_epoch, done + self.total_steps - self.step)):
            start = time.perf_counter()
            loss = self._train_step(batches, min(accumulate, self.batches_per_epoch - index * accumulate))
            self.step += 1
            if self.step % self.options.log_interval == 0:
                self._show(bar, loss)
            self.running.seconds += time.perf_counter() - start
            bar.update()
            if self._evaluation_is_due():
                self._evaluate(log)
            elif self.options.recovery_interval and self.step % self.options.recovery_interval == 0:
                self._save()
            if self.stop_signal:
                self._stop()

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]], num_batches: int) -> Tensor:
        """One optimizer step over some batches; returns their mean loss."""
        mean_loss = torch.zeros((), device=self.device)
        parameters = list(self.model.target.parameters())
        for remaining in reversed(range(num_batches)):
            images, target = next(batches)
            if not self.options.skip_corrupt:
                self.train_images.check_readable()
            images, target = images.to(self.device), target.to(self.device)
            with autocast(self.options, self.device):
                loss = self.criterion(self.model(images), target) / num_batches
            mean_loss += loss.detach()
            assert self.model.plan is not None
            self.running.add(loss.detach() * num_batches, len(target), self.model.plan.source_fraction)
            if self.scaler is not None:
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=self.options.clip_grad,
                    parameters=parameters,
                    need_update=not remaining,
                )
            else:
                loss.backward()
        if self.scaler is None:
            if self.options.clip_grad is not None:
                dispatch_clip_grad(parameters, self.options.clip_grad)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step_update(self.step + 1)
        return mean_loss

    def _show(self, bar: tqdm, loss: Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {self.step}: try a lower --lr, --clip-grad or bfloat16"
            )
        speed = self.running.images / max(self.running.seconds, 1e-9)
        bar.set_postfix_str(f"loss {value:.4f}, lr {self._lr():.2e}, {speed:.0f} images/s", refresh=False)

    def _evaluation_is_due(self) -> bool:
        """Whether the step is one to evaluate after, and was not evaluated."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        at_step = self.step == self.total_steps or (rest == 0 and epoch % self.options.val_interval == 0)
        return at_step and not (self.history and self.history[-1]["step"] == self.step)

    def _evaluate(self, log: Callable[[dict[str, Any]], None]) -> None:
        """Evaluate the target and save; leave that to the resumed run if a signal comes."""
        train = self.running.means()
        result = evaluate(
            self.model, self.val_loader, self.options, self.device, should_stop=lambda: self.stop_signal
        )
        if result is None:
            self._stop()
        row = {
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "step": self.step,
            "train_loss": train["loss"],
            "val_loss": result["loss"],
            "top1": result["top1"],
            "top5": result["top5"],
            "lr": self._lr(),
            "images_per_second": train["images_per_second"],
            "seconds": train["seconds"],
            "source_fraction": train["source_fraction"],
        }
        self.history.append(row)
        self.running = _Running(self.device)
        if self._best() is row:
            self._save_weights(self.output / files.BEST)
        self._save()
        log(row)
        tqdm.write(
            f"epoch {row['epoch']:g}, step {self.step}: train loss {row['train_loss']:.4f}, "
            f"val loss {row['val_loss']:.4f}, top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, "
            f"{row['images_per_second']:.1f} images/s, {row['source_fraction']:.0%} of source blocks run"
        )
        skipped = int(self.train_images.unreadable.sum() + self.val_images.unreadable.sum())
        if skipped:
            names = self.train_images.unreadable_names() + self.val_images.unreadable_names()
            tqdm.write(f"{skipped} unreadable images were left out so far: {', '.join(names)}")

    def _best(self) -> dict[str, Any]:
        """The evaluation that selects the best checkpoint, the first of equals."""
        if self.options.eval_metric == "loss":
            return min(self.history, key=lambda row: row["val_loss"])
        return max(self.history, key=lambda row: row["top1"])

    def _lr(self) -> float:
        """The learning rate of the parameters that have the largest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _stop(self) -> NoReturn:
        self._save()
        raise Interrupted(self.stop_signal, self.step, self.output)

    def _save(self) -> None:
        """Write the state of the run, and then what is derived from it."""
        state = {
            "options": dataclasses.asdict(self.options),
            "step": self.step,
            "coin_step": self.model.coins.step,
            "model": self.model.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "rng": files.rng_state(),
            "history": self.history,
            "running": self.running.state(),
            "source_digest": self.source_digest,
            "classes": self.train_images.classes,
            "train_images": len(self.train_images),
        }
        files.save_state(self.output / files.STATE, state)
        self._save_derived()

    def _save_derived(self) -> None:
        self._save_weights(self.output / files.LAST)
        if self.history:
            files.save_metrics(self.output / files.METRICS, self.history)

    def _save_weights(self, path: Path) -> None:
        metadata = {
            "stochca": stochca.__version__,
            "model": self.options.model,
            "model_kwargs": target_kwargs(self.options, self.num_classes),
            "num_classes": self.num_classes,
            "classes": self.train_images.classes,
            "data_config": self.data_config,
            "step": self.step,
            "metric": {
                "name": self.options.eval_metric,
                "evaluation": self.history[-1] if self.history else None,
            },
        }
        files.save_weights(path, self.model.target.state_dict(), metadata)

    def _restore(self, state: dict[str, Any]) -> None:
        check_classes(state["classes"], self.train_images.classes, "the dataset", "the run to resume")
        if state["train_images"] != len(self.train_images):
            raise ValueError(
                f"the run to resume has {state['train_images']} training images, "
                f"the dataset now has {len(self.train_images)}"
            )
        if state["source_digest"] != self.source_digest:
            raise ValueError(
                f"the weights that {self.options.model} starts from are not those of the run to resume, "
                "so its frozen source cannot be restored"
            )
        complaint = f"{self.output / files.STATE} does not fit {self.options.model}"
        files.load_state_dict(self.model.target, state["model"], complaint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.model.coins.step = state["coin_step"]
        self.history = state["history"]
        self.running.restore(state["running"])
        files.set_rng_state(state["rng"])
        self._save_derived()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of dying of them; a second one acts at once."""
        previous: dict[int, Any] = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
        }

        def note(number: int, _frame: object) -> None:
            self.stop_signal = number
            signal.signal(number, previous[number])
            tqdm.write(f"{signal.Signals(number).name}: saving after the step at work")

        for number in previous:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _bar(self) -> tqdm:
        # disable=None: no bar where nobody looks, as in a log file.
        return tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        if not self.options.log_tensorboard:
            yield lambda row: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"--log-tensorboard needs TensorBoard: pip install stochca[tensorboard] ({error})"
            ) from error

        def log(row: dict[str, Any]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        with SummaryWriter(self.output / "tensorboard", purge_step=self.step + 1) as writer:
            yield log


class _Running:
    """Sums since the last evaluation; the loss is added up on the device, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.images = 0
        self.batches = 0
        self.source = 0.0
        self.seconds = 0.0

    def add(self, loss: Tensor, images: int, source_fraction: float) -> None:
        self.loss += loss * images
        self.images += images
        self.batches += 1
        self.source += source_fraction

    def means(self) -> dict[str, float]:
        start = time.perf_counter()
        loss = self.loss.item()  # waits for the device
        self.seconds += time.perf_counter() - start
        return {
            "loss": loss / max(self.images, 1),
            "source_fraction": self.source / max(self.batches, 1),
            "images_per_second": self.images / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        return {**vars(self), "loss": self.loss.item()}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "loss": torch.full_like(self.loss, state["loss"])})


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Fine-tune a timm Vision Transformer with StochCA.

    Args:
        options: Of the run.

    Returns:
        A summary: `output`, `steps`, `best_step`, `best_top1` and `last_top1` (percent), `images_per_second`,
        `source_fraction` (of the source's blocks, the mean that ran) and `skipped` (unreadable images).

    Raises:
        Interrupted: A signal stopped the run, which is saved.
        FileNotFoundError: Missing data, or nothing to resume.
        FileExistsError: The output folder holds a run.
        ValueError: An option, the data or the state to resume from does not fit.
    """
    return Trainer(options).run()
