"""The dtype that products are computed in, and a frozen source that is held in it from the start."""

import dataclasses
import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochca.vit import TimmViT

SourceDtype = Literal["float32", "bfloat16", "float16", "float8"]

# Of queries, keys and values, in one weight or in three.
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes `x`: autocast's, or its own."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def check_arithmetic(dtype: SourceDtype, images: Tensor) -> None:
    """Refuse a step that computes in another dtype than the source is to be held in.

    Raises:
        ValueError: With both dtypes.
    """
    wanted, met = _product_dtype_of(dtype), product_dtype(images)
    if met != wanted:
        raise ValueError(
            f'source_dtype="{dtype}" is for steps in {wanted}, but this one computes in {met}: '
            f"use torch.autocast with {wanted}, or another source_dtype"
        )


def check_float8(source: TimmViT) -> None:
    """Refuse early what float8 cannot be made of.

    Raises:
        ImportError: torchao is missing.
        ValueError: 16 does not divide all widths.
    """
    _torchao()
    widths = {
        side
        for name, module in source.blocks.named_modules()
        if _becomes_float8(module, name)
        for side in module.weight.shape
    }
    if odd := sorted(side for side in widths if side % 16):
        raise ValueError(f"float8 needs widths that 16 divides, the source has {odd}")


def hold_weights(source: TimmViT, dtype: SourceDtype) -> None:
    """Cast the weights of a frozen model's linear and convolution layers, once and in place.

    Autocast casts weights that require no grad again in every call; these it leaves as they are, with the
    same results bit for bit. Norms and embeddings keep their dtype, as the residual stream does.

    Args:
        source: A frozen timm model on the device where it will run.
        dtype: "float8" holds the output projection and the MLP of each block in float8 (e4m3, one scale per
            row, activations scaled row by row as they come), the rest in bfloat16: keys and values are
            products in bfloat16, of tokens that float8 has passed through. Needs torchao, and on a GPU
            compute capability 8.9; on a CPU its rounding is emulated, slowly.

    Raises:
        ValueError: float8 does not run on this GPU, or with these widths.
        ImportError: torchao is missing.
    """
    for module in source.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(_product_dtype_of(dtype))
    if dtype == "float8":
        check_float8(source)
        _to_float8(source)


def _to_float8(source: TimmViT) -> None:
    quantization, float8 = _torchao()
    device = next(source.blocks.parameters()).device
    if device.type == "cuda":
        if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            raise ValueError(f"float8 needs compute capability 8.9, this GPU has {capability}")
        rowwise = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(source.blocks, rowwise, _becomes_float8)
        return
    emulated = dataclasses.replace(
        float8.Float8LinearConfig.from_recipe_name("rowwise"), emulate=True, round_scales_to_power_of_2=False
    )
    float8.convert_to_float8_training(source.blocks, config=emulated, module_filter_fn=_becomes_float8)


def _becomes_float8(module: nn.Module, name: str) -> bool:
    """Whether a module of the blocks is one of those that compute in float8, and does not yet."""
    is_plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_plain and not name.endswith(_PROJECTIONS)


def _product_dtype_of(dtype: SourceDtype) -> torch.dtype:
    return torch.bfloat16 if dtype == "float8" else getattr(torch, dtype)


def _torchao() -> tuple[Any, Any]:
    try:
        return importlib.import_module("torchao.quantization"), importlib.import_module("torchao.float8")
    except ImportError as error:
        raise ImportError('a source in float8 needs torchao: pip install "stochca[float8]"') from error
