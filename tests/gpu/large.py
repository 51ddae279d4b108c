"""Offsets beyond 2^31, and more programs than the second axis of a grid holds."""

import torch

from tests.gpu.paths import DEVICE, Case, Tensors, draw, poisoned, run

LIMIT = 2**31
# Heads, and so programs, are then 170,334.
BATCH = LIMIT // (197 * 3 * 64) + 3
LARGE = {
    "pair": ("q", "k", "v", "source_q", "source_k", "source_v", "grad"),
    "packed": ("qkv", "source_k", "source_v", "grad"),
    "fused": ("qkv", "source_x", "grad"),
    "tokens": ("x", "source_x"),
}
GIB = {"pair": 60, "packed": 60, "fused": 50, "tokens": 22}
WEIGHTS = ("weight", "bias", "source_weight", "source_bias", "source_q_weight", "source_q_bias")


def behind_zeros(tensors: Tensors) -> Tensors:
    """The samples of all tensors as the last ones of a batch that is zero everywhere else."""

    def spread(t):
        is_heads = t.ndim == 4  # [B, H, N, D], which lies token-major
        t = t.transpose(1, 2) if is_heads else t
        large = t.new_zeros(BATCH, *t.shape[1:])
        large[-len(t) :] = t
        return large.transpose(1, 2) if is_heads else large

    large = {name: t if name in WEIGHTS else spread(t) for name, t in tensors.items()}
    return large | {"coins": torch.arange(BATCH, device=DEVICE) % 2 == BATCH % 2}


def assert_last_samples_as_alone(path: str) -> None:
    """Assert that the last samples of more than 2^31 elements have the results that they have alone.

    Raises:
        RuntimeError: The GPU has too little memory to tell.
    """
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < GIB[path]:
            raise RuntimeError(f"not measured: needs {GIB[path]} GiB of GPU memory, {free:.0f} are free")
    case = Case(path, batch=2)
    small = draw(case)
    for name, t in small.items():
        if name.endswith("bias"):
            t.zero_()  # the output of zeros is then zero
    small["coins"] = torch.tensor([True, False], device=DEVICE)
    large = behind_zeros(small)
    for name in LARGE[path]:
        assert large[name].numel() > LIMIT
    with poisoned():
        expected, actual = run(case, small), run(case, large)
    del large
    for name, t in actual.items():
        if name.removeprefix("d") in WEIGHTS:
            torch.testing.assert_close(t, expected[name], rtol=2e-2, atol=2e-2)
        else:
            torch.testing.assert_close(t[-2:], expected[name], rtol=2e-2, atol=2e-2)
            assert not t[:-2].any(), name
