"""The evaluations of a run: which of them is the best, and whether another can be expected."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

Metric = Literal["top1", "loss"]


class History:
    """Rows of metrics, one for each evaluation.

    Args:
        metric: What selects: the largest `top1`, or the smallest `val_loss`; the first of equals.
        patience: After how many evaluations without a better one a run stops; None for never.

    Attributes:
        rows: From the first evaluation to the last.
    """

    def __init__(self, metric: Metric, patience: int | None = None) -> None:
        self.metric = metric
        self.patience = patience
        self.rows: list[dict[str, Any]] = []

    @property
    def last_step(self) -> int:
        """The step of the last evaluation, -1 before the first."""
        return self.rows[-1]["step"] if self.rows else -1

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, None before the first."""
        return self.best()["step"] if self.rows else None

    def best(self) -> dict[str, Any]:
        """The evaluation that selects the best checkpoint."""
        if self.metric == "loss":
            return min(self.rows, key=lambda row: row["val_loss"])
        return max(self.rows, key=lambda row: row["top1"])

    def is_exhausted(self) -> bool:
        """Whether the last `patience` evaluations have not been better than the best before them."""
        if self.patience is None or not self.rows:
            return False
        return len(self.rows) - 1 - self.rows.index(self.best()) >= self.patience


def selected(results: Mapping[str, Mapping[str, float]], selection: Sequence[str]) -> dict[str, float]:
    """The metrics that select, means over splits, and those of each split where there are several."""
    metrics = {
        "val_loss": fmean(results[name]["loss"] for name in selection),
        "top1": fmean(results[name]["top1"] for name in selection),
        "top5": fmean(results[name]["top5"] for name in selection),
    }
    if len(results) > 1:
        metrics |= {f"{name}_top1": result["top1"] for name, result in results.items()}
    return metrics
