"""Keep for the backward how a tensor is computed, where that is cheap, instead of the tensor."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import GELUTanh, QuickGELU
from torch import Tensor, nn

from stochca.precision import product_dtype
from stochca.qkv import AnyAttention, Rope, is_linear, key, key_value, value
from stochca.vit import AnyBlock
from stochca_kernels import Projection
from stochca_kernels.projection import KV, pair_of

# Activations whose backward reads their input, which is therefore kept anyway.
_FROM_INPUT = (nn.GELU, GELUTanh, QuickGELU, nn.SiLU)


class Recomputation:
    """A context in which autograd keeps recipes instead of tensors, for those tensors that have one.

    The outputs of the norms and activation functions of `blocks` have one: the module and its input, which
    autograd keeps anyway. Others get theirs by `instead_of`. The gradients are the same bit for bit. A module
    with forward hooks is left alone. Of nested hooks on saved tensors torch runs the innermost alone: hooks
    around this context do not see what is saved within it.

    Args:
        blocks: timm's blocks. While the context is active their norms return, under autocast, what the one
            linear layer that follows would cast their output to.
    """

    def __init__(self, blocks: Iterable[AnyBlock] = ()) -> None:
        self._recipes: dict[int, _Recipe] = {}
        self._active = ExitStack()
        self._watched: list[tuple[nn.Module, bool]] = []
        for block in blocks:
            self._watched += [
                (block.norm1, True),
                (block.norm2, type(getattr(block.mlp, "fc1", None)) is nn.Linear),
            ]
            activation = getattr(block.mlp, "act", None)
            self._watched += [(activation, False)] if isinstance(activation, _FROM_INPUT) else []

    def __enter__(self) -> "Recomputation":
        self._active.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        for module, is_cast in self._watched:
            if not module._forward_hooks:
                self._active.callback(module.register_forward_hook(partial(self._note, is_cast)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._active.close()
        self._recipes.clear()

    def instead_of(
        self,
        tensors: Iterable[Tensor],
        compute: Callable[..., Tensor],
        *inputs: Tensor,
        weights: Iterable[Tensor] = (),
    ) -> None:
        """Give a recipe to tensors that are views of one storage.

        Args:
            tensors: They have to live until autograd has saved them, or lose the recipe.
            compute: Returns a tensor whose storage has the same content. Runs in the backward, under the
                autocast of now.
            inputs: What it is called with, and what is kept.
            weights: What it reads besides, and nobody may change before the backward.

        Raises:
            ValueError: The tensors are not of one storage.
        """
        tensors = list(tensors)
        recipe = _Recipe(compute, inputs, weights, tensors[0])
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        if len(keys) > 1:
            raise ValueError(f"a recipe is for tensors of one storage, got {len(keys)} storages")
        (key,) = keys
        self._recipes[key] = recipe
        for tensor in tensors:
            # Once a tensor dies its storage may be that of another.
            recipe.alive.append(weakref.ref(tensor, lambda _: self._recipes.pop(key, None)))

    def of_pair(self, source_kv: KV, attn: AnyAttention, x: Tensor, rope: Rope) -> None:
        """Give recipes to the source's keys and values; a `Projection` is one already.

        Args:
            source_kv: What `stochca.qkv.key_value` returned, or the pair that it stands for.
            attn: The source's attention.
            x: Its normalised tokens, `[B, N, C]`.
            rope: Its rotary embedding.
        """
        if source_kv is None or isinstance(source_kv, Projection):
            return
        weights = list(attn.parameters())
        if is_linear(attn, rope):  # both are of one storage
            self.instead_of(
                source_kv, lambda x: pair_of(key_value(attn, x), attn.num_heads)[0], x, weights=weights
            )
            return
        k, v = source_kv
        self.instead_of([k], lambda x: key(attn, x, rope), x, weights=weights)
        self.instead_of([v], lambda x: value(attn, x), x, weights=weights)

    def _note(self, is_cast: bool, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if output.untyped_storage()._cdata == x.untyped_storage()._cdata:
            return output
        output = output.to(product_dtype(output)) if is_cast else output
        dtype = output.dtype
        weights = module.parameters()
        self.instead_of([output], lambda x: module.forward(x).to(dtype), x, weights=weights)
        return output

    def _pack(self, tensor: Tensor) -> "_Saved":
        recipe = self._recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.version != tensor._version:
            # Detached: a node that keeps its own output would never be freed.
            return _Saved(_Versions([tensor.detach()]))
        recipe.waiting += 1
        return _Saved(recipe.versions, recipe, (tensor.size(), tensor.stride(), tensor.storage_offset()))


class _Versions:
    """Tensors as they are now, which may not be changed in place before they are read again."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.versions = [tensor._version for tensor in self.tensors]

    def check(self) -> None:
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace "
                    f"operation: a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}, "
                    f"expected version {version}"
                )


class _Recipe:
    """How to compute a storage once for all tensors that were saved in it."""

    def __init__(
        self,
        compute: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        weights: Iterable[Tensor],
        tensor: Tensor,
    ) -> None:
        self.compute, self.inputs, self.version = compute, inputs, tensor._version
        self.versions = _Versions([*inputs, *weights])
        self.alive: list[weakref.ref[Tensor]] = []
        self.waiting = 0
        self.result: Tensor | None = None
        kind = tensor.device.type
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if kind != "meta":
            enabled = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if enabled else None
            self.autocast = partial(torch.autocast, kind, dtype, enabled=enabled)

    def __call__(self) -> Tensor:
        if self.result is None:
            with torch.no_grad(), self.autocast():
                self.result = self.compute(*self.inputs)
        result, self.waiting = self.result, self.waiting - 1
        if self.waiting <= 0:
            self.result = None
        return result


class _Saved(NamedTuple):
    """What autograd keeps of a tensor.

    Args:
        versions: The tensor, or what its recipe reads.
        recipe: How to compute its storage.
        layout: Size, stride and offset in that.
    """

    versions: _Versions
    recipe: _Recipe | None = None
    layout: tuple[Any, ...] = ()


def _unpack(saved: _Saved) -> Tensor:
    saved.versions.check()
    if saved.recipe is None:
        return saved.versions.tensors[0]
    return saved.recipe().as_strided(*saved.layout)
