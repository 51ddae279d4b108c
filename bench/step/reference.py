"""The definition of a step in float64: the whole source, every token, attention by its equation.

It shares no line with the package or with a provider. A batch is processed some samples at a time, and their
gradients add up, so that memory is bounded.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bench.step.workloads import Setting
from stochca.vit import TimmViT

# Numbers that a forward may keep for its backward, about 4 GiB.
MAX_NUMBERS = 2**29


class Outcome(NamedTuple):
    """What a step computes.

    Args:
        logits: `[B, classes]`.
        gradients: Of the mean cross-entropy, those of all parameters one after another.
    """

    logits: Tensor
    gradients: Tensor


class Reference:
    """The definition, for one setting.

    Args:
        setting: Models are copied to float64 as they are now.
    """

    def __init__(self, setting: Setting) -> None:
        self.images, self.labels = setting.images, setting.labels
        self.target = copy.deepcopy(setting.target).double()
        self.source = copy.deepcopy(setting.source).double()
        self.at_once = max(1, MAX_NUMBERS // _numbers(setting.target, setting.images[:1]))

    def __call__(self, coins: Sequence[bool]) -> Outcome:
        """The outcome under one coin per block."""
        logits = []
        chunks = zip(self.images.split(self.at_once), self.labels.split(self.at_once), strict=True)
        for images, labels in chunks:
            part = _logits(self.target, self.source, images.double(), coins)
            loss = -part.log_softmax(-1).gather(1, labels[:, None]).sum() / len(self.labels)
            loss.backward()
            logits.append(part.detach())
        gradients = flat_gradients(self.target)
        self.target.zero_grad(set_to_none=True)
        return Outcome(torch.cat(logits), gradients)


def flat_gradients(model: nn.Module) -> Tensor:
    """Gradients of all parameters one after another, zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def _numbers(vit: TimmViT, image: Tensor) -> int:
    """About how many numbers a forward keeps of one sample."""
    with torch.no_grad():
        length = _tokens(vit, image).shape[1]
    block = vit.blocks[0]
    scores, hidden = block.attn.num_heads * length**2, length * block.mlp.fc1.out_features
    return len(vit.blocks) * (3 * scores + 4 * hidden)


def _tokens(vit: TimmViT, images: Tensor) -> Tensor:
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def _logits(target: TimmViT, source: TimmViT, images: Tensor, coins: Sequence[bool]) -> Tensor:
    pairs = []
    with torch.no_grad():
        x0 = _tokens(source, images)
        for block in source.blocks:
            q0, k0, v0 = _heads(block, x0)
            pairs.append((k0, v0))
            x0 = _rest(block, x0, q0, k0, v0)
    x = _tokens(target, images)
    for block, coin, (k0, v0) in zip(target.blocks, coins, pairs, strict=True):
        q, k, v = _heads(block, x)
        x = _rest(block, x, q, *((k0, v0) if coin else (k, v)))
    return target.forward_head(target.norm(x))


def _heads(block: Block, x: Tensor) -> list[Tensor]:
    attn = block.attn
    parts = attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    return [attn.q_norm(q), attn.k_norm(k), v]


def _rest(block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    heads = (probabilities @ v).transpose(1, 2).flatten(2)
    x = x + block.ls1(block.attn.proj(heads))
    return x + block.ls2(block.mlp(block.norm2(x)))
