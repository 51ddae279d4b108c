"""Two processes run what one does with batches twice as large."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stochca.config import DomainBedOptions
from stochca.domainbed import domainbed
from tests.domainbed.conftest import metrics_of, results_of, values_of

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OPTIONS = {"test_domains": ["Real World"], "steps": 4}


def test_two_processes_share_each_run(folder, tmp_path):
    options = tmp_path / "options.json"
    options.write_text(json.dumps(values_of(folder, tmp_path / "two", **OPTIONS, batch_size=2)))
    done = subprocess.run(
        [*TORCHRUN, "-m", "tests.domainbed.runs", str(options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("run 1 of 1: stochca, seed 0, without Real World") == 1
    domainbed(DomainBedOptions(**values_of(folder, tmp_path / "one", **OPTIONS, batch_size=4)))
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")
    assert (tmp_path / "two" / "table.md").read_text() == (tmp_path / "one" / "table.md").read_text()
    two, one = (tmp_path / name / "stochca" / "seed-0" / "Real World" for name in ("two", "one"))
    ours, theirs = (load_file(run / "last.safetensors") for run in (two, one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5)
    for row, expected in zip(metrics_of(two), metrics_of(one), strict=True):
        assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
