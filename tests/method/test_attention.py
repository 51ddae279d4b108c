"""`StochCAAttention` as a drop-in for timm's attention."""

import inspect

import pytest
import timm
import torch
from timm.layers import Attention

from stochca import StochCAAttention
from tests import plain

KINDS = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "qk-norm": {"qkv_bias": True, "qk_norm": True, "norm_layer": torch.nn.LayerNorm},
    "scale-norm": {"scale_norm": True, "norm_layer": torch.nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "head-dim": {"attn_head_dim": 24},
}
ARGUMENTS = inspect.signature(Attention).parameters
KINDS = {name: kwargs for name, kwargs in KINDS.items() if kwargs.keys() <= ARGUMENTS.keys()}  # older timm


def make_pair(kind, dtype=torch.float64):
    torch.manual_seed(0)
    make = [
        cls(48, num_heads=3, **KINDS[kind]).to(dtype)
        for cls in (Attention, StochCAAttention, StochCAAttention)
    ]
    make[1].load_state_dict(make[0].state_dict(), strict=True)
    return make


def tokens(n=7, dtype=torch.float64, seed=0):
    return torch.randn(2, n, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_source_it_is_timms_bit_for_bit(kind, dtype):
    timms, ours, _ = make_pair(kind, dtype)
    x = tokens(dtype=dtype)
    assert torch.equal(ours(x), timms(x))
    mask = torch.zeros(7, 7, dtype=dtype)
    mask[:, 3] = -torch.inf
    assert torch.equal(ours(x, attn_mask=mask), timms(x, attn_mask=mask))
    if "is_causal" in inspect.signature(Attention.forward).parameters:  # since timm 1.0.26
        assert torch.equal(ours(x, is_causal=True), timms(x, is_causal=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source_tokens", [7, 11])
def test_with_a_source_it_reads_the_sources_pair(kind, source_tokens):
    timms, ours, frozen = make_pair(kind)
    x, x0 = tokens(), tokens(source_tokens, seed=1)
    out = ours(x, source_kv=frozen.source_kv(x0))

    q, _, _ = plain.qkv(timms, x)
    _, k0, v0 = plain.qkv(frozen, x0)
    expected = timms.norm(plain.softmax_attention(q, k0, v0).transpose(1, 2).flatten(2))
    if getattr(timms, "gate", None) is not None:
        expected = expected * timms.gate(x).sigmoid()
    torch.testing.assert_close(out, timms.proj(expected), rtol=1e-12, atol=1e-12)


def test_a_coin_per_sample_and_false():
    timms, ours, frozen = make_pair("bias")
    x, kv = tokens(), frozen.source_kv(tokens(11, seed=1))
    cross = ours(x, source_kv=kv)
    torch.testing.assert_close(ours(x, source_kv=kv, use_source=False), timms(x), rtol=1e-12, atol=1e-12)
    mixed = ours(x, source_kv=kv, use_source=torch.tensor([False, True]))
    torch.testing.assert_close(mixed, torch.stack([timms(x)[0], cross[1]]), rtol=1e-12, atol=1e-12)


def test_gradients_stop_at_the_source():
    _, ours, frozen = make_pair("qk-norm")
    x0 = tokens(seed=1).requires_grad_()
    ours(tokens(), source_kv=frozen.source_kv(x0)).sum().backward()
    assert x0.grad is None
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in ours.parameters())
    assert torch.equal(ours.k_norm.weight.grad, torch.zeros_like(ours.k_norm.weight))


def test_masks_and_dropout_act_on_the_sources_pair():
    _, ours, frozen = make_pair("bias")
    x, x0 = tokens(), tokens(seed=1)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    kv = frozen.source_kv(x0)
    torch.testing.assert_close(
        ours(x, source_kv=kv, is_causal=True), ours(x, source_kv=kv, attn_mask=causal), rtol=1e-12, atol=1e-12
    )
    first = ours(x, source_kv=kv, is_causal=True)
    first[:, 0].sum().backward()
    ours.attn_drop.p = 0.5
    torch.manual_seed(0)
    dropped = ours(x, source_kv=kv)
    assert not torch.equal(dropped, ours(x, source_kv=kv))
    ours.impl = "reference"
    with pytest.raises(ValueError, match='run on impl="sdpa" alone'):
        ours(x, source_kv=kv)
    assert torch.isfinite(ours.eval()(x, source_kv=kv)).all()


def test_as_attention_layer_of_a_timm_model():
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=StochCAAttention, img_size=32, patch_size=8, depth=2
    )
    plain_model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    plain_model.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert all(type(block.attn) is StochCAAttention for block in model.blocks)
    assert torch.equal(model.eval()(images), plain_model.eval()(images))


def test_a_source_of_another_width_is_refused():
    _, ours, _ = make_pair("plain")
    other = StochCAAttention(96, num_heads=6)
    source_kv = other.double().source_kv(tokens().repeat(1, 1, 2))
    with pytest.raises(ValueError, match=r"source_kv.weight must have shape \(96, 96\)"):
        ours(tokens().repeat(1, 3, 1), source_kv=source_kv)
    # Few tokens are given keys and values.
    with pytest.raises(ValueError, match=r"\(k\) must have shape \(2, 3, any, 16\), got \(2, 3, 7, 32\)"):
        ours(tokens(), source_kv=source_kv)
