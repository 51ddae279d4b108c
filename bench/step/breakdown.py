"""Where the time of a step goes, by what its kernels (on the CPU: operators) are called."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.step.training import TrainingStep

ATTENTION, GEMM, COPIES, OTHER, IDLE = "attention", "GEMM", "copies", "norm and elementwise", "idle"
# What Inductor fuses, named after all operators that it came from; a copy if each of them is.
_FUSED = re.compile(r"(?:triton_(?:poi|per|red|for)|cpp)_fused_")
_MOVES = (
    r"to_copy|copy|clone|cat|stack|view|unsafe_view|reshape|permute|transpose|t|expand|squeeze|unsqueeze|slice"
    r"|select|split|split_with_sizes|unbind|slice_backward|select_backward"
)
_FUSED_COPY = re.compile(rf"{_FUSED.pattern}_*(?:(?:{_MOVES})(?:_+|$))+\d*")
# That of the loss. One of torch's kernels says it in an argument of its template.
_LOG_SOFTMAX = re.compile(r"log_?soft_?max|softmax_warp_\w+<[^>]*\d, true")
# The first that matches. The softmax of materialised scores is attention, their products are GEMMs.
_PATTERNS = {
    ATTENTION: r"attn|attention|flash|fmha|sdpa|mha_|_tokens_|_projected_|_sum_splits|softmax",
    GEMM: r"triton_tem_|gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|wgmma|conv|addmm|::mm$|::bmm$|::linear$"
    r"|matmul",
    COPIES: r"memcpy|memset|copy|::cat$|catarray|::clone|::contiguous",
}
NUM_LONGEST = 10

Interval = tuple[str, float, float]
"""Name, begin and end in us."""


def category(name: str) -> str:
    """What a kernel or an operator does; unknown names are elementwise."""
    lowered = name.lower()
    if _FUSED.search(lowered):
        return COPIES if _FUSED_COPY.fullmatch(lowered) else OTHER
    if _LOG_SOFTMAX.search(lowered):
        return OTHER
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, lowered)), OTHER)


def breakdown(step: TrainingStep, coins: tuple[bool, ...]) -> dict[str, Any]:
    """Milliseconds of one step by category, and its longest names.

    On a GPU: time of kernels, and "idle", the time in which none runs. On the CPU: time of operators without
    that of those they call, and "idle", what the step takes besides.

    Args:
        step: Has run before.
        coins: One per block.
    """
    on_gpu = step.setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        if on_gpu:
            torch.cuda.synchronize()
        step.forward_backward(coins)
        step.update()
        if on_gpu:
            torch.cuda.synchronize()
    events = list(profiler.events() or [])
    times: Counter[str] = Counter()
    if on_gpu:
        kernels = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        for name, begin, end in kernels:
            times[name] += (end - begin) / 1e3
        idle = idle_ms(kernels)
    else:
        for event in events:
            times[event.name] += event.self_cpu_time_total / 1e3
        span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        idle = max(0.0, span / 1e3 - sum(times.values()))
    categories = dict.fromkeys((ATTENTION, GEMM, OTHER, COPIES), 0.0)
    for name, ms in times.items():
        categories[category(name)] += ms
    longest = [{"name": name[:120], "ms": ms} for name, ms in times.most_common(NUM_LONGEST)]
    return {"breakdown": {**categories, IDLE: idle}, "longest": longest}


def idle_ms(kernels: Iterable[Interval]) -> float:
    """Milliseconds between the first begin and the last end in which no kernel runs."""
    idle, end = 0.0, None
    for _, begin, finish in sorted(kernels, key=lambda kernel: kernel[1]):
        if end is not None and begin > end:
            idle += begin - end
        end = finish if end is None else max(end, finish)
    return idle / 1e3
