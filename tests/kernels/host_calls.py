"""What the host does for a call, with programs that do nothing in place of a GPU's.

Prints as JSON what is launched with what Triton is asked once for, what is launched where it is asked every
time, and how many Python functions each call calls. Run it without `TRITON_INTERPRET`.
"""

import itertools
import json
import sys
from unittest import mock

import torch

from bench import host
from stochca_kernels import backward, backward_joint, forward, launch
from stochca_kernels.projection import unpack
from stochca_kernels.tiles import Tiles

KINDS = (
    forward._kind_of_launch,
    backward._kind_of_dq,
    backward._kind_of_dkdv,
    backward_joint._kind_of_launch,
)
TILES = (Tiles(64, 64, 4, 2, "test"), Tiles(32, 64, 4, 2, "test"), Tiles(64, 64, 8, 2, "test"))


def draw(*shape, dtype=torch.bfloat16, offset=0):
    """Zeros that lie so many elements behind an address that 16 divides."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + offset, dtype=dtype)[offset:].view(shape)


def tensors(batch=2, heads=3, length=50, source_length=50, head_dim=64, dtype=torch.bfloat16, offset=0):
    """Views of packed projections, the source's last."""
    both = [
        unpack(draw(batch, n, 3, heads, head_dim, dtype=dtype, offset=offset))
        for n in (length, source_length)
    ]
    lse = draw(batch, heads, length, dtype=torch.float32)
    return *both, lse, torch.zeros(batch, dtype=torch.bool)


def run(
    shape=None, coins=False, source_q=False, pair=True, needs_lse=True, scale=0.125, apart=False, tiles=None
):
    """Each launcher once."""
    (q, k, v), (source_q_, source_k, source_v), lse, coin = tensors(**(shape or {}))
    if apart:  # other strides
        q, k, v, source_k, source_v = (t.contiguous() for t in (q, k, v, source_k, source_v))
    sides = (source_k, source_v) if (coins or source_q) and pair else (None, None)
    coin = coin if coins else None
    chosen = {"return_value": (tiles,)} if tiles else {"side_effect": forward.choose_tiles}
    with mock.patch.object(forward, "choose_tiles", **chosen):
        out, _, _ = forward.attention_forward(
            q, k, v, *sides, coin, source_q_ if source_q else None, scale, needs_lse
        )
    sides = sides if coins else (None, None)
    backward.attention_backward(out, q, k, v, *sides, coin, out, lse, scale, False)
    backward.attention_backward(out, q, k, v, *sides, coin, out, lse, scale, True)
    with mock.patch.object(backward, "has_joint_backward", return_value=False):
        backward.attention_backward(out, q, k, v, *sides, coin, out, lse, scale, True)


def cases():
    """Calls of which each differs from the first in one thing, or two."""
    shapes = (
        *({name: n} for name, n in (("batch", 5), ("heads", 4), ("length", 197), ("source_length", 100))),
        {"length": 600, "source_length": 600},
        *({"head_dim": n} for n in (32, 72, 128)),
        *({"dtype": dtype} for dtype in (torch.float16, torch.float32)),
        *({"offset": n} for n in (4, 8)),
        {"length": 64, "source_length": 64},
    )
    yield {}
    for shape, coins, source_q in itertools.product((*shapes, {}), (False, True), (False, True)):
        yield {"shape": shape, "coins": coins, "source_q": source_q}
    for tiles in TILES:
        yield {"tiles": tiles}
    yield {"needs_lse": False}
    yield {"scale": 0.25}
    yield {"apart": True}
    yield {"coins": True, "pair": False}


def launches(remembers):
    """Every launch of all cases, forwards and backwards: Triton's key, grid, and what is not a tensor."""
    found = []

    def launched(program, *arguments):
        grid, values = arguments[:3], arguments[9:]
        told = [str(v.dtype) if isinstance(v, torch.Tensor) else v for v in values]
        found.append((program.name, program.key, grid, told))

    for kinds in KINDS:
        kinds.cache_clear()
    with (
        mock.patch.object(launch, "_REMEMBERS", remembers),
        mock.patch.object(host.Program, "launched", staticmethod(launched)),
    ):
        every = list(cases())
        for case in (*every, *reversed(every)):
            if not remembers:
                for kinds in KINDS:
                    kinds.cache_clear()
            for precision in (
                ("ieee", "tf32") if case.get("shape", {}).get("dtype") == torch.float32 else ("ieee",)
            ):
                torch.backends.cuda.matmul.fp32_precision = precision
                run(**case)
    return found


def searches(call):
    """How often a call lets Triton search for a program, once it has been made before."""
    call()
    with mock.patch.object(
        host.JITFunction, "run", autospec=True, side_effect=host.JITFunction.run
    ) as search:
        call()
    return search.call_count


if __name__ == "__main__":
    with host.without_gpu():
        asked, remembered = launches(False), launches(True)
        with torch.autocast("cpu", torch.bfloat16):
            counts = {name: host.python_calls(call) for name, call in host.calls().items()}
            searched = {name: searches(call) for name, call in host.calls().items()}
    result = {"asked": asked, "remembered": remembered, "counts": counts, "searches": searched}
    sys.stdout.write(json.dumps(result))
