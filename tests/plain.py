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


def qkv(attn, x):
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for t in (q, k, v))
    return attn.q_norm(q), attn.k_norm(k), v


def block(blk, x, attend):
    y = blk.norm1(x)
    attn = blk.attn
    out = attend(*qkv(attn, y)).transpose(1, 2).flatten(2)
    out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:  # since timm 1.0.28
        out = out * torch.sigmoid(attn.gate(y))
    x = x + blk.ls1(attn.proj(out))
    return x + blk.ls2(blk.mlp(blk.norm2(x)))


def stem(vit, images):
    if hasattr(vit, "embeds"):
        return vit.norm_pre(vit.embeds(images)[0])
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def tokens(target, source, images, coins, attend=select):
    pairs = []
    with torch.no_grad():
        x0 = stem(source, images)
        for blk in source.blocks:
            _, k0, v0 = qkv(blk.attn, blk.norm1(x0))
            pairs.append((k0, v0))
            x0 = block(blk, x0, softmax_attention)
    x = stem(target, images)
    for blk, pair, coin in zip(target.blocks, pairs, coins, strict=True):
        x = block(blk, x, lambda q, k, v, pair=pair, coin=coin: attend(q, (k, v), pair, coin))
    return target.norm(x)


def logits(target, source, images, coins, attend=select):
    return target.forward_head(tokens(target, source, images, coins, attend))


def gradients(model: nn.Module, output) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random projection of the output; zeros where the graph does not reach."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((output * weight.to(output)).sum(), parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, grads, strict=True)
    }
