"""Sections about whole training steps: measured where they have been, predicted where not."""

from collections.abc import Mapping
from typing import Any

from bench import step_predictions
from bench.report import step
from bench.report.cases import of_study, setting
from bench.report.markdown import device, device_name, paragraph, provenance, table
from bench.report.pictures import FOLDER, links, step_pictures
from bench.report.recorded import Results, not_measured

GPU, CPU = "step", "step-cpu"
RATIOS = (
    "In brackets, the time of ours over it, compiled against compiled and eager against eager;",
    "**bold** where ours is slower.",
)
PREDICTION = (
    not_measured("step"),
    "Until then, this is a *prediction* for one H200 in bfloat16, by arithmetic",
    "(`python -m bench.step_predictions`); its assumptions are in `bench/step_times.py`.",
)
README_PREDICTION = (
    "p",
    "plain compiled, ms",
    "by hand compiled, ms",
    "authors fp32, ms",
    "ours eager, ms",
    "ours compiled, ms",
    "ours / plain",
    "ours / by hand",
    "authors fp32 / ours, eager",
)


def readme_gpu(results: Results) -> str:
    """A step in short: measured on a GPU, or predicted."""
    result = results.read(GPU)
    if result is not None:
        return _short(results, GPU, result)
    predicted = step_predictions.rows([step_predictions.VIT_B_224])
    header, rows = _columns(step_predictions.HEADER, predicted, README_PREDICTION)
    of = f"A training step of {predicted[0][0]}, with its optimizer, mean over the coins."
    return "\n\n".join([paragraph(*PREDICTION, of), table(header, rows), predicted_goals()])


def readme_cpu(results: Results) -> str:
    """A step in short, measured on a CPU."""
    result = results.read(CPU)
    return not_measured(CPU) if result is None else _short(results, CPU, result)


def goals(results: Results) -> str:
    """The goals on every device, each measured, predicted or neither."""
    parts = []
    for name in (GPU, CPU):
        result, where = results.read(name), "One H200" if name == GPU else "A CPU"
        if result is not None:
            where = device_name(result)
            body = f"{results.stale_note(name, result)}{step.goal_table(result)}\n\n{_source(result)}"
        elif name == GPU:
            body = f"{paragraph(*PREDICTION)}\n\n{predicted_goals()}"
        else:
            body = not_measured(name)
        parts.append(f"**{where}**\n\n{body}")
    return "\n\n".join(parts)


def predicted_goals() -> str:
    """The goals on an H200 with the values that are predicted, judged as measured ones are."""
    return f"Goals, *predicted*:\n\n{step.goal_table(step_predictions.predicted())}"


def gpu(results: Results) -> str:
    """Everything that was measured on a GPU."""
    return _everything(results, GPU)


def cpu(results: Results) -> str:
    """Everything that was measured on a CPU."""
    return _everything(results, CPU)


def prediction(results: Results) -> str:
    """Everybody's step on an H200 by arithmetic."""
    of_product = "One launch for the products of target and source over two, where only whole waves of tiles"
    return "\n\n".join(
        [
            table(step_predictions.HEADER, step_predictions.rows()),
            paragraph(of_product, "count and small batches do not fill the GPU:"),
            table(step_predictions.SMALL_BATCH_HEADER, step_predictions.small_batch_rows()),
        ]
    )


def _short(results: Results, name: str, result: Mapping[str, Any]) -> str:
    """The first main setting over p, the goals, and a picture if no GPU's is shown instead."""
    main = of_study(result, "main")
    if not main:
        return results.stale_note(name, result) + "No main case was measured."
    of = f"A training step of {setting(main[0])}, *measured* on {device(result)}."
    parts = [paragraph(of, *RATIOS), step.headline(result, main[0])]
    parts += [step.goal_table(result)] if result.get("goals") else []
    if name == GPU or results.read(GPU) is None:
        drawn = step_pictures(results, name).items()
        parts += [links({key: each}, FOLDER) for key, each in drawn if key == f"{name}-time-over-p"]
    return results.stale_note(name, result) + "\n\n".join([*parts, _source(result)])


def _everything(results: Results, name: str) -> str:
    result = results.read(name)
    if result is None:
        return not_measured(name)
    parts = {
        "Main workloads": step.main_tables(result),
        "Over p": step.p_tables(result),
        "Growth": step.growth_tables(result),
        "Ablation: savings switched off": step.ablation_tables(result),
        "Experiments": step.other_tables(result),
        "Not timed, and why": step.failures(result),
        "Pictures": links(step_pictures(results, name), FOLDER.removeprefix("docs/")),
    }
    sections = [f"### {title}\n\n{text}" for title, text in parts.items() if text]
    intro = paragraph(f"Measured on {device(result)}.", *RATIOS, step.rates(result))
    return results.stale_note(name, result) + "\n\n".join([intro, *sections, _source(result)])


def _columns(
    header: list[str], rows: list[list[str]], wanted: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    """Some columns of a table."""
    at = [header.index(name) for name in wanted]
    return list(wanted), [[row[i] for i in at] for row in rows]


def _source(result: Mapping[str, Any]) -> str:
    seconds = f"; {result['seconds']:.0f} s" if result.get("seconds") is not None else ""
    return f"<sub>{provenance(result)}{seconds}</sub>"
