"""The windows of docs/dense.md."""

import re
from pathlib import Path

import pytest
import torch

from stochca import StochCAAttention
from tests.models import perturb

PAGE = Path(__file__).parents[2] / "docs" / "dense.md"
GRID, WINDOW = (6, 4), (3, 2)


@pytest.fixture(scope="module")
def windowed():
    (code,) = re.findall(r"```python\n([^`]*def windowed.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    return names["windowed"]


@pytest.mark.parametrize("coin", [None, False, True, torch.tensor([True, False])], ids=str)
def test_windows_are_attention_whose_mask_leaves_each_token_its_window(windowed, coin):
    attention, frozen = (StochCAAttention(32, num_heads=2).double() for _ in range(2))
    perturb(attention, seed=1)
    perturb(frozen.requires_grad_(False), seed=2)
    x, x0 = torch.randn(2, 2, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row, column = torch.arange(24) // GRID[1] // WINDOW[0], torch.arange(24) % GRID[1] // WINDOW[1]
    of_window = row * (GRID[1] // WINDOW[1]) + column
    mask = of_window[:, None] == of_window
    if coin is None:
        actual, expected = windowed(attention, x, GRID, WINDOW), attention(x, attn_mask=mask)
    else:
        actual = windowed(attention, x, GRID, WINDOW, frozen, x0, coin)
        expected = attention(x, attn_mask=mask, source_kv=frozen.source_kv(x0), use_source=coin)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(actual, attention(x))
