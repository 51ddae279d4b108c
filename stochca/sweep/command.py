"""A sweep from its options to its table and plot."""

import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stochca.sweep.options import SweepOptions
from stochca.sweep.plan import RECORD, Run, make_plan, open_folder, record_plan
from stochca.sweep.report import Row, summarise, write_reports
from stochca.sweep.runs import Outcome, execute, locked, places


class SweepInterrupted(Exception):
    """A signal stopped the sweep, which can be continued.

    Args:
        signum: The signal.
        outcomes: Of the runs.
        output: Folder of the sweep.
    """

    def __init__(self, signum: int, outcomes: Mapping[Run, Outcome], output: Path) -> None:
        self.signum, self.output = signum, output
        complete = sum(outcome.status == "complete" for outcome in outcomes.values())
        super().__init__(
            f"stopped by {signal.Signals(signum).name} with {complete} of {len(outcomes)} runs complete; "
            f"continue with: stochca sweep --config {shlex.quote(str(output / RECORD))}"
        )


def sweep(options: SweepOptions) -> dict[str, Any]:
    """Fine-tune in several settings, each over several seeds, and compare them.

    Each run is a process of `stochca finetune` in `<output>/<setting>/seed-<n>`, with what it prints in
    `log.txt` there. A sweep whose folder is there is continued: complete runs are kept, interrupted ones
    resumed. It writes `results.csv` (runs), `table.csv` and `table.md` (settings), and, where matplotlib is
    installed, `sweep.png` and `sweep.svg`.

    Args:
        options: Of the sweep.

    Returns:
        `output`; `runs` and `complete`, their numbers; `failed`, what each failed run says, by its name;
        `markdown`, the table; `plots`, the paths, none without matplotlib or a complete run.

    Raises:
        SweepInterrupted: A signal stopped the sweep; its runs are saved.
        FileExistsError: The folder holds something else.
        ValueError: An option, or the sweep that is to be continued, does not fit.
    """
    plan = make_plan(options)
    runs = plan.runs()
    available = places([setting.options.device for setting in plan.settings], options.jobs)
    open_folder(plan.output)
    with locked(plan.output) as lock:
        record_plan(plan, options)
        outcomes, signum = execute(runs, available, lock)
        rows = summarise(outcomes, options.spread)
        text = write_reports(plan.output, outcomes, rows, options.spread)
        plots = _draw(plan.output, rows, options)
    if signum:
        raise SweepInterrupted(signum, outcomes, plan.output)
    return {
        "output": str(plan.output),
        "runs": len(runs),
        "complete": sum(outcome.status == "complete" for outcome in outcomes.values()),
        "failed": {str(run): outcome.message for run, outcome in outcomes.items() if outcome.message},
        "markdown": text,
        "plots": [str(path) for path in plots],
    }


def _draw(output: Path, rows: Sequence[Row], options: SweepOptions) -> list[Path]:
    if not any(row.estimates[options.metric].n for row in rows):
        return []
    try:
        from stochca.sweep.plot import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        tqdm.write("the plot is left out, as it needs matplotlib: pip install stochca[plots]")
        return []
    return draw(rows, options.metric, options.spread, output)
