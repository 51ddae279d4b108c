"""Mistakes with models, sources, probabilities and coins."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch

from stochca import StochCA
from tests.models import make_images, make_target
from tests.scorecard.mistakes import Mistake

_target = partial(make_target, depth=2, dtype=torch.float32)


def mistakes() -> Iterator[Mistake]:
    """Models that cannot be driven, pairs that differ, options and coins that are none."""
    yield from _models()
    yield from _pairs()
    yield from _options()
    yield from _steps()


def _models() -> Iterator[Mistake]:
    for name, error, message in (
        ("resnet18", TypeError, "drives timm's VisionTransformer, NaFlexVit and Eva, got ResNet"),
        (
            "swin_tiny_patch4_window7_224",
            TypeError,
            "VisionTransformer, NaFlexVit and Eva, got SwinTransformer",
        ),
        ("beit_base_patch16_224", TypeError, "VisionTransformer, NaFlexVit and Eva, got Beit"),
        (
            "eva02_enormous_patch14_clip_224",
            TypeError,
            "block 0 is a EvaBlockPostNorm; .* Block and EvaBlock",
        ),
        ("vit_relpos_small_patch16_224", TypeError, "got VisionTransformerRelPos"),
    ):
        yield Mistake(name, partial(_on_meta, name), error, message)
    yield Mistake(
        "post-norm", lambda: StochCA(_target(block_fn=timm.models.vision_transformer.ResPostBlock)),
        TypeError, "block 0 is a ResPostBlock; StochCA drives timm's Block and EvaBlock",
    )  # fmt: skip
    yield Mistake(
        "differential attention", lambda: StochCA(_target(attn_layer="diff")),
        TypeError, "attention 0 is a DiffAttention; StochCA drives timm's Attention",
    )  # fmt: skip
    yield Mistake("no model", lambda: StochCA("vit_tiny_patch16_224"), TypeError, "Eva, got str")  # type: ignore[arg-type]
    yield Mistake(
        "patch dropout", lambda: StochCA(_target(patch_drop_rate=0.1)), ValueError, "Use patch_drop_rate=0"
    )
    yield Mistake(
        "head size", lambda: StochCA(_target(embed_dim=60)), ValueError, "16 to 128 in steps of 8, got 20"
    )
    yield Mistake(
        "unknown model",
        lambda: StochCA.from_timm("vit_gigantic"),
        RuntimeError,
        "Unknown model .vit_gigantic",
    )
    yield Mistake(
        "compiled model", lambda: StochCA(torch.compile(_target())), TypeError,
        r"got OptimizedModule: .*compile\(\)",
    )  # fmt: skip


def _on_meta(name: str) -> object:
    with torch.device("meta"):
        return StochCA(timm.create_model(name))


def _pairs() -> Iterator[Mistake]:
    for name, kwargs, message in (
        ("depth", {"depth": 3}, "depth: target 2, source 3"),
        ("width", {"embed_dim": 96}, "width: target 48, source 96"),
        ("heads", {"num_heads": 1}, "heads: target 3, source 1"),
        ("tokens", {"reg_tokens": 2}, "prefix tokens: target 1, source 3"),
        ("patches", {"patch_size": 4}, r"patch size: target \(8, 8\), source \(4, 4\)"),
        ("channels", {"in_chans": 1}, "input channels: target 3, source 1"),
        ("norm of keys", {"qk_norm": True}, "norm of keys: target Identity, source LayerNorm"),
        ("norm", {"norm_layer": "rmsnorm"}, "norm: target LayerNorm, source RmsNorm"),
    ):
        yield Mistake(name, partial(_pair, **kwargs), ValueError, message)
    yield Mistake("source is the target", _twice, ValueError, "source is the target itself: pass a copy")
    yield Mistake(
        "source is a name",
        lambda: StochCA(_target(), "vit_tiny"),
        TypeError,
        "Eva, got str",  # type: ignore[arg-type]
    )


def _pair(**kwargs: Any) -> object:
    return StochCA(_target(), _target(**kwargs))


def _twice() -> object:
    target = _target()
    return StochCA(target, target)


def _options() -> Iterator[Mistake]:
    target = _target()

    def mistake(name: str, error: type[Exception], message: str, **options: Any) -> Mistake:
        return Mistake(name, lambda: StochCA(target, **options), error, message)

    for p, message in (
        (-0.1, "p must be between 0 and 1, got -0.1"),
        (1.5, "p must be between 0 and 1, got 1.5"),
        (float("nan"), "p must be between 0 and 1, got nan"),
        ([0.1, None], r"p must be .* got \[0.1, None\]"),
        ("0.1", "p must be .* got '0.1'"),
        ("half", "p must be .* got 'half'"),
        ([0.1, 0.2, 0.3], r"p must be a number or one per block \(2\), got shape \(3,\)"),
        ([[0.1, 0.2]], r"p must be a number or one per block \(2\), got shape \(1, 2\)"),
        ({"p": 0.1}, "p must be .* got {'p': 0.1}"),
        (lambda step: 2.0, "p must be between 0 and 1, got 2.0"),
    ):
        yield mistake(f"p is {p}", ValueError, message, p=p)
    yield mistake("per", ValueError, r"per must be one of \('batch', 'sample'\), got 'image'", per="image")
    yield mistake("mode", ValueError, "mode must be one of .* got 'both'", mode="both")
    yield mistake("rng", ValueError, "rng must be one of .* got 'cuda'", rng="cuda")
    yield mistake("official per sample", ValueError, 'use per="batch"', rng="official", per="sample")
    yield mistake("seed", ValueError, "seed must not be negative, got -1", seed=-1)
    yield mistake("impl", ValueError, "impl must be one of .* got 'magic'", impl="magic")
    yield mistake(
        "source_dtype", ValueError, "source_dtype must be one of .* got 'int8'", source_dtype="int8"
    )


def _steps() -> Iterator[Mistake]:
    model, images = StochCA(_target()).train(), make_images(dtype=torch.float32)

    def mistake(name: str, error: type[Exception], message: str, call: Callable[[], object]) -> Mistake:
        return Mistake(name, call, error, message)

    coin = torch.ones(2, dtype=torch.bool)
    yield mistake(
        "images of three axes",
        ValueError,
        r"shape \(B, C, H, W\), got \(3, 24, 24\)",
        lambda: model(images[0]),
    )
    yield mistake(
        "images in a dict", TypeError, "images must be a tensor .* got dict", lambda: model({"image": images})
    )
    yield mistake(
        "too few coins", ValueError, r"one entry per block \(2\), got 1", lambda: model(images, coins=[True])
    )
    yield mistake("coins are numbers", TypeError, "got int", lambda: model(images, coins=[1, 0]))
    yield mistake(
        "coins of floats", ValueError, "got torch.float32", lambda: model(images, coins=[coin.float(), True])
    )
    yield mistake(
        "coins of another batch",
        ValueError,
        r"shape \(2,\), got torch.bool of shape \(1,\)",
        lambda: model(images, coins=[coin[:1], True]),
    )
    yield mistake(
        "coins elsewhere",
        ValueError,
        "on cpu, got .*on meta",
        lambda: model(images, coins=[coin.to("meta"), True]),
    )
    yield mistake(
        "a mask in training",
        TypeError,
        "takes no attn_mask in training",
        lambda: model(images, attn_mask=coin),
    )
    yield mistake(
        "a tap outside",
        ValueError,
        r"taps must be from 0 to the depth of the model \(2\), got \(3,\)",
        lambda: model.forward_step(images, taps=[3]),
    )
    yield mistake(
        "weights of another model",
        RuntimeError,
        "size mismatch for target.head.weight",
        lambda: model.load_state_dict(StochCA(_target(num_classes=3)).state_dict()),
    )
