"""One process or several: the device of each, what they agree on, and how a module is spread over them."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Distribute = Literal["ddp", "fsdp"]

# Whole tensors, on the CPU of the first process.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class World(NamedTuple):
    """The processes of a run.

    Args:
        device: Of this one.
        rank: Its number.
        size: How many there are.
        control: The group in which they agree on what is on their CPUs, None for a single process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def is_primary(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def any(self, flag: object) -> bool:
        """Whether a flag is set in any process; all have to ask."""
        if self.size == 1:
            return bool(flag)
        flags = torch.tensor([int(bool(flag))])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The objects of all processes, in their order; empty in all but the first."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_primary else None
        dist.gather_object(value, values, group=self.control)
        return values or []

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier(group=self.control)


def was_restarted() -> bool:
    """Whether `torchrun --max-restarts` has started this process again, after one of all had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def processes(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` or Slurm started; without them, be the only one.

    Args:
        device: As `--device` has it. Of several processes each takes the GPU of its local rank.

    Raises:
        ValueError: The device is not there.
    """
    resolved = resolve_device(device)
    if not is_distributed_env():
        yield World(resolved)
        return
    if dist.is_initialized():  # by whoever calls this from a program of their own
        yield _world(resolved)
        return
    init_distributed_device_so(resolved.type)
    try:
        yield _world(resolved)
    finally:
        dist.destroy_process_group()


def _world(device: torch.device) -> World:
    if device.type != "cpu":
        local_rank = dist.get_node_local_rank(fallback_rank=0)
        device = resolve_device(f"{device.type}:{local_rank}")
        torch.accelerator.set_device_index(local_rank)
    return World(device, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind, count = (accelerator.type, torch.accelerator.device_count()) if accelerator else ("", 0)
    try:
        device = torch.device((kind or "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device: {error}") from error
    if device.type != "cpu" and (device.type != kind or (device.index or 0) >= count):
        held = f"cpu and {kind}, {count} of it" if kind else "cpu alone"
        raise ValueError(f"--device {name} is not there, this machine has {held}")
    return device


def distribute(module: nn.Module, how: Distribute, world: World) -> nn.Module:
    """Spread a module over the processes.

    Args:
        module: On the device; equal in all processes.
        how: "ddp" gives each process the whole module; "fsdp" a part of its weights, gradients and optimizer
            state, which are put together for the whole of a step: one group, as the blocks of a target do not
            run as modules.
        world: The processes. A single one needs no "ddp".
    """
    if how == "fsdp":
        if not dist.is_initialized():
            raise ValueError("--distribute fsdp needs processes that torchrun started, be it one")
        fully_shard(module)  # in place
        return module
    if world.size == 1:
        return module
    ids = None if world.device.type == "cpu" else [world.device]
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def accumulating(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Leave the gradients of all but the last batch of a step to each process."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    if isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Put the weights of a module together, for a forward of one of its parts."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def model_state(module: nn.Module) -> dict[str, Any]:
    """The state dict of a module, in whole tensors where it is sharded; then empty in all but the first."""
    return get_model_state_dict(module, options=_WHOLE) if is_sharded(module) else module.state_dict()


def load_model_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `model_state` returned."""
    if is_sharded(module):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of a module's parameters, as `model_state`."""
    if not is_sharded(module):
        return optimizer.state_dict()
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def load_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state` returned."""
    if is_sharded(module):
        whole_state = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(module, optimizer, dict(state), options=whole_state)
    else:
        optimizer.load_state_dict(dict(state))


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are spread over the processes, even if put together right now."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
