"""Runs as processes: what they come to, alone, interrupted, killed and failing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stochca.checkpoint import load_state
from stochca.cli import main
from stochca.config import FinetuneOptions
from stochca.sweep.command import sweep
from stochca.sweep.options import SweepOptions
from stochca.sweep.runs import places
from stochca.train import finetune
from tests.sweep.conftest import rows_of

# A list for another number of blocks than there are.
BROKEN = {"name": "broken", "p": [0.1, 0.2, 0.3]}

SWEEP = """
import json, sys
from stochca.sweep.command import SweepInterrupted, sweep
from stochca.sweep.options import SweepOptions
try:
    sweep(SweepOptions(**json.loads(sys.argv[1])))
except SweepInterrupted as interruption:
    sys.stderr.write(str(interruption))
    sys.exit(128 + interruption.signum)
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread_for_each_of_two_jobs():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Sums depend on the number of threads.
        patch.setenv("OMP_NUM_THREADS", "2")
        yield


@pytest.fixture(scope="module")
def swept(base, tmp_path_factory) -> tuple[Path, dict]:
    """A sweep that nothing disturbed: its folder and what it returned."""
    output = tmp_path_factory.mktemp("sweeps") / "swept"
    options = SweepOptions(base=base, p=[0.5], settings=[BROKEN], seeds=[0, 1], jobs=2, output=str(output))
    return output, sweep(options)


def assert_same_weights(folder: Path, expected: Path):
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(folder / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("images_per_second", "output")}


def start(options: SweepOptions) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, json.dumps(vars(options))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process: subprocess.Popen):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stat_of(process: int) -> list[str]:
    """State, parent and so on; nothing if it is gone."""
    try:
        # The name before them stands in parentheses.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def children_of(process: subprocess.Popen) -> list[int]:
    """The processes of the runs."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if stat_of(number)[1:2] == [str(process.pid)]]


def wait_until_gone(processes: list[int]):
    """Wait for processes that were killed; whose child they are now may leave them as zombies."""
    deadline = time.monotonic() + 30
    while any(stat_of(process)[:1] not in ([], ["Z"]) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failing_setting_is_reported_and_the_others_complete(swept):
    output, result = swept
    assert (result["runs"], result["complete"]) == (4, 2)
    assert list(result["failed"]) == ["broken, seed 0", "broken, seed 1"]
    for seed in (0, 1):
        message = result["failed"][f"broken, seed {seed}"]
        assert message.startswith("exit code 2\nstochca finetune: ")
        assert "one per block (2)" in message
        assert message.splitlines()[-1] in (output / "broken" / f"seed-{seed}" / "log.txt").read_text()
    assert [(row["setting"], row["seed"], row["status"]) for row in rows_of(output / "results.csv")] == [
        ("p=0.5", "0", "complete"),
        ("broken", "0", "failed"),
        ("p=0.5", "1", "complete"),
        ("broken", "1", "failed"),
    ]
    table = [(row["setting"], row["n"]) for row in rows_of(output / "table.csv")]
    assert table == [("p=0.5", "2"), ("broken", "0")]
    assert (output / "sweep.png").is_file()


def test_a_run_of_a_sweep_is_the_run_of_finetune(swept, base, tmp_path):
    folder = swept[0] / "p=0.5" / "seed-1"
    options = FinetuneOptions(**{**base, "p": 0.5, "seed": 1, "output": str(tmp_path / "run")})
    summary = finetune(options)
    assert_same_weights(folder, tmp_path / "run")
    assert without_times(json.loads((folder / "summary.json").read_text())) == without_times(summary)


def test_what_is_complete_is_not_run_again(swept, make_options):
    options = make_options(p=[0.5])
    shutil.copytree(swept[0] / "p=0.5", f"{options.output}/p=0.5")
    Path(f"{options.output}/sweep.yaml").write_text(json.dumps(vars(options)))
    files = [path for path in Path(options.output, "p=0.5").rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    result = sweep(options)
    assert (result["complete"], result["failed"]) == (2, {})
    assert rows_of(f"{options.output}/table.csv") == rows_of(swept[0] / "table.csv")[:1]
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_the_command_goes_on_prints_its_table_and_names_what_failed(swept, make_options, base, capsys):
    options = make_options(p=[0.5], settings=[BROKEN], seeds=[0])
    shutil.copytree(swept[0] / "p=0.5" / "seed-0", f"{options.output}/p=0.5/seed-0")
    Path(f"{options.output}/sweep.yaml").write_text(json.dumps(vars(options)))
    flags = ["--p", "0.5", "--seeds", "0", "--base", json.dumps(base), "--settings", json.dumps([BROKEN])]
    assert main(["sweep", *flags, "--output", options.output]) == 1
    printed = capsys.readouterr()
    assert "| p=0.5 | 1 |" in printed.out
    assert f"1 of 2 runs are in {options.output}" in printed.out
    assert "broken, seed 0" in printed.err
    assert "one per block (2)" in printed.err


def test_a_sweep_that_is_killed_ends_as_if_it_had_not_been(swept, make_options):
    options = make_options(p=[0.5], jobs=2)
    output = Path(options.output)
    process = start(options)
    runs = [output / "p=0.5" / f"seed-{seed}" for seed in (0, 1)]
    wait_until(lambda: any((run / "trainer_state.pt").is_file() for run in runs), process)
    children = children_of(process)
    # A signal to the group of the sweep comes to them from the sweep alone.
    assert [os.getpgid(child) for child in children] == children
    assert len(children) == 2
    process.kill()
    process.communicate()
    with pytest.raises(ValueError, match=r"another sweep is at work in .*, or runs that outlived one"):
        sweep(options)
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait_until_gone(children)
    states = [run / "trainer_state.pt" for run in runs]
    assert any(0 < load_state(state)["step"] < 40 for state in states if state.exists())
    assert not all((run / "summary.json").exists() for run in runs)

    result = sweep(options)
    assert (result["complete"], result["failed"]) == (2, {})
    for run in runs:
        assert_same_weights(run, swept[0] / run.relative_to(output))
    assert rows_of(output / "table.csv") == rows_of(swept[0] / "table.csv")[:1]
    ours, theirs = (
        [without_times(row) for row in rows_of(folder / "results.csv") if row["setting"] == "p=0.5"]
        for folder in (output, swept[0])
    )
    assert ours == theirs


def test_a_signal_has_the_runs_save_themselves_and_the_sweep_says_how_to_go_on(make_options, base):
    options = make_options(base={**base, "epochs": 1000}, seeds=[0], jobs=1)
    output = Path(options.output)
    process = start(options)
    state = output / "p=0" / "seed-0" / "trainer_state.pt"
    wait_until(state.is_file, process)
    # As a terminal does: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: the runs at work save and stop" in errors
    assert f"0 of 2 runs complete; continue with: stochca sweep --config {output}/sweep.yaml" in errors
    assert "Traceback" not in errors
    log = (output / "p=0" / "seed-0" / "log.txt").read_text()
    assert f"stopped by SIGINT after step {load_state(state)['step']};" in log
    rows = rows_of(output / "results.csv")
    assert [row["status"] for row in rows] == ["interrupted", "waiting"]
    assert not (output / "p=0.5").exists()


@pytest.mark.parametrize(
    ("visible", "jobs", "expected"),
    [
        (None, None, ["0", "1", "2"]),
        ("5,7", None, ["5", "7"]),
        (None, 2, ["0", "1"]),
        (None, 4, ["0", "1", "2", "0"]),
    ],
)
def test_each_job_has_a_gpu_of_its_own(monkeypatch, visible, jobs, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible.split(",")) if visible else 3)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for device in ("auto", "cuda"):
        assert places([device], jobs) == [{"CUDA_VISIBLE_DEVICES": name} for name in expected]
    with pytest.raises(ValueError, match=r"device must be cuda, auto or cpu.*got cuda:1"):
        places(["cuda", "cuda:1"], jobs)


@pytest.mark.parametrize(("jobs", "expected"), [(None, ["4"] * 3), (4, ["3"] * 4), (50, ["1"] * 50)])
def test_the_threads_of_the_cpu_are_divided_among_the_jobs(monkeypatch, jobs, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    assert places(["cpu"], jobs) == [{"OMP_NUM_THREADS": threads} for threads in expected]
