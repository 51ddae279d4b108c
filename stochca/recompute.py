"""Keep for the backward how a tensor is computed, where that is cheap, instead of the tensor."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stochca.precision import product_dtype


class Recomputation:
    """A context in which autograd keeps recipes instead of tensors, for those tensors that have one.

    The outputs of the norms and activation functions of `blocks` have one: the module and its input, which
    autograd keeps anyway. Others get theirs by `instead_of`. The gradients are the same bit for bit.

    Args:
        blocks: timm's blocks. While the context is active their norms return, under autocast, what the
            linear layers that follow would cast their output to.
    """

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self._recipes: dict[int, _Recipe] = {}
        self._active = ExitStack()
        self._watched: list[tuple[nn.Module, bool]] = []
        for block in blocks:
            activation = getattr(block.mlp, "act", None)
            self._watched += [(block.norm1, True), (block.norm2, True)]
            self._watched += [(activation, False)] if activation is not None else []

    def __enter__(self) -> "Recomputation":
        self._active.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        for module, is_norm in self._watched:
            self._active.callback(module.register_forward_hook(partial(self._note, is_norm)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._active.close()
        self._recipes.clear()

    def instead_of(self, tensors: Iterable[Tensor], compute: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Give a recipe to tensors that are views of one storage.

        Args:
            tensors: They have to live until autograd has saved them, or lose the recipe.
            compute: Returns a tensor whose storage has the same content. Runs in the backward, under the
                autocast of now.
            inputs: What it is called with, and what is kept.
        """
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            # Once a tensor dies its storage may be that of another.
            alive = weakref.ref(tensor, lambda _, key=key: self._recipes.pop(key, None))  # type: ignore[misc]
            recipe = self._recipes.setdefault(key, _Recipe(compute, inputs, tensor))
            recipe.tensors.append(alive)

    def _note(self, is_norm: bool, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if output.untyped_storage()._cdata == x.untyped_storage()._cdata:
            return output
        output = output.to(product_dtype(output)) if is_norm else output
        dtype = output.dtype
        self.instead_of([output], lambda x: module.forward(x).to(dtype), x)
        return output

    def _pack(self, tensor: Tensor) -> Any:
        recipe = self._recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.version != tensor._version:
            return tensor.detach()  # a node that keeps its own output would never be freed
        recipe.waiting += 1
        return recipe, (tensor.size(), tensor.stride(), tensor.storage_offset())


class _Recipe:
    """How to compute a storage once for all tensors that were saved in it."""

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], tensor: Tensor) -> None:
        self.compute, self.inputs, self.version = compute, inputs, tensor._version
        kind = tensor.device.type
        enabled = kind != "meta" and torch.is_autocast_enabled(kind)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if enabled:
            self.autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind))
        self.tensors: list[weakref.ref[Tensor]] = []
        self.waiting = 0
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.result is None:
            with torch.no_grad(), self.autocast():
                self.result = self.compute(*self.inputs)
        result, self.waiting = self.result, self.waiting - 1
        if self.waiting <= 0:
            self.result = None
        return result


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, layout = kept
    return recipe().as_strided(*layout)
