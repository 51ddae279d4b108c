"""Recorded results, and whether the code is still the one they measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.digest import ROOT, digests, file_digest
from bench.report.markdown import commit, paragraph

COMMANDS = {
    "counts": "python -m bench.counts --output bench/results/counts.json",
    "demo": "make demo && cp runs/demo/metrics.json bench/results/demo.json",
    "kernels": "python3 -m bench.kernels --quick --output bench/results/kernels.json",
    "programs": "python -m bench.programs --output bench/results/programs.json",
    "step": "python3 -m bench.step --quick --output bench/results/step.json",
    "step-cpu": "python -m bench.step --cpu --output bench/results/step-cpu.json",
    "parts": "python -m bench.parts --output bench/results/parts.json",
    "float8": "python -m bench.float8 --output bench/results/float8.json",
    "scaling": "python -m bench.scaling --output bench/results/scaling.json",
}
"""What records each result."""


@dataclass(frozen=True)
class Results:
    """The results of a checkout.

    Args:
        root: Of the repository: results are in `bench/results`, the code that they measured lies around them.
    """

    root: Path = ROOT

    def read(self, name: str) -> dict[str, Any] | None:
        """A result, None where it has not been recorded."""
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def need(self, name: str) -> dict[str, Any]:
        """A result that pages cannot be without.

        Raises:
            FileNotFoundError: It has not been recorded.
        """
        result = self.read(name)
        if result is None:
            raise FileNotFoundError(f"bench/results/{name}.json is missing: `{COMMANDS[name]}` records it")
        return result

    def is_stale(self, result: Mapping[str, Any]) -> bool:
        """Whether the code is no longer what the result measured, or nobody can know.

        A result that starts from another one names it under "inputs", with its digest or None where there was
        none, and is stale as well when that one appears, changes or goes.
        """
        return not result.get("code") or bool(self._changed(result) or self._other_inputs(result))

    def stale_note(self, name: str, result: Mapping[str, Any]) -> str:
        """What a page says above a result that is older than its code, empty for others."""
        if not self.is_stale(result):
            return ""
        reason = f"measured at commit {commit(result)}"
        if not result.get("code"):
            reason += ", before digests of code were recorded."
        elif changed := ", ".join(f"`{prefix}`" for prefix in self._changed(result)):
            reason += f", after which this code has changed: {changed}."
        else:
            reason += "."
        if inputs := ", ".join(f"`bench/results/{of}.json`" for of in self._other_inputs(result)):
            reason += f" It did not start from this result as it is now: {inputs}."
        return paragraph(f"**Stale**: {reason}", f"`{COMMANDS[name]}` measures it again.") + "\n\n"

    def _changed(self, result: Mapping[str, Any]) -> list[str]:
        return [prefix for prefix, digest in result["code"].items() if self._digest(prefix) != digest]

    def _other_inputs(self, result: Mapping[str, Any]) -> list[str]:
        inputs = result.get("inputs", {})
        return [name for name, digest in inputs.items() if file_digest(self._path(name)) != digest]

    def _path(self, name: str) -> Path:
        return self.root / "bench" / "results" / f"{name}.json"

    def _digest(self, prefix: str) -> str | None:
        try:
            return digests([prefix], self.root)[prefix]
        except FileNotFoundError:
            return None


def not_measured(name: str) -> str:
    """What a page says where a result is missing."""
    return f"Not measured yet: `{COMMANDS[name]}` measures it."
