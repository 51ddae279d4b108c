"""LoRA layers of peft in a target: their rows apart, and a source that shares the weights below them."""

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def is_adapted(layer: Any) -> bool:
    """Whether a layer is one of peft's LoRA layers."""
    lora = sys.modules.get("peft.tuners.lora")  # no module of it exists before it is imported
    return lora is not None and isinstance(layer, lora.LoraLayer)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has LoRA layers."""
    return any(is_adapted(module) for module in model.modules())


def check_adapter(name: str, layer: Any) -> None:
    """Refuse a LoRA layer of which rows cannot be computed apart.

    Raises:
        TypeError: Its base is no plain linear layer.
        ValueError: It is of a variant other than LoRA's product of two matrices.
    """
    if type(layer.base_layer) is not nn.Linear:
        raise TypeError(f"{name} adapts a {type(layer.base_layer).__name__}, wanted a plain Linear")
    variants = sorted(type(variant).__name__ for variant in layer.lora_variant.values())
    if variants:
        raise ValueError(f"{name} is a LoRA of another kind ({', '.join(variants)}), wanted the plain one")


def project_rows(layer: Any, x: Tensor, rows: slice) -> Tensor:
    """What some rows of a LoRA layer make of tokens `[B, N, C]`, as the layer itself computes all of them."""
    base = layer.base_layer
    out = F.linear(x, base.weight[rows], None if base.bias is None else base.bias[rows])
    for a, b, dropout, scaling in _active(layer):
        low = a(dropout(x.to(a.weight.dtype)))
        change = F.linear(low, b.weight[rows], None if b.bias is None else b.bias[rows])
        out = out + (change * scaling).to(out.dtype)
    return out


def is_one_product(layer: Any) -> bool:
    """Whether a LoRA layer is one matrix, as it is without dropout between the tokens and its own two."""
    return all(
        isinstance(dropout, nn.Identity) or not dropout.training for _, _, dropout, _ in _active(layer)
    )


def merged_rows(layer: Any, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some rows of a LoRA layer that is one product."""
    weight, bias = layer.base_layer.weight[rows], layer.base_layer.bias
    bias = None if bias is None else bias[rows]
    for a, b, _, scaling in _active(layer):
        weight = weight + (b.weight[rows] @ a.weight * scaling).to(weight.dtype)
        if b.bias is not None:
            change = b.bias[rows] * scaling
            bias = change if bias is None else bias + change
    return weight, bias


def add_adapters(target: Any, names: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Give layers of the blocks low-rank adapters, which are trained with the classifier and nothing else.

    Args:
        target: A timm model, changed in place.
        names: Last names of the layers; those that the model has.
        rank: Of the two matrices.
        alpha: What they add is multiplied by `alpha / rank`.
        dropout: Of the tokens that they see.

    Raises:
        ImportError: peft is missing.
        ValueError: No layer has such a name.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "stochca[lora]"') from error
    pattern = rf"blocks\..*\.({'|'.join(map(re.escape, names))})"
    linear = {name for name, module in target.named_modules() if isinstance(module, nn.Linear)}
    if not any(re.fullmatch(pattern, name) for name in linear):
        found = sorted({name.rpartition(".")[2] for name in linear if name.startswith("blocks.")})
        raise ValueError(f"no layer of the blocks has one of the names {list(names)}; they have {found}")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    peft.inject_adapter_in_model(config, target)
    heads = target.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of the plain model with what the adapters of `add_adapters` have learned.

    Args:
        state: Of the model with adapters; another one is returned as it is.
        scale: `alpha / rank`.
    """
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        plain, layer = name.replace(".base_layer.", "."), name.removesuffix(".base_layer.weight")
        if layer != name and (a := state.get(f"{layer}.lora_A.default.weight")) is not None:
            b = state[f"{layer}.lora_B.default.weight"]
            tensor = (tensor.double() + scale * (b.double() @ a.double())).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def base_model(target: nn.Module) -> Any:
    """The model below the adapters, which shares every tensor with `target` that is not trained.

    Args:
        target: A timm model with LoRA layers, whose base weights may not be trained or merged with adapters
            from here on.

    Returns:
        A model of the same kind without LoRA layers. What is trained beside them, as it is now, is copied.

    Raises:
        ValueError: An adapter is merged into the base weights.
    """
    for name, module in target.named_modules():
        if is_adapted(module) and module.merged:
            raise ValueError(f"{name} has its adapter merged into its weight: unmerge it first")
    shared = {id(p): p for p in target.parameters() if not p.requires_grad}
    return _unwrapped(copy.deepcopy(target, shared), _below)


def merged_model(target: nn.Module) -> Any:
    """A copy of a timm model with LoRA layers as a plain one, with what they have learned in its weights."""
    return _unwrapped(copy.deepcopy(target), _merged)


def shares_weights(target: nn.Module, source: nn.Module) -> bool:
    """Whether a tensor is in both models."""
    own = {id(p) for p in target.parameters()}
    return any(id(p) in own for p in source.parameters())


def _unwrapped(model: nn.Module, unwrap: Callable[[Any], nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            setattr(parent, name, unwrap(module))
    return model


def _below(module: Any) -> nn.Module:
    """The module that peft has wrapped, or the module itself."""
    if is_adapted(module):
        return module.get_base_layer()
    # What is trained beside the adapters ("modules_to_save") lies beside its original.
    return getattr(module, "original_module", module)


def _merged(module: Any) -> nn.Module:
    """The module that computes the same without peft."""
    if is_adapted(module):
        module.merge()
        return module.get_base_layer()
    trained = getattr(module, "modules_to_save", None)
    return module if trained is None else trained[module.active_adapters[0]]


def _active(layer: Any) -> Iterator[tuple[nn.Linear, nn.Linear, nn.Module, float]]:
    """Both matrices, the dropout and the scale of each adapter that acts."""
    if layer.disable_adapters or layer.merged:
        return
    for name in layer.active_adapters:
        if name in layer.lora_A:
            yield layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
