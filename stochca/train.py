"""Fine-tuning: the loop, its optimizer, and what it writes."""

import dataclasses
import math
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad, random_seed
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import stochca
from stochca import checkpoint as files
from stochca import distributed
from stochca.config import FinetuneOptions, RecipeOptions, changed_options
from stochca.data import check_auto_augment, check_classes, number_of_classes
from stochca.distributed import (
    World,
    accumulating,
    distribute,
    processes,
    resolve_device,
    was_restarted,
    whole,
)
from stochca.evaluation import Evaluator, autocast
from stochca.history import History, selected
from stochca.memory import advice, largest_fitting
from stochca.progress import Interrupted, Log, RunningMeans, StopRequest, loggers
from stochca.recipe import (
    create_mixup,
    create_model,
    create_objective,
    create_optimizer,
    create_schedule,
    probability,
    resolve_preparation,
    target_kwargs,
)
from stochca.run_data import RunData, finetune_data
from stochca.swad import Swad
from stochca.weights.creation import create_plain
from stochca.weights.facts import norm_eps
from stochca.weights.projection import with_plain_head


class Trainer:
    """One run: everything that it holds, and the loop over its steps.

    Args:
        options: Of the run.
        world: The processes of the run; this one alone if not given. Where `torchrun` restarts them, they go
            on from the state in the output folder.
        data: Its images; those of `options` if not given.

    Raises:
        FileNotFoundError: Missing data, or nothing to resume.
        FileExistsError: The output folder holds a run.
        ValueError: An option, the data or the state to resume from does not fit.
    """

    def __init__(
        self, options: RecipeOptions, world: World | None = None, data: RunData | None = None
    ) -> None:
        if was_restarted() and options.resume is None and (Path(options.output) / files.STATE).is_file():
            options = dataclasses.replace(options, resume=options.output)
        if options.resume is not None:
            resume = Path(options.resume)
            options = dataclasses.replace(options, output=str(resume.parent if resume.is_file() else resume))
        check_auto_augment(options.aa)
        self.options = options
        self.world = world = world or World(resolve_device(options.device))
        self.device = world.device
        self.output = Path(options.output)
        state = files.open_output(self.output, resume=options.resume is not None)
        world.wait()  # the folder of a new run is seen empty by all
        if state is not None:
            self._check_unchanged(state)
        if options.tf32:
            torch.set_float32_matmul_precision("high")

        if data is None:
            assert isinstance(options, FinetuneOptions)
            data = finetune_data(options)
        self.data = data
        self.num_classes = number_of_classes(data.parts[0], options.num_classes)

        random_seed(options.seed)
        self.model = create_model(options, self.num_classes).to(self.device)
        self.source_digest = files.digest(self.model.source)
        self.data_config = resolve_preparation(options, self.model.target)
        self.loader, self.sampler = data.train_loader(self.data_config, options, world)
        self.evaluator = Evaluator(data, self.data_config, options, world)
        self.batches_per_epoch = len(self.loader)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / options.grad_accum_steps)
        self.total_steps = options.steps or options.epochs * self.steps_per_epoch
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.model.coins.p = probability(options, self.batches_per_epoch, epochs)
        self.model.coins.spread(world.rank, world.size, independent=options.independent_coins)

        self.objective = create_objective(options, self.model)
        self.mixup = create_mixup(options, self.num_classes)
        if state is None:
            self._fit_losses()
        self.average = self._create_average()
        self.swad = (
            Swad(options.swad_converge, options.swad_tolerance, options.swad_tolerance_ratio)
            if options.swad
            else None
        )
        self.module = distribute(self.objective, options.distribute, world)
        if world.rank > 0:  # until here, all processes drew the same
            random_seed(options.seed, world.rank)
        self.optimizer = create_optimizer(self.model.target, options, self.objective.companions)
        self.schedule = create_schedule(self.optimizer, options, self.total_steps, self.steps_per_epoch)
        needs_scaler = options.amp and options.amp_dtype == "float16"
        self.scaler = NativeScaler(self.device.type) if needs_scaler else None

        self.step = self.saved_step = 0
        self.history = History(options.eval_metric, options.patience)
        self.running = RunningMeans(self.device)
        self.stop = StopRequest()
        if state is not None:
            self._restore(state)
        elif world.is_primary:
            files.save_config(self.output / files.CONFIG, dataclasses.asdict(options))

    def run(self) -> dict[str, Any]:
        """Train to the end and return a summary.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run was saved after the step at work.
        """
        options = self.options
        if not self.world.is_primary:
            options = dataclasses.replace(options, log_tensorboard=False, log_wandb=False)
        with self.stop, loggers(options, self.output, self.history.last_step) as log, self._bar() as bar:
            if self.step and self._evaluation_is_due():
                self._evaluate(log)
            while not self._is_over():
                self._epoch(bar, log)
        best, rows = self.history.best(), self.history.rows
        summary = {
            "output": str(self.output),
            "steps": self.step,
            "best_step": best["step"],
            "best_top1": best["top1"],
            "last_top1": rows[-1]["top1"],
            **self._finish(),
            "images_per_second": rows[-1]["images_per_second"],
            "source_fraction": sum(row["source_fraction"] for row in rows) / len(rows),
            "skipped": self._skipped(),
        }
        if self.world.is_primary:
            files.save_summary(self.output / files.SUMMARY, summary)
        return summary

    def _is_over(self) -> bool:
        return self.step >= self.total_steps or self.history.is_exhausted()

    def _epoch(self, bar: tqdm, log: Log) -> None:
        """Run the rest of the epoch that `step` is in."""
        self.model.train()
        epoch, done = divmod(self.step, self.steps_per_epoch)
        accumulate = self.options.grad_accum_steps
        self.sampler.epoch = epoch
        self.sampler.start = done * accumulate * self.sampler.global_batch_size
        if self.mixup is not None and self.options.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.options.mixup_off_epoch
        batches = iter(self.loader)
        for index in range(done, min(self.steps_per_epoch, done + self.total_steps - self.step)):
            start = time.perf_counter()
            num_batches = min(accumulate, self.batches_per_epoch - index * accumulate)
            loss = self._train_step(batches, num_batches)
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
            if self.world.any(self.stop):
                self._save_and_stop()
            if self._is_over():
                return

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]], num_batches: int) -> Tensor:
        """One optimizer step over some batches; returns their mean loss."""
        try:
            return self._step(batches, num_batches)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
        # Apart from the error, whose frames hold tensors.
        raise ValueError(f"step {self.step + 1}: {self._what_fits()}")

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]], num_batches: int) -> Tensor:
        mean_loss = torch.zeros((), device=self.device)
        parameters = list(self.module.parameters())
        for remaining in reversed(range(num_batches)):
            images, labels = self._next(batches)
            with accumulating(self.module, is_last=not remaining):
                with autocast(self.options, self.device):
                    terms = self.module(images, labels)
                    output, loss = terms.pop("output"), terms["loss"] / num_batches
                mean_loss += loss.detach()
                assert self.model.plan is not None
                self.running.add(terms, len(output), self.model.plan.source_fraction)
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
        if self.average is not None:
            self.average.update(self.model.target, step=self.step + 1)
        if self.swad is not None:
            self.swad.update(self.model.target.state_dict())
        return mean_loss

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The next batch on the device, mixed if the options say so."""
        images, labels = next(batches)
        if not self.options.skip_corrupt:
            self.loader.dataset.check_readable()
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def _what_fits(self) -> str:
        """Try smaller batches of the same kind, without an update."""
        options, images = self.options, self.sampler.global_batch_size // self.world.size
        with whole(self.module), autocast(options, self.device):
            fitting = largest_fitting(self.model, self.data_config["input_size"], images)
        parts = images // options.batch_size  # of domains, a batch holds as many of each
        return advice(options.batch_size, fitting // parts, options.grad_accum_steps)

    def _show(self, bar: tqdm, loss: float) -> None:
        self._check_finite(loss)
        speed = self.world.size * self.running.images / max(self.running.seconds, 1e-9)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {self._lr():.2e}, {speed:.0f} images/s", refresh=False)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: try a lower --lr, --clip-grad or bfloat16"
            )

    def _evaluation_is_due(self) -> bool:
        """Whether the step is one to evaluate after, and was not evaluated."""
        if self.options.val_steps is not None:
            at_step = self.step % self.options.val_steps == 0
        else:
            epoch, rest = divmod(self.step, self.steps_per_epoch)
            at_step = rest == 0 and epoch % self.options.val_interval == 0
        return (at_step or self.step == self.total_steps) and self.history.last_step != self.step

    def _evaluate(self, log: Log) -> None:
        """Evaluate the target, or its average, and save; leave that to the resumed run if a signal comes."""
        train = self.running.means(self.world)
        self._check_finite(train["loss"])
        with whole(self.module):
            results = self.evaluator.splits(
                self.model.target if self.average is None else self.average, lambda: self.stop
            )
        if results is None:
            self._save_and_stop()
        terms = {f"train_{loss.name}": train[loss.name] for loss in self.objective.companions}
        row = {
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "step": self.step,
            "train_loss": train["loss"],
            **terms,
            **selected(results, self.data.selection),
            "lr": self._lr(),
            "images_per_second": train["images_per_second"],
            "seconds": train["seconds"],
            "source_fraction": train["source_fraction"],
        }
        self.history.rows.append(row)
        if self.swad is not None:
            self.swad.end_segment(self.step, row["val_loss"])
        self.running = RunningMeans(self.device)
        self._save()
        if not self.world.is_primary:
            return
        log(row)
        tqdm.write(
            f"epoch {row['epoch']:g}, step {self.step}: train loss {row['train_loss']:.4f}, "
            f"val loss {row['val_loss']:.4f}, top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, "
            f"{row['images_per_second']:.1f} images/s, {row['source_fraction']:.0%} of source blocks run"
        )
        if names := self._skipped():
            tqdm.write(f"{len(names)} unreadable images were left out so far: {', '.join(names)}")

    def _finish(self) -> dict[str, Any]:
        """What is evaluated once, at the end: SWAD's average, and the best checkpoint on the test split."""
        summary: dict[str, Any] = {}
        if self.swad is not None:
            found = self.swad.result()  # None where the loss has not converged
            summary["swad_steps"] = None
            if found is not None:
                model = self._plain_target()
                mean = with_plain_head(found.mean)
                weights = {name: mean[name].to(t.dtype) for name, t in model.state_dict().items()}
                model.load_state_dict(weights)
                results = self.evaluator.splits(model)
                assert results is not None  # nobody stops it
                metrics = selected(results, self.data.selection)
                summary |= {"swad_steps": [found.start, found.end]}
                summary |= {f"swad_{name}": metric for name, metric in metrics.items()}
                if self.world.is_primary:
                    files.save_weights(self.output / files.SWAD, weights, self._metadata())
        if self.data.test is not None:
            model = self._plain_target()
            files.load_weights(self.output / files.BEST, model, self.options.model)
            result = self.evaluator.test(model)
            summary |= {f"test_{name}": result[name] for name in ("top1", "top5", "loss")}
        return summary

    def _plain_target(self) -> torch.nn.Module:
        """A new model of the target's kind, on the device."""
        return create_plain(self._metadata()).to(self.device)

    def _skipped(self) -> list[str]:
        datasets = [self.loader.dataset, *self.data.evaluations.values(), self.data.test]
        return [name for images in datasets if images is not None for name in images.unreadable_names()]

    def _lr(self) -> float:
        """The learning rate of the parameters that have the largest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _fit_losses(self) -> None:
        """Show the source all training images, without augmentation, for the losses that learn from it."""
        fitted = [loss for loss in self.objective.companions if loss.fits_source_logits]
        if not fitted:
            return
        logits, labels = [], []
        for loader in self.data.plain_train_loaders(self.data_config, self.options, self.world):
            for images, targets in loader:
                if not self.options.skip_corrupt:
                    loader.dataset.check_readable()
                readable = targets >= 0
                with autocast(self.options, self.device):
                    found = self.model.source_logits(images[readable].to(self.device))
                logits.append(found.float().cpu())
                labels.append(targets[readable].cpu())
        for loss in fitted:
            loss.fit(torch.cat(logits), torch.cat(labels))

    def _create_average(self) -> ModelEmaV3 | None:
        options = self.options
        if not options.model_ema:
            return None
        average = ModelEmaV3(
            self.model.target, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup
        )
        if options.distribute == "fsdp":
            fully_shard(average.module, reshard_after_forward=True)
        return average

    def _save_and_stop(self) -> NoReturn:
        self._save()
        # Where it came to another process alone, that one knows which it was.
        raise Interrupted(self.stop.signum or signal.SIGTERM, self.step, self.output)

    def _save(self) -> None:
        """Write the state of the run, and then what is derived from it."""
        state = {
            "options": dataclasses.asdict(self.options),
            "world_size": self.world.size,
            "step": self.step,
            "coin_step": self.model.coins.step,
            "model": distributed.model_state(self.model.target),
            "losses": distributed.model_state(self.objective.losses),
            "swad": self.swad.state() if self.swad is not None else None,
            "average": None if self.average is None else distributed.model_state(self.average.module),
            "lora_scale": self.options.lora_scale,
            "optimizer": distributed.optimizer_state(self.module, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "rng": self.world.gather(files.rng_state()),
            "running": self.world.gather(self.running.state()),
            "history": self.history.rows,
            "source_digest": self.source_digest,
            "classes": self.data.classes,
            "train_images": len(self.loader.dataset),
        }
        if self.world.is_primary:
            try:
                files.save_state(self.output / files.STATE, state)
                self.saved_step = self.step
                files.save_derived(self.output, state, self.history.best_step, self._metadata())
            except OSError as error:
                raise OSError(self._not_saved(error)) from error
        self.world.wait()

    def _not_saved(self, error: OSError) -> str:
        """Tell what a save that failed has left, and how to go on."""
        again = f"{error}; continue with: stochca finetune --resume {shlex.quote(str(self.output))}"
        if self.saved_step == self.step:
            return f"cannot save the weights of step {self.step}, its state is whole: {again}"
        what = f"cannot save the state of step {self.step} in {self.output}"
        if not self.saved_step or not (self.output / files.STATE).is_file():
            return f"{what}, there is none before: {error}"
        return f"{what}, that of step {self.saved_step} is whole: {again}"

    def _metadata(self) -> dict[str, Any]:
        """What the files of weights say of themselves."""
        row = self.history.rows[-1] if self.history.rows else None
        return {
            "stochca": stochca.__version__,
            "model": self.options.model,
            "model_kwargs": target_kwargs(self.options, self.num_classes),
            "norm_eps": norm_eps(self.model.target),
            "num_classes": self.num_classes,
            "classes": self.data.classes,
            "data_config": self.data_config,
            "step": self.step,
            "metrics": {name: row[name] for name in ("step", "val_loss", "top1", "top5")} if row else None,
        }

    def _check_unchanged(self, state: dict[str, Any]) -> None:
        if changed := changed_options(state["options"], self.options):
            raise ValueError(f"a resumed run keeps its options, but {'; '.join(changed)}")
        if state["world_size"] != self.world.size:
            raise ValueError(
                f"the run to resume has {state['world_size']} processes with batches of "
                f"{self.options.batch_size}, this one would have {self.world.size}"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        check_classes(state["classes"], self.data.classes, "the dataset", "the run to resume")
        if state["train_images"] != len(self.loader.dataset):
            raise ValueError(
                f"the run to resume has {state['train_images']} training images, "
                f"the dataset now has {len(self.loader.dataset)}"
            )
        if state["source_digest"] != self.source_digest:
            raise ValueError(
                f"the weights that {self.options.model} starts from are not those of the run to resume, "
                "so its frozen source cannot be restored"
            )
        complaint = f"{self.output / files.STATE} does not fit {self.options.model}"
        files.check_state_dict(self.model.target, state["model"], complaint)
        try:
            self._restore_parts(state)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{complaint}: {error}") from error

    def _restore_parts(self, state: dict[str, Any]) -> None:
        distributed.load_model_state(self.model.target, state["model"])
        distributed.load_model_state(self.objective.losses, state["losses"])
        if self.average is not None:
            distributed.load_model_state(self.average.module, state["average"])
        if self.swad is not None:
            self.swad.restore(state["swad"], self.device)
        distributed.load_optimizer_state(self.module, self.optimizer, state["optimizer"])
        files.check_optimizer(self.optimizer)
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = state["step"]
        self.model.coins.step = state["coin_step"]
        self.history.rows = state["history"]
        self.running.restore(state["running"][self.world.rank])
        files.set_rng_state(state["rng"][self.world.rank])
        if self.world.is_primary:
            files.save_derived(self.output, state, self.history.best_step, self._metadata())

    def _bar(self) -> tqdm:
        # disable=None: no bar where nobody looks, as in a log file.
        disable = None if self.world.is_primary else True
        return tqdm(
            total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True, disable=disable
        )


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Fine-tune a timm Vision Transformer with StochCA, in all processes that `torchrun` started.

    Args:
        options: Of the run.

    Returns:
        A summary of `output`, `steps`, `best_step`, `best_top1` and `last_top1` (percent), `test_top1`,
        `test_top5` and `test_loss` of the best checkpoint where there is a test split, `images_per_second`,
        `source_fraction` (of the source's blocks, the mean that ran) and `skipped` (unreadable images).

    Raises:
        Interrupted: A signal stopped the run, which is saved.
        FileNotFoundError: Missing data, or nothing to resume.
        FileExistsError: The output folder holds a run.
        ValueError: An option, the data or the state to resume from does not fit; or a step runs out of
            memory, with what would fit.
    """
    with processes(options.device) as world:
        return Trainer(options, world).run()
