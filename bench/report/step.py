"""Tables of whole training steps, from what `bench.step` recorded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.report.cases import (
    AXES,
    TIMED,
    Case,
    Entry,
    growth,
    matmul_rates,
    of_study,
    over_p,
    provider_names,
    setting,
    timed,
    title,
)
from bench.report.markdown import NOTHING, flops_unit, item, not_timed, number, table

Column = Callable[[Entry], str | None]


def _number(entry: Entry, key: str, unit: float = 1.0) -> str | None:
    return None if entry.get(key) is None else number(entry[key] / unit)


MEMORY: Mapping[str, Column] = {
    "peak without frozen, MiB": lambda entry: _number(entry, "peak_mib_without_frozen"),
    "saved for backward, MiB": lambda entry: _number(entry, "saved_mib"),
}
RATE: Mapping[str, Column] = {
    "MFU": lambda entry: f"{entry['mfu']:.0%}" if entry.get("mfu") is not None else None,
    "images/s": lambda entry: _number(entry, "images_per_s"),
}


def goal_table(result: Mapping[str, Any]) -> str:
    """Each goal, its bound, and in each of its cases what was measured and whether that reaches it."""
    titles = {case["name"]: title(case) for case in result.get("cases", [])}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for goal in result.get("goals", []):
        bound = f"<= {goal['at_most']:.2f}" if "at_most" in goal else f">= {goal['at_least']:.2f}"
        cells.setdefault((goal["goal"], bound), {})[goal["case"]] = _verdict(goal)
    cases = list(dict.fromkeys(goal["case"] for goal in result.get("goals", [])))
    rows = [[*goal, *(by_case.get(case, NOTHING) for case in cases)] for goal, by_case in cells.items()]
    return table(["goal", "goal is", *(titles.get(case, case) for case in cases)], rows)


def case_table(case: Case) -> str:
    """Everybody in one case, whether timed or not, with all that was measured of them."""
    entries, ratios = case["providers"], case.get("ratios", {})
    unit, name = flops_unit(entry.get("flops") or 0.0 for entry in entries.values())
    optional: dict[str, Column] = {
        "mean over coins, ms": _with_spread,
        "images/s": RATE["images/s"],
        "without optimizer, ms": lambda entry: _with_spread(entry.get("without_optimizer") or {}),
        "peak, MiB": lambda entry: _number(entry, "peak_mib"),
        **MEMORY,
        f"{name} a step": lambda entry: _number(entry, "flops", unit),
        "MFU": RATE["MFU"],
        "error of logits, gradients": _errors,
        "setup, s": lambda entry: f"{entry['setup_s']:.1f}" if "setup_s" in entry else None,
    }
    columns: dict[str, Column] = {"p50 (p20-p80), ms": _percentiles}
    columns |= {name: of for name, of in optional.items() if any(of(e) is not None for e in entries.values())}
    rows = []
    for provider, entry in entries.items():
        cells = [of(entry) or NOTHING for of in columns.values()]
        if entry["status"] != TIMED:
            cells[0] = f"*{entry['status']}*"
        rows.append([provider, *cells, _ratio(ratios.get(provider))])
    return table(["provider", *columns, "ours / it"], rows)


def breakdown_table(case: Case) -> str:
    """Milliseconds of a step by what its kernels do, empty where nobody's are known."""
    known = {name: entry["breakdown"] for name, entry in timed(case).items() if entry.get("breakdown")}
    if not known:
        return ""
    categories = list(dict.fromkeys(kind for times in known.values() for kind in times))
    rows = [
        [name, *(number(times[kind]) if kind in times else NOTHING for kind in categories)]
        for name, times in known.items()
    ]
    return table(["where the time goes, ms", *categories], rows)


def comparison(cases: Sequence[Case], axis: str, extra: tuple[str, Mapping[str, str]] | None = None) -> str:
    """Everybody's mean time, and our time over it, along one axis.

    Args:
        cases: In the order of the columns.
        axis: A study, which says what is varied.
        extra: One more column: its name, and its cells by provider.
    """
    name, value = AXES[axis]
    header = [f"mean over coins, ms (ours / it), {name} =", *(f"{value(case):g}" for case in cases)]
    names = provider_names(cases)
    rows = [[provider, *(_cell(case, provider) for case in cases)] for provider in names]
    if extra is not None:
        header.append(extra[0])
        rows = [[*row, extra[1].get(row[0], NOTHING)] for row in rows]
    return table(header, rows)


def headline(result: Mapping[str, Any], case: Case) -> str:
    """A case in short, and all others of its setting: times over p, and the memory of this one."""
    cases = over_p(result).get(setting(case), [case])
    memory = {name: _number(entry, "peak_mib_without_frozen") for name, entry in timed(case).items()}
    if not any(memory.values()):
        return comparison(cases, "p")
    extra = {name: value or NOTHING for name, value in memory.items()}
    return comparison(cases, "p", (f"peak without frozen, MiB, p = {case['p']:g}", extra))


def rates(result: Mapping[str, Any]) -> str:
    """What MFU is relative to, in a sentence."""
    found = matmul_rates(result)
    if not found:
        return ""
    unit, name = flops_unit(found.values())
    listed = ", ".join(f"{number(rate / unit)} {name}/s {dtype}" for dtype, rate in found.items())
    return f"MFU: FLOPs of the step, counted, at the rate of a large product in the same run, {listed}."


def main_tables(result: Mapping[str, Any]) -> str:
    """All main cases."""
    return _join(_case(case) for case in of_study(result, "main"))


def p_tables(result: Mapping[str, Any]) -> str:
    """Times, memory and utilisation over p, for each setting."""
    return _join(
        _join([f"**{name}**", comparison(cases, "p"), figures(cases, "p")])
        for name, cases in over_p(result).items()
    )


def figures(cases: Sequence[Case], axis: str) -> str:
    """What else is known along an axis: memory, peak or else saved; and MFU, or else images per second."""
    return _join([_figure(cases, axis, MEMORY), _figure(cases, axis, RATE)])


def _figure(cases: Sequence[Case], axis: str, columns: Mapping[str, Column]) -> str:
    """A table of the first column that anybody has a value for, empty where nobody has one of any."""
    for figure, of in columns.items():
        known = [{name: of(entry) for name, entry in timed(case).items()} for case in cases]
        names = [name for name in provider_names(cases) if any(case.get(name) for case in known)]
        if names:
            name, value = AXES[axis]
            rows = [[who, *(case.get(who) or NOTHING for case in known)] for who in names]
            return table([f"{figure}, {name} =", *(f"{value(case):g}" for case in cases)], rows)
    return ""


def growth_tables(result: Mapping[str, Any]) -> str:
    """Times, memory and utilisation as images, batches and models grow."""
    studies = {study: growth(result, study) for study in ("N", "B", "depth")}
    titles = {"N": "Image size", "B": "Batch", "depth": "Depth"}
    return _join(
        _join(
            [
                f"**{titles[study]}**: {title(cases[0])}, and on",
                comparison(cases, study),
                figures(cases, study),
            ]
        )
        for study, cases in studies.items()
        if cases
    )


def ablation_tables(result: Mapping[str, Any]) -> str:
    """Ours with each saving switched off in turn."""
    return _join(_case(case) for case in of_study(result, "ablation"))


def other_tables(result: Mapping[str, Any]) -> str:
    """Cases that no other table shows: of other studies, and those of p that are alone in their setting."""
    shown = {"main", "ablation", *AXES}
    compared = over_p(result)
    return _join(
        _case(case)
        for case in result.get("cases", [])
        if case["study"] not in shown or (case["study"] == "p" and setting(case) not in compared)
    )


def failures(result: Mapping[str, Any]) -> str:
    """Everybody who was not timed, and why."""
    return "\n".join(
        item(f"{title(case)}, {provider}: {not_timed(entry)}")
        for case in result.get("cases", [])
        for provider, entry in case["providers"].items()
        if entry["status"] != TIMED
    )


def _verdict(goal: Mapping[str, Any]) -> str:
    value = "" if goal.get("value") is None else f"{goal['value']:.3f} "
    if goal.get("low") is not None and goal.get("high") is not None:  # over rounds
        value += f"({goal['low']:.3f}-{goal['high']:.3f}) "
    text = f"{value}{goal['verdict']}"
    return text if goal["verdict"] == "reached" else f"**{text}**"


def _case(case: Case) -> str:
    rounds = f"; {case['rounds']} rounds of {len(case['draws'])} draws" if case.get("rounds") else ""
    return _join([f"**{title(case)}**{rounds}", case_table(case), breakdown_table(case)])


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _cell(case: Case, provider: str) -> str:
    entry = case["providers"].get(provider)
    if entry is None:
        return NOTHING
    if entry["status"] != TIMED:
        return f"*{entry['status']}*"
    ratio = case.get("ratios", {}).get(provider)
    return number(entry["mean_ms"]) + (f" ({_ratio(ratio)})" if ratio is not None else "")


def _ratio(ratio: float | None) -> str:
    """A ratio of times; where ours is the slower one it is bold."""
    if ratio is None:
        return NOTHING
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"


def _percentiles(entry: Entry) -> str | None:
    if "p50_ms" not in entry:
        return None
    return f"{number(entry['p50_ms'])} ({number(entry['p20_ms'])}-{number(entry['p80_ms'])})"


def _with_spread(entry: Entry) -> str | None:
    if "mean_ms" not in entry:
        return None
    spread = entry.get("spread_ms")
    return number(entry["mean_ms"]) + (f" ± {number(spread, 2)}" if spread is not None else "")


def _errors(entry: Entry) -> str | None:
    error = entry.get("error")
    return f"{number(error['logits'], 2)}, {number(error['gradients'], 2)}" if error else None
