"""What the lockstep computes is what the straightforward full computation computes."""

import collections
import itertools

import pytest
import torch
from torch import nn

from stochca import StochCA
from tests import plain
from tests.models import make_images, make_model, make_target

ALL_COINS = list(itertools.product([False, True], repeat=4))

VARIANTS = {
    "class-token": {},
    "layer-scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "pre-norm": {"pre_norm": True},
    "average-pool": {"global_pool": "avg"},
    "average-pool-no-class-token": {"global_pool": "avg", "class_token": False},
    "attention-pool": {"global_pool": "map", "class_token": False},
    "qk-norm": {"qk_norm": True},
    "scale-norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no-qkv-bias": {"qkv_bias": False},
    "swiglu": {"mlp_layer": "SwiGLU"},
    "no-final-norm": {"final_norm": False},
    "dynamic-size": {"dynamic_img_size": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "naflex": {"name": "naflexvit_base_patch16_gap", "global_pool": "avg", "img_size": None},
}


def build(variant):
    kwargs = dict(VARIANTS[variant])
    if kwargs.get("mlp_layer"):
        import timm.layers

        kwargs["mlp_layer"] = getattr(timm.layers, kwargs["mlp_layer"])
    if "img_size" in kwargs:
        kwargs["img_size"] = 24
    return make_model(**kwargs)


def assert_same(model, images, coins, attend=plain.select, tolerance=1e-12):
    out = model(images, coins=coins)
    expected = plain.logits(model.target, model.source, images, coins, attend)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grads, expected_grads = plain.gradients(model.target, out), plain.gradients(model.target, expected)
    for name, grad in grads.items():
        scale = max(1.0, expected_grads[name].abs().max().item())
        torch.testing.assert_close(
            grad,
            expected_grads[name],
            rtol=0,
            # Learned rotations are timm's, which adds their gradients in float32.
            atol=max(tolerance, 1e-6 if name == "rope.freqs" else 0.0) * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("class_rows", [True, False], ids=["class-rows", "all-rows"])
@pytest.mark.parametrize("coins", ALL_COINS, ids=["".join("SC"[c] for c in coins) for coins in ALL_COINS])
def test_every_coin_pattern_equals_the_full_computation(coins, class_rows):
    model = make_model(stochca={"class_rows": class_rows})
    assert_same(model, make_images(), coins)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("coins", [(False, True, False, True), (True, False, True, True), (False,) * 4])
def test_variants_of_the_model_equal_the_full_computation(variant, coins):
    assert_same(build(variant), make_images(), coins)


@pytest.mark.parametrize("variant", ["class-token", "qk-norm", "average-pool"])
def test_coins_per_sample_equal_the_full_computation(variant):
    model = build(variant)
    generator = torch.Generator().manual_seed(0)
    coins = list((torch.rand(4, 3, generator=generator) < 0.5).unbind(0))
    assert_same(model, make_images(batch=3), coins)
    mixed = [coins[0], True, coins[1], False]
    assert_same(model, make_images(batch=3), mixed)
    assert_same(model, make_images(batch=3), [coins[0], True, coins[1], True])


@pytest.mark.parametrize("mode", ["mix", "sum", "concat"])
def test_deterministic_alternatives_equal_the_full_computation(mode):
    model = make_model(p=0.3, stochca={"mode": mode})
    images = make_images()
    out = model(images)

    def attend(q, own, source, coin):
        return plain.mix(q, own, source, mode, 0.3)

    expected = plain.logits(model.target, model.source, images, [None] * 4, attend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = plain.gradients(model.target, out), plain.gradients(model.target, expected)
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_is_timm_bit_for_bit(variant):
    model = build(variant).eval()
    images = make_images()
    with torch.no_grad():
        assert torch.equal(model(images), model.target(images))


def test_at_initialisation_the_coins_do_not_matter():
    model = StochCA(make_target()).train()
    outputs = [model(make_images(), coins=coins) for coins in ALL_COINS]
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=1e-12, atol=1e-12)
    model = make_model()
    assert not torch.allclose(
        model(make_images(), coins=ALL_COINS[0]), model(make_images(), coins=ALL_COINS[-1])
    )


def test_key_and_value_rows_have_zero_gradient_in_cross_attention_alone():
    model = make_model()
    model(make_images(), coins=(False, True, False, True)).square().sum().backward()
    for block, coin in zip(model.target.blocks, (False, True, False, True), strict=True):
        for grad in (block.attn.qkv.weight.grad, block.attn.qkv.bias.grad):
            q, k, v = grad.chunk(3)
            assert q.abs().max() > 0
            assert (v.abs().max() == 0) == coin
            if grad.ndim == 2:  # the key bias cancels in the softmax, so its gradient is zero anyway
                assert (k.abs().max() == 0) == coin


def test_patch_embedding_has_zero_gradient_where_all_blocks_cross():
    model = make_model()
    model(make_images(), coins=(True,) * 4).square().sum().backward()
    assert torch.equal(
        model.target.patch_embed.proj.weight.grad, torch.zeros_like(model.target.patch_embed.proj.weight)
    )
    assert model.target.cls_token.grad.abs().max() > 0
    model.zero_grad()
    model(make_images(), coins=(True, False, True, True)).square().sum().backward()
    assert model.target.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("coins", ALL_COINS, ids=["".join("SC"[c] for c in coins) for coins in ALL_COINS])
def test_the_source_runs_no_further_than_needed(coins):
    """No module of the source runs for nothing, and weights that nothing should read do not show."""
    model = make_model()
    needed = max((i + 1 for i, coin in enumerate(coins) if coin), default=0)
    ran = collections.Counter()
    modules = {"stem": [model.source.patch_embed]}
    modules["norm1"] = [block.norm1 for block in model.source.blocks]
    modules["mlp"] = [block.mlp for block in model.source.blocks]
    for name, instances in modules.items():
        for module in instances:
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    reference = model(make_images(), coins=coins)
    assert (ran["stem"], ran["norm1"], ran["mlp"]) == (needed > 0, needed, max(needed - 1, 0))
    with torch.no_grad():
        for i, block in enumerate(model.source.blocks):
            if i + 1 < needed:
                continue
            unread = [block.attn.proj, block.mlp, block.norm2] if i + 1 == needed else [block]
            for p in itertools.chain.from_iterable(m.parameters() for m in unread):
                p.fill_(torch.nan)
            if i + 1 == needed:
                block.attn.qkv.weight[: block.attn.qkv.in_features] = torch.nan
        if not needed:
            model.source.patch_embed.proj.weight.fill_(torch.nan)
    assert torch.equal(model(make_images(), coins=coins), reference)


def test_cross_attention_reads_no_key_or_value_of_the_target():
    model = make_model()
    coins = (True, False, True, True)
    reference = model(make_images(), coins=coins)
    with torch.no_grad():
        for block, coin in zip(model.target.blocks, coins, strict=True):
            if coin:
                block.attn.qkv.weight[block.attn.qkv.in_features :] = torch.nan
    assert torch.equal(model(make_images(), coins=coins), reference)


def test_dense_outputs_have_all_tokens():
    model = make_model()
    coins = (False, True, False, True)
    expected = plain.tokens(model.target, model.source, make_images(), coins)
    features = model.forward_features(make_images(), coins=coins)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    final, patches = model.forward_intermediates(make_images(), indices=[1, 3], norm=True, coins=coins)
    torch.testing.assert_close(final, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        patches[1], expected[:, 1:].transpose(1, 2).unflatten(2, (3, 3)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_prefix_tokens": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
        {"output_fmt": "NLC", "stop_early": True},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_intermediates_without_a_source_are_timms(options, training):
    model = make_model().train(training)
    ours = model.forward_intermediates(
        make_images(), [0, 2], coins=(False,) * 4 if training else None, **options
    )
    timms = model.target.forward_intermediates(make_images(), [0, 2], **options)
    torch.testing.assert_close(ours, timms, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["class-token", "qk-norm", "average-pool"])
def test_the_triton_kernels_train_the_same_model(variant):
    model = build(variant).float()
    images = make_images(batch=3).float()
    mixed = torch.tensor([True, False, True])
    for coins in ((False, True, mixed, True), (True, mixed, False, True)):
        gradients = []
        for impl in ("triton", "reference"):
            model.impl = impl
            gradients.append(plain.gradients(model.target, model(images, coins=coins)))
        for name, grad in gradients[0].items():
            scale = gradients[1][name].abs().max().item()
            torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-5 * (1 + scale))


def test_drop_path_is_timms_own():
    model = make_model(drop_path_rate=0.5, stochca={"class_rows": False})
    torch.manual_seed(0)
    ours = model(make_images(batch=8), coins=(False,) * 4)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, model.target(make_images(batch=8)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, model.eval()(make_images(batch=8)))


def test_drop_path_and_dropout_act_on_the_target_alone():
    model = make_model(drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3, pos_drop_rate=0.2)
    assert not any(m.training for m in model.source.modules())
    coins = (True, False, torch.tensor([True, False]), True)
    torch.manual_seed(0)
    first = model(make_images(), coins=coins)
    torch.manual_seed(0)
    assert torch.equal(model(make_images(), coins=coins), first)
    assert not torch.equal(model(make_images(), coins=coins), first)
    for module in model.target.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    assert_same(model, make_images(), coins)
