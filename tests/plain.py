"""StochCA in the straightforward way: the whole source first, all q, k, v kept, every token computed.

It shares no line with the package.
"""

import torch
from torch import nn


def softmax_attention(q, k, v):
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def mix(q, own, source, mode="mix", alpha=0.5):
    to_own, to_source = softmax_attention(q, *own), softmax_attention(q, *source)
    if mode == "mix":
        return (1 - alpha) * to_own + alpha * to_source
    if mode == "sum":
        return to_own + to_source
    return softmax_attention(q, *(torch.cat(pair, dim=2) for pair in zip(own, source, strict=True)))


def select(q, own, source, coin):
    if isinstance(coin, bool):
        return softmax_attention(q, *(source if coin else own))
    parts = [
        softmax_attention(q[b : b + 1], *(t[b : b + 1] for t in (source if coin[b] else own)))
        for b in range(q.shape[0])
    ]
    return torch.cat(parts)


def qkv(attn, x, rope=None):
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
    if getattr(attn, "q_bias", None) is not None:
        q, v = q + attn.q_bias, v + attn.v_bias
    q, k, v = (
        t.unflatten(-1, (-1, attn.proj.in_features // attn.num_heads)).transpose(1, 2) for t in (q, k, v)
    )
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = rotate(attn, q, rope), rotate(attn, k, rope)
    k, v = (torch.stack([t[:, h * t.shape[1] // q.shape[1]] for h in range(q.shape[1])], 1) for t in (k, v))
    return q, k, v


def rotate(attn, x, rope):
    """Pairs of channels as complex numbers, turned by the angle of their token."""
    prefix, x = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    sin, cos = rope.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    if getattr(attn, "rotate_half", False):
        real, imaginary, sin, cos = x[..., :half], x[..., half:], sin[..., :half], cos[..., :half]
    else:
        real, imaginary, sin, cos = x[..., ::2], x[..., 1::2], sin[..., ::2], cos[..., ::2]
    turned = real * cos - imaginary * sin, imaginary * cos + real * sin
    whole = (
        torch.cat(turned, -1) if getattr(attn, "rotate_half", False) else torch.stack(turned, -1).flatten(-2)
    )
    return torch.cat((prefix, whole), dim=2)


def layer_scale(blk, number, branch):
    if hasattr(blk, "ls1"):
        return getattr(blk, f"ls{number}")(branch)
    gamma = getattr(blk, f"gamma_{number}")
    return branch if gamma is None else branch * gamma


def block(blk, x, attend, rope=None):
    y = blk.norm1(x)
    attn = blk.attn
    out = attend(*qkv(attn, y, rope)).transpose(1, 2).flatten(2)
    out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:  # since timm 1.0.28
        out = out * torch.sigmoid(attn.gate(y))
    x = x + layer_scale(blk, 1, attn.proj(out))
    return x + layer_scale(blk, 2, blk.mlp(blk.norm2(x)))


def stem(vit, images):
    return stem_and_ropes(vit, images)[0]


def stem_and_ropes(vit, images):
    depth = len(vit.blocks)
    if hasattr(vit, "embeds"):
        x, grid = vit.embeds(images)
        rope = None if vit.rope is None else vit.rope.get_embed(shape=grid)
        is_mixed = vit.rope_is_mixed
    elif hasattr(vit, "rope"):
        x, rope = vit._pos_embed(vit.patch_embed(images))
        is_mixed = vit.rope_mixed
    else:
        x, rope, is_mixed = vit._pos_embed(vit.patch_embed(images)), None, False
    return vit.norm_pre(x), [rope[i] for i in range(depth)] if is_mixed else [rope] * depth


def tokens(target, source, images, coins, attend=select, source_images=None):
    pairs = []
    with torch.no_grad():
        x0, ropes = stem_and_ropes(source, images if source_images is None else source_images)
        for blk, rope in zip(source.blocks, ropes, strict=True):
            _, k0, v0 = qkv(blk.attn, blk.norm1(x0), rope)
            pairs.append((k0, v0))
            x0 = block(blk, x0, softmax_attention, rope)
    x, ropes = stem_and_ropes(target, images)
    for blk, pair, coin, rope in zip(target.blocks, pairs, coins, ropes, strict=True):
        x = block(blk, x, lambda q, k, v, pair=pair, coin=coin: attend(q, (k, v), pair, coin), rope)
    return target.norm(x)


def logits(target, source, images, coins, attend=select, source_images=None):
    return target.forward_head(tokens(target, source, images, coins, attend, source_images))


def gradients(model: nn.Module, output) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random projection of the output; zeros where the graph does not reach."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((output * weight.to(output)).sum(), parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, grads, strict=True)
    }
