"""What torch does around the operator, and what the operator chooses by itself."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stochca_kernels import attention, launch, tiles
from stochca_kernels.tiles import Tiles, gpu_of
from tests.gpu.paths import (
    DEVICE,
    DTYPES,
    OUTPUTS,
    Case,
    assert_accurate,
    call,
    cast,
    draw,
    gpu,
    paths,
    run,
    settings,
    with_leaves,
)

pytestmark = gpu


@paths
@pytest.mark.parametrize("arithmetic", ["bf16", "fp16"])
def test_autocast_is_a_cast_of_the_inputs(case, arithmetic):
    tensors, dtype = draw(case._replace(arithmetic="ieee")), DTYPES[arithmetic]

    def under_autocast(*args):
        with torch.autocast(DEVICE, dtype):
            return call(*args)

    actual, expected = run(case, tensors, function=under_autocast), run(case, cast(tensors, dtype))
    for name, t in expected.items():
        assert actual[name].dtype == (dtype if name in OUTPUTS else torch.float32)
        assert torch.equal(actual[name], t.to(actual[name].dtype)), name


@paths
def test_activation_checkpointing_changes_no_bit(case):
    tensors = draw(case)

    def checkpointed(*args):
        return checkpoint(call, *args, use_reentrant=False)

    actual, expected = run(case, tensors, function=checkpointed), run(case, tensors)
    for name, t in expected.items():
        assert torch.equal(actual[name], t), name


@paths
def test_double_backward_is_refused(case):
    with settings(case):
        tensors = with_leaves(case, draw(case))
        out = call(case, tensors)["out"]
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), tensors[case.leaves[0]], create_graph=True)


@paths
def test_functorch_is_refused(case):
    tensors, name = draw(case), case.leaves[0]
    with settings(case), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda t: call(case, tensors | {name: t})["out"].sum())(tensors[name])


@paths
def test_auto_runs_the_kernels_on_a_gpu(case, monkeypatch):
    tensors = draw(case)
    expected = run(case, tensors)
    spy = mock.Mock(side_effect=attention._attention_triton)
    monkeypatch.setattr(attention, "_attention_triton", spy)
    for name, t in run(case, tensors, "auto").items():
        assert torch.equal(t, expected[name]), name
    spy.assert_called_once()


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_the_environment_replaces_what_auto_selects(impl, monkeypatch):
    case = Case("pair")
    tensors = draw(case)
    expected = run(case, tensors)
    monkeypatch.setenv("STOCHCA_IMPL", impl)
    monkeypatch.setattr(attention, "_attention_triton", None)
    for name, t in run(case, tensors, "auto").items():
        torch.testing.assert_close(t, expected[name], rtol=5e-2, atol=5e-2)


# 12 stages of these tiles are more than any GPU's shared memory.
HUGE = {
    **dict.fromkeys(("fwd", "dq"), Tiles(64, 128, 4, 12, "huge")),
    "dkdv": Tiles(128, 64, 4, 12, "huge"),
    **dict.fromkeys(("projected_fwd", "projected_dq"), Tiles(64, 128, 4, 12, "huge", block_c=64)),
    **dict.fromkeys(("tokens_fwd", "tokens_bwd"), Tiles(16, 64, 8, 12, "huge")),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("path", ["split", "fused", "tokens"])
def test_tiles_that_do_not_fit_give_way_to_smaller_ones(path, monkeypatch):
    gpu = gpu_of(torch.device(DEVICE))
    for kernel, huge in HUGE.items():
        key = (kernel, tiles._LIKE.get(gpu, gpu), "half")
        monkeypatch.setitem(tiles._TABLE, key, tuple((huge, *rows) for rows in tiles._TABLE[key]))
    monkeypatch.setattr(tiles, "_chosen", tiles._chosen.__wrapped__)  # which remembers
    too_large: set[tuple[Any, ...]] = set()
    monkeypatch.setattr(launch, "_TOO_LARGE", too_large)
    case = Case(path)
    tensors = draw(case)
    for _ in range(2):  # the second time it knows
        assert_accurate(case, run(case, tensors), tensors)
    expected = {
        "split": {"_attn_fwd_kernel", "_attn_bwd_dq_kernel", "_attn_bwd_dkdv_kernel"},
        "fused": {"_attn_fwd_kernel", "_projected_fwd_kernel", "_projected_dq_kernel"},
        "tokens": {"_tokens_fwd_kernel", "_tokens_bwd_kernel"},
    }
    assert expected[path] <= {kernel.__name__ for kernel, *_ in too_large}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@paths
def test_launches_where_the_inputs_are(case):
    expected = run(case, draw(case, "cuda:0"))
    with torch.cuda.device(0):
        for name, t in run(case, draw(case, "cuda:1")).items():
            assert t.device == torch.device("cuda:1")
            torch.testing.assert_close(t.to("cuda:0"), expected[name], rtol=1e-2, atol=1e-2)
