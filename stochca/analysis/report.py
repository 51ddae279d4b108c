"""The report: one HTML file with plots, tables, definitions, configuration and environment."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
import yaml

from stochca.analysis.measures import CLASS_SIMILARITY, DISTANCE, DIVERGENCE, SIMILARITY
from stochca.analysis.pictures import looks, plots, swatch
from stochca.analysis.plots import curve_panels, head_panels
from stochca.analysis.results import Analysis, measures_of
from stochca.analysis.tables import caption, means, shown
from stochca.checkpoint import write_atomically
from stochca.config import FinetuneOptions
from stochca.statistics import NOTHING


def write_report(
    output: Path, analyses: Sequence[Analysis], data: Mapping[str, str], environment: Mapping[str, str]
) -> Path:
    """Write `report.html` and return its path.

    Args:
        output: An existing folder.
        analyses: Of the runs.
        data: Which images were seen, by name.
        environment: Versions and machine, by name.
    """
    folder = files("stochca.analysis")
    template = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html")
    text = template.render(
        style=(folder / "report.css").read_text(encoding="utf-8"),
        legend=[(swatch(i), analysis.name) for i, analysis in enumerate(analyses)],
        caption=caption(analyses),
        means=_means(analyses),
        similarity=plots(curve_panels(analyses, SIMILARITY)),
        class_similarity=plots(curve_panels(analyses, CLASS_SIMILARITY)),
        heads=plots(head_panels(analyses, SIMILARITY)),
        attention=plots(curve_panels(analyses, DIVERGENCE, DISTANCE)),
        attention_heads=plots(head_panels(analyses, DIVERGENCE)),
        looks=looks(analyses),
        blocks=_blocks(analyses),
        measures=list(measures_of(analyses)),
        facts={name: [a.facts.get(name, NOTHING) for a in analyses] for a in analyses for name in a.facts},
        options=_changed_options(analyses),
        configs={a.name: yaml.safe_dump(a.config, sort_keys=False) for a in analyses},
        data=data,
        environment=environment,
    )
    path = output / "report.html"

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_atomically(path, write)
    return path


def _means(analyses: Sequence[Analysis]) -> dict[str, list[str]]:
    """One row per measure, of one cell per run."""
    measures, rows = means(analyses)
    return {measure.label: [row[i + 1] for row in rows] for i, measure in enumerate(measures)}


def _blocks(analyses: Sequence[Analysis]) -> dict[str, list[list[str]]]:
    """Of each measure one row per block, of one cell per run."""
    tables = {}
    for measure in measures_of(analyses):
        columns = []
        for analysis in analyses:
            measured = analysis.comparison.measured.get(measure.name)
            numbers = zip(measured.blocks.mean, measured.blocks.deviation, strict=True) if measured else ()
            columns.append([shown(measure, *pair) for pair in numbers])
        depth = max(map(len, columns))
        padded = [column + [NOTHING] * (depth - len(column)) for column in columns]
        tables[measure.label] = [list(row) for row in zip(*padded, strict=True)]
    return tables


def _changed_options(analyses: Sequence[Analysis]) -> dict[str, list[str]]:
    """Options in which a run differs from the defaults: one row each, of one cell per run."""
    return {
        name: [str(analysis.config[name]) for analysis in analyses]
        for name, default in vars(FinetuneOptions()).items()
        if any(analysis.config[name] != default for analysis in analyses)
    }
