"""All runs in sequence, from the options to the tables."""

import dataclasses
import gc
import json
import shlex
import signal
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stochca.checkpoint import STATE, SUMMARY
from stochca.config import DomainBedOptions
from stochca.distributed import World, processes
from stochca.domainbed.plan import RECORD, Plan, Run, check_folder, leave_one_out, make_plan, save_record
from stochca.domainbed.report import read_result, write_reports
from stochca.progress import Interrupted
from stochca.train import Trainer


class DomainBedInterrupted(Interrupted):
    """A signal stopped the command, which can be continued.

    Args:
        signum: The signal; 0 where it came to another process.
        complete: Runs that are.
        runs: All of them.
        output: Their folder.
    """

    def __init__(self, signum: int, complete: int, runs: int, output: Path) -> None:
        self.signum, self.output = signum or signal.SIGTERM, output
        Exception.__init__(
            self,
            f"stopped by {signal.Signals(self.signum).name} with {complete} of {runs} runs complete; "
            f"continue with: stochca domainbed --config {shlex.quote(str(output / RECORD))}",
        )


def domainbed(options: DomainBedOptions) -> dict[str, Any]:
    """Leave out one domain after the other, and compare methods on them, over several seeds.

    Each run is a fine-tuning in `<output>/<method>/seed-<n>/<domain>`, trained on the other domains and
    selected by their held-out images. A command whose folder is there is continued: complete runs are kept,
    an interrupted one is resumed. After each run it writes `results.csv` (runs), `table.csv` and `table.md`
    (methods). All processes that `torchrun` started share each run.

    Args:
        options: Of the command.

    Returns:
        `output`; `runs`, their number; `skipped`, the images that could not be read; `markdown`, the tables,
        empty in all processes but the first.

    Raises:
        DomainBedInterrupted: A signal stopped the command; the run at work is saved.
        FileNotFoundError: No folder of domains.
        FileExistsError: The output folder holds something else.
        ValueError: An option, the data or what is to be continued does not fit, or a run cannot go on.
    """
    with processes(options.device) as world:
        plan = make_plan(options)
        check_folder(plan)
        world.wait()  # all have seen the folder as it was
        if world.is_primary:
            save_record(plan)
        runs = plan.runs()
        for run in runs:
            # What the first process sees counts, should the others see files later.
            if not world.any(world.is_primary and run.is_complete):
                _train(run, runs, plan, world)
        text = write_reports(plan, _ordered(runs)) if world.is_primary else ""
        skipped = {name for run in runs for name in json.loads((run.folder / SUMMARY).read_text())["skipped"]}
    return {
        "output": str(plan.output),
        "runs": len(runs),
        "skipped": sorted(skipped),
        "markdown": text,
    }


def _train(run: Run, runs: list[Run], plan: Plan, world: World) -> None:
    """Begin or resume a run, take it to its end, and report all that are complete."""
    complete = sum(other.is_complete for other in runs)
    gc.collect()  # the last run's models may wait in cycles
    options = run.options
    if world.any(world.is_primary and (run.folder / STATE).is_file()):
        options = dataclasses.replace(options, resume=str(run.folder))
    if world.is_primary:
        tqdm.write(f"run {complete + 1} of {len(runs)}: {run}")
    try:
        trainer = Trainer(options, world, leave_one_out(options, run.domain))
        trainer.run()
    except Interrupted as interruption:
        raise DomainBedInterrupted(interruption.signum, complete, len(runs), plan.output) from interruption
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from error
    world.wait()  # the summary is written
    if world.is_primary:
        result = read_result(run, plan.domains)
        tqdm.write(f"{run}: {result['accuracy']:.2f} %, selected at step {result['selected_step']}")
        write_reports(plan, [other for other in _ordered(runs) if other.is_complete])
    if world.any(trainer.stop):  # too late for this run
        raise DomainBedInterrupted(trainer.stop.signum, complete + 1, len(runs), plan.output)


def _ordered(runs: list[Run]) -> list[Run]:
    """The runs of one method after the other, whose seeds and domains keep their order."""
    methods = list(dict.fromkeys(run.method for run in runs))
    return sorted(runs, key=lambda run: methods.index(run.method))
