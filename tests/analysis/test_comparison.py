"""Two models are compared by what timm's own forward hands to attention."""

import copy
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from stochca.analysis import compare
from stochca.analysis.comparison import attention_to_patches, paired
from stochca.analysis.heads import heads_of, layout_of
from stochca.analysis.measures import MEASURES
from tests.models import make_images, make_target, perturb

FAMILIES = {
    "class-token": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "average-pool-no-class-token": {"global_pool": "avg", "class_token": False},
    "qk-norm": {"qk_norm": True},
    "layer-scale": {"init_values": 0.5},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "naflex": {"name": "naflexvit_base_patch16_gap", "global_pool": "avg"},
    "dinov3": {"name": "vit_small_patch16_dinov3"},
    "eva02": {"name": "eva02_tiny_patch14_224"},
    "eva02-split": {"name": "eva02_base_patch14_448"},
    "perception-encoder": {"name": "vit_pe_core_tiny_patch16_384"},
}
WITHOUT_CLASS_TOKEN = {"average-pool-no-class-token", "naflex"}


def make_pair(name="class-token", **kwargs):
    """A target and a source, as after some training."""
    target = make_target(**{**FAMILIES[name], **kwargs})
    source = copy.deepcopy(target)
    perturb(target, seed=1)
    return target.eval(), source.eval()


def handed_to_attention(model, images):
    """Queries, keys, values and scale of each call of torch's attention, in timm's own forward."""
    calls = []
    attend = F.scaled_dot_product_attention

    def recorded(q, k, v, *args, scale=None, **kwargs):
        calls.append((q, k, v, q.shape[-1] ** -0.5 if scale is None else scale))
        return attend(q, k, v, *args, scale=scale, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", recorded), torch.no_grad():
        model.forward_features(images)
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_are_what_timms_forward_hands_to_attention(name):
    model, _ = make_pair(name)
    images = make_images()
    found, calls = list(heads_of(model, images)), handed_to_attention(model, images)
    assert len(found) == len(calls) == len(model.blocks)
    for heads, (q, k, v, scale) in zip(found, calls, strict=True):
        for ours, timms in zip(heads[:3], (q, k, v), strict=True):
            torch.testing.assert_close(ours, timms.expand_as(ours), rtol=1e-10, atol=1e-10)
        assert heads.scale == pytest.approx(scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_compared_by_its_own_tokens(name):
    target, source = make_pair(name)
    images = make_images()
    found = compare(target, source, [images])
    assert found.images == 2
    of_class = {measure for measure in MEASURES if measure.startswith("class_")}
    assert MEASURES.keys() - found.measured.keys() == (of_class if name in WITHOUT_CLASS_TOKEN else set())

    pairs = zip(handed_to_attention(target, images), handed_to_attention(source, images), strict=True)
    for block, (of_target, of_source) in enumerate(pairs):
        for part, x, y in zip(("query", "key", "value"), of_target, of_source, strict=False):
            cosines = F.cosine_similarity(x, y, dim=-1)
            estimate = found.measured[f"{part}_cosine"].heads
            np.testing.assert_allclose(estimate.mean[block], cosines.mean((0, 2)), rtol=1e-9)
            np.testing.assert_allclose(estimate.deviation[block], cosines.mean(2).std(0), rtol=1e-6)
            if name not in WITHOUT_CLASS_TOKEN:
                of_class = found.measured[f"class_{part}_cosine"].heads
                np.testing.assert_allclose(of_class.mean[block], cosines[:, :, 0].mean(0), rtol=1e-9)


def test_blocks_and_model_are_means_of_each_image_first():
    target, source = make_pair()
    images = make_images(batch=5)
    whole = compare(target, source, [images])
    single = [compare(target, source, [images[i : i + 1]]) for i in range(5)]
    for name, measured in whole.measured.items():
        per_image = np.stack([one.measured[name].heads.mean for one in single])
        for estimate, values in (
            (measured.heads, per_image),
            (measured.blocks, per_image.mean(2)),
            (measured.model, per_image.mean((1, 2))),
        ):
            np.testing.assert_allclose(estimate.mean, values.mean(0), rtol=1e-10)
            np.testing.assert_allclose(estimate.deviation, values.std(0, ddof=1), rtol=1e-7)


def test_batches_may_be_of_any_size_and_of_numpy():
    target, source = make_pair()
    images = make_images(batch=5)
    whole = compare(target, source, [images])
    parts = compare(target, source, (batch.numpy() for batch in images.split([1, 3, 1])))
    assert parts.images == whole.images == 5
    for name, measured in whole.measured.items():
        np.testing.assert_allclose(parts.measured[name].blocks.mean, measured.blocks.mean, rtol=1e-10)
        np.testing.assert_allclose(
            parts.measured[name].blocks.deviation, measured.blocks.deviation, rtol=1e-7
        )


def test_a_copy_has_everything_in_common():
    target, _ = make_pair()
    measured = compare(target, copy.deepcopy(target), [make_images()]).measured
    for name, found in measured.items():
        if name.endswith("cosine"):
            np.testing.assert_allclose(found.heads.mean, 1, rtol=1e-14)
        if name.endswith("divergence"):
            np.testing.assert_allclose(found.heads.mean, 0, atol=1e-14)
    distances = [measured[f"attention_distance_{whose}"].heads.mean for whose in ("target", "source")]
    np.testing.assert_array_equal(*distances)


def test_only_blocks_after_a_change_differ():
    """Block 2's own weights show in block 2, and what they do to the tokens in block 3."""
    target, _ = make_pair()
    source = copy.deepcopy(target)
    with torch.no_grad():
        head = target.blocks[2].attn.qkv.weight[16:32]  # queries of the second of three heads
        head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)).to(head))
    measured = compare(target, source, [make_images()]).measured
    is_same = np.isclose(measured["query_cosine"].heads.mean, 1, rtol=1e-12)
    np.testing.assert_array_equal(is_same, [[True] * 3, [True] * 3, [True, False, True], [False] * 3])
    is_same = np.isclose(measured["value_cosine"].heads.mean, 1, rtol=1e-12)
    np.testing.assert_array_equal(is_same, [[True] * 3] * 3 + [[False] * 3])
    is_same = np.isclose(measured["attention_divergence"].heads.mean, 0, atol=1e-14)
    np.testing.assert_array_equal(is_same, [[True] * 3, [True] * 3, [True, False, True], [False] * 3])


def test_the_source_gets_images_normalised_as_it_says():
    target, source = make_pair()
    images = make_images()
    means, deviations = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    target.pretrained_cfg = {**target.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    source.pretrained_cfg = {
        **source.pretrained_cfg,
        "mean": tuple(means.tolist()),
        "std": tuple(deviations.tolist()),
    }
    pixels = images * 0.5 + 0.5
    renormalised = (pixels - means[:, None, None]) / deviations[:, None, None]
    found = compare(target, source, [images]).measured["query_cosine"].heads.mean
    for block, (x, y) in enumerate(
        zip(handed_to_attention(target, images), handed_to_attention(source, renormalised), strict=True)
    ):
        expected = F.cosine_similarity(x[0], y[0], dim=-1).mean((0, 2))
        np.testing.assert_allclose(found[block], expected, rtol=1e-6)


def test_modes_are_restored_and_nothing_random_shows():
    target, source = make_pair(drop_path_rate=0.5, proj_drop_rate=0.5)
    target.train()
    first, second = (compare(target, source, [make_images()]) for _ in range(2))
    assert (target.training, source.training) == (True, False)
    assert target.blocks[0].drop_path1.training or target.blocks[1].drop_path1.training
    for name in first.measured:
        np.testing.assert_array_equal(first.measured[name].heads.mean, second.measured[name].heads.mean)


def test_attention_can_be_left_out():
    found = compare(*make_pair(), [make_images()], attention=False)
    assert {name for name in found.measured if "attention" in name} == set()
    assert len(found.measured) == 6


def test_patches_lie_row_by_row_in_the_image():
    target, source = make_pair(img_size=(16, 24))
    images = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    layout = layout_of(target, images)
    assert layout.grid == (2, 3)
    positions = torch.tensor([[0, 0], [0, 8], [0, 16], [8, 0], [8, 8], [8, 16]], dtype=torch.float64)
    torch.testing.assert_close(layout.distances, (positions[:, None] - positions).norm(dim=-1))
    with paired(target, source) as pair:
        maps = attention_to_patches(pair, images, block=-1)
    assert [values.shape for values in maps] == [(1, 2, 3)] * 2
    # By hand, of the class token in the last block.
    for values, model in zip(maps, (target, source), strict=True):
        q, k, _, scale = handed_to_attention(model, images)[-1]
        expected = (q[:, :, :1] @ k[:, :, 1:].transpose(-2, -1) * scale).softmax(-1).mean((0, 1, 2))
        np.testing.assert_allclose(values.ravel(), expected, rtol=1e-9)


def test_pairs_that_cannot_be_compared_are_refused():
    target, source = make_pair()
    with pytest.raises(ValueError, match="no images"):
        compare(target, source, [])
    with pytest.raises(ValueError, match="depth: target 4, source 2"):
        compare(target, make_target(depth=2), [make_images()])
    with pytest.raises(ValueError, match=r"take images of \(24, 24\) and \(32, 32\) pixels"):
        compare(target, make_target(img_size=32), [make_images()])
    with pytest.raises(ValueError, match="source is the target itself"):
        compare(target, target, [make_images()])
    with pytest.raises(TypeError, match="SwinTransformer"):
        compare(
            timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1)),
            source,
            [make_images()],
        )
