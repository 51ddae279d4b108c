"""Lines of text for whoever watches."""

from collections.abc import Iterable, Mapping
from typing import Any

from bench.kernels.providers import OURS


def case_lines(case: Mapping[str, Any]) -> list[str]:
    """One case: our time, the fastest rival's, the ratio; then who was refused, and why."""
    if "reason" in case:
        return [f"{case['name']:<58} {case['reason']}"]
    entries, best = case["providers"], case["best_rival"]
    ours = entries[OURS]
    lines = [
        f"{case['name']:<58} {OURS} {_time(ours)}   {best} {_time(entries.get(best, {}))}   "
        f"{_ratio(case['ratio'])}   {_shares(ours)}"
    ]
    lines += [
        f"    {name} {entry['status']}: {entry['reason']}"
        for name, entry in entries.items()
        if entry["status"] in ("wrong", "failed")
    ]
    return lines


def goal_lines(goals: Iterable[Mapping[str, Any]]) -> list[str]:
    """The goals' table."""
    lines = [f"{'goal':<84} {'at least':>8} {'measured':>8}"]
    lines += [
        f"{goal['goal']:<84} {_ratio(goal['at_least']):>8} {_ratio(goal['ratio']):>8} {goal['verdict']}"
        for goal in goals
    ]
    return lines


def _time(entry: Mapping[str, Any]) -> str:
    return f"{entry['p50_us']:.1f} us" if "p50_us" in entry else "-"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _shares(entry: Mapping[str, Any]) -> str:
    if "p50_us" not in entry:
        return ""
    return f"floors: bytes {entry['bytes_fraction']:.0%}, FLOPs {entry['flops_fraction']:.0%}"
