"""The pages, and which of their sections are rendered."""

import re
from collections.abc import Callable, Mapping

from bench.report import benchmarks, method, operator, pieces, reliability, scaling
from bench.report.recorded import Results

Section = Callable[[Results], str]

PAGES: Mapping[str, Mapping[str, Section]] = {
    "README.md": {
        "counts": method.counts,
        "step": benchmarks.readme_gpu,
        "step-cpu": benchmarks.readme_cpu,
        "demo": method.demo,
        "reliability": reliability.readme,
    },
    "docs/choosing-p.md": {
        "counts": method.counts,
        "demo": method.demo,
    },
    "docs/kernels.md": {
        "kernels": operator.measured,
        "prediction": operator.prediction,
        "programs": operator.programs,
    },
    "docs/benchmarks.md": {
        "goals": benchmarks.goals,
        "step": benchmarks.gpu,
        "prediction": benchmarks.prediction,
        "step-cpu": benchmarks.cpu,
        "parts": pieces.parts,
        "float8": pieces.float8,
        "scaling": scaling.section,
    },
    "docs/reliability.md": {
        "scorecard": reliability.scorecard,
        "where": reliability.where,
    },
}


def render(text: str, sections: Mapping[str, Section], results: Results) -> tuple[str, list[str]]:
    """A page with every section filled in.

    Args:
        text: Of the page; a section lies between `<!-- name -->` and `<!-- /name -->`.
        sections: What fills each of them.
        results: Where the numbers come from.

    Returns:
        The page, and the names of the sections that had said anything else.

    Raises:
        ValueError: The page has not the sections that it should have.
    """
    found = re.findall(r"^<!-- ([a-z0-9-]+) -->$", text, flags=re.MULTILINE)
    if sorted(found) != sorted(sections):
        raise ValueError(f"sections must be {', '.join(sorted(sections))}, got {', '.join(sorted(found))}")
    differing = []
    for name, section in sections.items():
        match = re.search(rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$", text, re.DOTALL | re.MULTILINE)
        if match is None:
            raise ValueError(f"section <!-- {name} --> must end with <!-- /{name} -->")
        filled = f"{section(results)}\n"
        if filled != match[1]:
            differing.append(name)
        text = f"{text[: match.start(1)]}{filled}{text[match.end(1) :]}"
    return text, differing
