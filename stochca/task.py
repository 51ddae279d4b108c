"""StochCA as a task of timm's own training engine. Needs timm 1.0.31."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask, resolve_classification_loss
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochca.model import StochCA
from stochca.objective import Objective


class StochCATask(TrainingTask):
    """Fine-tune with StochCA in timm's engine: `task(input, target)["loss"].backward()`.

    What timm evaluates, averages and saves is the plain target; checkpoints hold the position in the stream
    of coins and the state of the losses as task state. An optimizer of `get_trainable_module()`, as timm has
    it, knows the target's layer decay and its exceptions from weight decay, but no `lr_mult` of a loss.

    Args:
        model: Target and source.
        criterion: Made of `criterion_kwargs` by timm's `create_classification_loss` if None.
        criterion_kwargs: See there: `dict(smoothing=0.1)`, ...
        losses: Added to the criterion, see `stochca.losses.create_losses`.
        device: Of the task; the model is to be there.
        dtype: Of the task's own tensors.
        verbose: Let timm log what it makes.

    Source: timm, `timm.task`.
    """

    def __init__(
        self,
        model: StochCA,
        criterion: nn.Module | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        losses: Iterable[nn.Module] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.trainable_module: nn.Module = Objective(model, criterion, losses).to(self.device)

    @property
    def objective(self) -> Objective:
        """The loss, whatever it is wrapped in."""
        return unwrap_model(self.trainable_module)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "StochCATask":
        """Wrap the objective in `DistributedDataParallel`, whose arguments these are.

        All processes get the source of the first, as they get its target, and the coins of the joined batch.
        """
        model = self.objective.model
        for tensor in model.source.state_dict().values():
            dist.broadcast(tensor, 0)
        model.coins.spread(dist.get_rank(), dist.get_world_size())
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile the step of a block, see `StochCA.compile`, and the target as a whole for evaluation.

        Names of parameters and checkpoints stay as they are.
        """
        model = self.objective.model
        model.compile(backend=backend, mode=mode, **kwargs)
        evaluated: Any = torch.compile(model.target, backend=backend, mode=mode, **kwargs)
        self.eval_model = evaluated
        return evaluated

    def setup_ema(
        self,
        decay: float = 0.9999,
        use_warmup: bool = False,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Average the target alone."""
        target = self.objective.model.target
        self.trainable_module_ema = ModelEmaV3(
            target, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Update the average from the target."""
        if self.has_ema():
            self.trainable_module_ema.update(self.objective.model.target, step=step)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Of the target, without its classifier if asked, and of the losses."""
        objective = self.objective
        classifier = objective.model.get_classifier()  # distilled models have two, in a tuple
        heads = nn.ModuleList(classifier if isinstance(classifier, tuple) else (classifier,))
        left_out = {id(p) for p in heads.parameters()} if exclude_head else set()
        return [p for p in objective.parameters() if id(p) not in left_out]

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The plain target, or its average; compiled once `compile` or `compile_ema` was called."""
        resolved = super().get_eval_model(module=module, ema=ema)
        objective = unwrap_model(resolved)
        return objective.model.target if isinstance(objective, Objective) else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The step of the coins, and the state of the losses."""
        objective = self.objective
        return {} if ema else {"coins": objective.model.coins.step, "losses": objective.losses.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore what `get_task_state` returned."""
        if state and not ema:
            self.objective.model.coins.step = state["coins"]
            self.objective.losses.load_state_dict(state["losses"], strict=strict)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        return self.trainable_module(input, target)
