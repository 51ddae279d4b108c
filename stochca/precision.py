"""The dtype that products are computed in, and a frozen source that is held in it from the start."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from stochca.vit import TimmViT

SourceDtype = Literal["float32", "bfloat16", "float16", "float8"]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes `x`: autocast's, or its own."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def hold_weights(source: TimmViT, dtype: SourceDtype) -> None:
    """Cast the weights of a frozen model's linear and convolution layers, once and in place.

    Autocast casts weights that require no grad again in every call; these it leaves as they are, with the
    same results bit for bit. Norms and embeddings keep their dtype, as the residual stream does.

    Args:
        source: A frozen timm model on the device where it will run.
        dtype: "float8" holds the output projection and the MLP of each block in float8 (e4m3, one scale per
            row, activations scaled row by row as they come), the rest in bfloat16: keys and values are
            products in bfloat16, of tokens that float8 has passed through. Needs torchao, and on a GPU
            compute capability 8.9; on a CPU it is emulated, slowly.

    Raises:
        ValueError: float8 does not run on this GPU, or with these widths.
        ImportError: torchao is missing.
    """
    compute = torch.bfloat16 if dtype == "float8" else getattr(torch, dtype)
    for module in source.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(compute)
    if dtype == "float8":
        _to_float8(source)


def check_arithmetic(source: TimmViT, images: Tensor) -> None:
    """Refuse images that meet weights held in another dtype.

    Raises:
        ValueError: With both dtypes.
    """
    held, met = source.blocks[0].attn.qkv.weight.dtype, product_dtype(images)
    if met != held:
        raise ValueError(
            f"the source holds its weights in {held}, but this step computes in {met}: "
            f"use torch.autocast with {held}, or another source_dtype"
        )


def _to_float8(source: TimmViT) -> None:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise ImportError('a source in float8 needs torchao: pip install "stochca[float8]"') from error

    def is_converted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "qkv" not in name

    widths = {
        side
        for name, module in source.blocks.named_modules()
        if is_converted(module, name)
        for side in module.weight.shape
    }
    if odd := sorted(side for side in widths if side % 16):
        raise ValueError(f"float8 needs widths that 16 divides, the source has {odd}")
    device = source.blocks[0].attn.qkv.weight.device
    if device.type == "cuda":
        if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            raise ValueError(f"float8 needs compute capability 8.9, this GPU has {capability}")
        quantize_(
            source.blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), is_converted
        )
    else:
        rowwise = Float8LinearConfig.from_recipe_name("rowwise")
        emulated = dataclasses.replace(rowwise, emulate=True)
        convert_to_float8_training(source.blocks, config=emulated, module_filter_fn=is_converted)
