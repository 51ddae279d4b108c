"""Lines of text for whoever watches."""

from collections.abc import Iterable, Mapping
from typing import Any


def case_lines(case: Mapping[str, Any]) -> list[str]:
    """One case: every provider's figures, or why there are none."""
    return [
        f"{case['name']}  ({len(case['draws'])} draws, {case['seconds']:.0f} s)",
        f"    {'':24} {'p20':>9} {'p50':>9} {'p80':>9} {'mean':>9} {'spread':>8} ms  {'ours/it':>7}"
        f" {'peak MiB':>9} {'kept MiB':>9} {'MFU':>5}  error",
        *(
            f"    {name:24} {_figures(entry, case['ratios'].get(name))}"
            for name, entry in case["providers"].items()
        ),
    ]


def goal_lines(goals: Iterable[Mapping[str, Any]]) -> list[str]:
    """The goals' table."""
    lines = [f"{'goal':58} {'bound':>9} {'measured':>9} {'p20 to p80':>16} {'':12} case"]
    for goal in goals:
        bound = f"<= {goal['at_most']:.2f}" if "at_most" in goal else f">= {goal['at_least']:.2f}"
        value = "-" if goal["value"] is None else f"{goal['value']:.3f}"
        has_interval = goal.get("low") is not None
        interval = f"{goal['low']:.3f} to {goal['high']:.3f}" if has_interval else ""
        figures = f"{bound:>9} {value:>9} {interval:>16}"
        lines.append(f"{goal['goal']:58} {figures} {goal['verdict']:12} {goal['case']}")
    return lines


def _figures(entry: Mapping[str, Any], ratio: float | None) -> str:
    if entry["status"] != "timed":
        return f"{entry['status']}: {entry['reason'].splitlines()[0][:150]}"
    times = " ".join(f"{entry[name]:9.2f}" for name in ("p20_ms", "p50_ms", "p80_ms", "mean_ms"))
    error = entry["error"]
    memory = f"{_number(entry['peak_mib'], '9.0f')} {_number(entry['saved_mib'], '9.1f')}"
    utilisation = _number(entry["mfu"], "5.2f")
    return (
        f"{times} {entry['spread_ms']:8.2f}     {_number(ratio, '7.3f')} {memory} {utilisation}  "
        f"{error['logits']:.2f}x {error['gradients']:.2f}x"
    )


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.split(".")[0]))
