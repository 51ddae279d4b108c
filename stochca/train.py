"""Fine-tuning: the loop, its optimizer, and what it writes."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import NativeScaler, dispatch_clip_grad, random_seed
from torch import Tensor, nn
from tqdm import tqdm

import stochca
from stochca import checkpoint as files
from stochca.config import FinetuneOptions, changed_options
from stochca.data import check_auto_augment, check_classes, make_loader, number_of_classes
from stochca.evaluation import autocast, evaluate, resolve_device
from stochca.progress import Interrupted, Log, RunningMeans, StopRequest, tensorboard
from stochca.recipe import (
    create_model,
    create_optimizer,
    create_schedule,
    open_splits,
    resolve_preparation,
    target_kwargs,
)


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
        check_auto_augment(options.aa)
        self.options = options
        self.output = Path(options.output)
        state = files.open_output(self.output, resume=options.resume is not None)
        if state is not None and (changed := changed_options(state["options"], options)):
            raise ValueError(f"a resumed run keeps its options, but {'; '.join(changed)}")
        self.device = resolve_device(options.device)

        self.train_images, self.val_images = open_splits(options)
        self.num_classes = number_of_classes(self.train_images, options.num_classes)

        random_seed(options.seed)
        self.model = create_model(options, self.num_classes).to(self.device)
        self.source_digest = files.digest(self.model.target)
        self.data_config = resolve_preparation(options, self.model.target)
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
        self.running = RunningMeans(self.device)
        self.stop = StopRequest()
        if state is not None:
            self._restore(state)
        else:
            files.save_config(self.output / files.CONFIG, dataclasses.asdict(options))

    def run(self) -> dict[str, Any]:
        """Train to the end and return a summary.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run was saved after the step at work.
        """
        folder = self.output / "tensorboard" if self.options.log_tensorboard else None
        with self.stop, tensorboard(folder, self.step) as log, self._bar() as bar:
            if self.step and self._evaluation_is_due():
                self._evaluate(log)
            while self.step < self.total_steps:
                self._epoch(bar, log)
        best = self._best()
        summary = {
            "output": str(self.output),
            "steps": self.step,
            "best_step": best["step"],
            "best_top1": best["top1"],
            "last_top1": self.history[-1]["top1"],
            "images_per_second": self.history[-1]["images_per_second"],
            "source_fraction": sum(row["source_fraction"] for row in self.history) / len(self.history),
            "skipped": self._skipped(),
        }
        files.save_summary(self.output / files.SUMMARY, summary)
        return summary

    def _epoch(self, bar: tqdm, log: Log) -> None:
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
            is_shown = self.step % self.options.log_interval == 0
            if is_shown:
                loss = loss.cpu()  # waits for the device, which belongs to the time of the steps
            self.running.seconds += time.perf_counter() - start
            if is_shown:
                self._show(bar, loss.item())
            bar.update()
            if self._evaluation_is_due():
                self._evaluate(log)
            elif self.options.recovery_interval and self.step % self.options.recovery_interval == 0:
                self._save()
            if self.stop:
                self._save_and_stop()

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]], num_batches: int) -> Tensor:
        """One optimizer step over some batches; returns their mean loss."""
        mean_loss = torch.zeros((), device=self.device)
        parameters = list(self.model.target.parameters())
        for remaining in reversed(range(num_batches)):
            images, target = next(batches)
            if not self.options.skip_corrupt:
                self.train_images.check_readable()
            images, target = (t.to(self.device, non_blocking=True) for t in (images, target))
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

    def _show(self, bar: tqdm, loss: float) -> None:
        self._check_finite(loss)
        speed = self.running.images / max(self.running.seconds, 1e-9)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {self._lr():.2e}, {speed:.0f} images/s", refresh=False)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: try a lower --lr, --clip-grad or bfloat16"
            )

    def _evaluation_is_due(self) -> bool:
        """Whether the step is one to evaluate after, and was not evaluated."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        at_step = self.step == self.total_steps or (rest == 0 and epoch % self.options.val_interval == 0)
        return at_step and not (self.history and self.history[-1]["step"] == self.step)

    def _evaluate(self, log: Log) -> None:
        """Evaluate the target and save; leave that to the resumed run if a signal comes."""
        train = self.running.means()
        self._check_finite(train["loss"])
        result = evaluate(
            self.model, self.val_loader, self.options, self.device, should_stop=lambda: self.stop
        )
        if result is None:
            self._save_and_stop()
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
        self.running = RunningMeans(self.device)
        self._save()
        log(row)
        tqdm.write(
            f"epoch {row['epoch']:g}, step {self.step}: train loss {row['train_loss']:.4f}, "
            f"val loss {row['val_loss']:.4f}, top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, "
            f"{row['images_per_second']:.1f} images/s, {row['source_fraction']:.0%} of source blocks run"
        )
        if names := self._skipped():
            tqdm.write(f"{len(names)} unreadable images were left out so far: {', '.join(names)}")

    def _skipped(self) -> list[str]:
        return self.train_images.unreadable_names() + self.val_images.unreadable_names()

    def _best(self) -> dict[str, Any]:
        """The evaluation that selects the best checkpoint, the first of equals."""
        if self.options.eval_metric == "loss":
            return min(self.history, key=lambda row: row["val_loss"])
        return max(self.history, key=lambda row: row["top1"])

    def _lr(self) -> float:
        """The learning rate of the parameters that have the largest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _save_and_stop(self) -> NoReturn:
        self._save()
        raise Interrupted(self.stop.signum, self.step, self.output)

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
            if self._best()["step"] == self.step:
                self._save_weights(self.output / files.BEST)
            files.save_metrics(self.output / files.METRICS, self.history)

    def _save_weights(self, path: Path) -> None:
        row = self.history[-1] if self.history else None
        metadata = {
            "stochca": stochca.__version__,
            "model": self.options.model,
            "model_kwargs": target_kwargs(self.options, self.num_classes),
            "num_classes": self.num_classes,
            "classes": self.train_images.classes,
            "data_config": self.data_config,
            "step": self.step,
            "metrics": {name: row[name] for name in ("step", "val_loss", "top1", "top5")} if row else None,
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

    def _bar(self) -> tqdm:
        # disable=None: no bar where nobody looks, as in a log file.
        return tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=None)


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
