"""A source need not be what the target was: another checkpoint, normalisation, or size of images."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from stochca import StochCA
from tests import plain
from tests.models import make_images, make_target, perturb

SMALL, LARGE = 24, 40
COINS = list(itertools.product([False, True], repeat=3))
SHAPE = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def make_pair(size=SMALL, source_size=LARGE, name="vit_tiny_patch16_224", **kwargs):
    target = make_target(name, img_size=size, **SHAPE, **kwargs)
    source = make_target(name, img_size=source_size, **SHAPE, **kwargs)
    perturb(source, seed=5)
    return target, source


def resized(images, size):
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("sizes", [(SMALL, LARGE), (LARGE, SMALL)], ids=["more-tokens", "fewer-tokens"])
@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"global_pool": "avg"}], ids=str)
def test_a_source_of_another_image_size_sees_the_images_in_that_size(sizes, kwargs, impl):
    size, source_size = sizes
    model = StochCA(*make_pair(size, source_size, **kwargs), impl=impl).train()
    images = make_images(size=size)
    for coins in COINS:
        out = model(images, coins=coins)
        expected = plain.logits(
            model.target, model.source, images, coins, source_images=resized(images, source_size)
        )
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grads, wanted = plain.gradients(model.target, out), plain.gradients(model.target, expected)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-10)


def test_a_coin_per_sample_chooses_between_pairs_of_different_length():
    model = StochCA(*make_pair()).train()
    images = make_images(batch=3)
    coins = list((torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.5).unbind(0))
    expected = plain.logits(model.target, model.source, images, coins, source_images=resized(images, LARGE))
    torch.testing.assert_close(model(images, coins=coins), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["mix", "sum", "concat"])
def test_deterministic_alternatives_read_pairs_of_different_length(mode):
    model = StochCA(*make_pair(), p=0.3, mode=mode).train()
    images = make_images()
    expected = plain.logits(
        model.target,
        model.source,
        images,
        [None] * 3,
        lambda q, own, source, coin: plain.mix(q, own, source, mode, 0.3),
        resized(images, LARGE),
    )
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_a_source_with_rotary_embedding_has_the_rotation_of_its_own_size():
    model = StochCA(*make_pair(name="vit_base_patch16_rope_224")).train()
    images = make_images()
    for coins in COINS:
        expected = plain.logits(
            model.target, model.source, images, coins, source_images=resized(images, LARGE)
        )
        torch.testing.assert_close(model(images, coins=coins), expected, rtol=1e-12, atol=1e-12)


def test_another_normalisation_and_another_size_at_once():
    target, source = make_pair()
    target.pretrained_cfg = {**target.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    source.pretrained_cfg = {**source.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.2, 0.4, 0.8)}
    model, images = StochCA(target, source).train(), make_images()
    mean, std = (torch.tensor(source.pretrained_cfg[key]).double()[:, None, None] for key in ("mean", "std"))
    for_source = resized((images * 0.5 + 0.5 - mean) / std, LARGE)
    expected = plain.logits(target, source, images, (True,) * 3, source_images=for_source)
    torch.testing.assert_close(model(images, coins=(True,) * 3), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_half_precision_are_resized_in_float32(dtype):
    target, source = make_pair()
    model = StochCA(target.to(dtype), source.to(dtype)).train()
    images = make_images(dtype=dtype)
    assert model._for_source(images).dtype == dtype
    torch.testing.assert_close(model._for_source(images), resized(images.float(), LARGE).to(dtype))
    assert torch.isfinite(model(images, coins=(True,) * 3)).all()


def test_a_source_that_takes_any_size_sees_the_images_as_they_are():
    target = make_target(img_size=SMALL, **SHAPE)
    source = make_target(img_size=LARGE, dynamic_img_size=True, **SHAPE)
    model, images = StochCA(target, source).train(), make_images()
    expected = plain.logits(target, source, images, (True,) * 3)
    torch.testing.assert_close(model(images, coins=(True,) * 3), expected, rtol=1e-12, atol=1e-12)


def test_tokens_of_different_images_sizes_are_not_compared():
    model = StochCA(*make_pair()).train()
    with pytest.raises(ValueError, match="the target has 10 tokens of these images, the source 26"):
        model.forward_step(make_images(), taps=[1])


def test_dropout_of_attention_with_a_coin_per_sample_needs_as_many_tokens():
    model = StochCA(*make_pair(attn_drop_rate=0.1)).train()
    coins = [torch.tensor([True, False])] * 3
    with pytest.raises(ValueError, match="as many tokens, got 10 and 26"):
        model(make_images(), coins=coins)
    assert torch.isfinite(model(make_images(), coins=(True, False, True))).all()
