"""StochCAAttention in a transformer of your own, whose source is its frozen copy.

python examples/own_model.py        # learns the digits 0-4, then 5-9 against what it was
"""

import copy
from itertools import zip_longest

import torch
from common import digits, flags
from timm.layers import Mlp
from torch import nn

from stochca import CoinSampler, StochCAAttention


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(dim), StochCAAttention(dim, num_heads=2), Mlp(dim)

    def forward(self, x, source_kv=None):
        y = self.norm(x)
        return x + self.attn(y, source_kv=source_kv) + self.mlp(y)


class Transformer(nn.Module):
    def __init__(self, dim=64, depth=4):
        super().__init__()
        self.embed, self.position = nn.Linear(8, dim), nn.Parameter(torch.randn(8, dim) / 2)
        self.blocks, self.head = nn.ModuleList(Block(dim) for _ in range(depth)), nn.Linear(dim, 10)

    def forward(self, images, pairs=()):
        x = self.embed(images[:, 0]) + self.position  # read row by row
        for block, source_kv in zip_longest(self.blocks, pairs):
            x = block(x, source_kv)
        return self.head(x.mean(dim=1))

    def pairs(self, images, plan):  # what a frozen source hands over, block by block, as far as it is read
        x = self.embed(images[:, 0]) + self.position
        for i, block in enumerate(self.blocks[: plan.source_blocks]):
            x = self.blocks[i - 1](x) if i else x
            yield block.attn.source_kv(block.norm(x)) if plan.coins[i] else None


args = flags(__doc__, p=0.3, steps=200, lr=3e-3)
model, source, coins = Transformer(), None, CoinSampler(args.p, depth=4)
for half in (0, 1):
    (images, labels), test = (part[part.tensors[1] // 5 == half] for part in digits(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for batch in torch.randint(len(labels), (args.steps, 50)):
        pairs = source.pairs(images[batch], coins.draw(50)) if source else ()
        loss = nn.functional.cross_entropy(model(images[batch], pairs), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = model(test[0]).argmax(dim=1) == test[1]
    print(f"digits {5 * half}-{5 * half + 4}: loss {loss:.3f}, accuracy {100 * right.float().mean():.1f} %")
    source = copy.deepcopy(model).requires_grad_(False)
