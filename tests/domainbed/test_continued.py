"""A command that was stopped goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stochca.config import DomainBedOptions
from stochca.domainbed import DomainBedInterrupted, domainbed
from stochca.progress import Interrupted
from stochca.train import Trainer
from tests.domainbed.conftest import results_of, values_of

ROOT = Path(__file__).parents[2]
OPTIONS = {"methods": ["erm", "stochca"], "test_domains": ["clay"], "recovery_interval": 1}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Path:
    """The folder of a command that nobody stopped."""
    output = tmp_path_factory.mktemp("undisturbed") / "bed"
    domainbed(DomainBedOptions(**values_of(folder, output, **OPTIONS)))
    return output


def assert_same(output, undisturbed):
    assert results_of(output) == results_of(undisturbed)
    for name in ("table.md", "table.csv"):
        assert (output / name).read_text() == (undisturbed / name).read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_at_work(make_options, undisturbed, tmp_path, monkeypatch, signum):
    step = Trainer._train_step

    def stopped_after_the_third(self, *arguments):
        if self.options.methods == ["stochca"] and self.step == 2:
            os.kill(os.getpid(), signum)
        return step(self, *arguments)

    output = tmp_path / "bed"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped_after_the_third)
        with pytest.raises(Interrupted) as caught:
            domainbed(make_options(**OPTIONS))
    assert isinstance(caught.value, DomainBedInterrupted)
    assert caught.value.signum == signum
    assert str(caught.value) == (
        f"stopped by {signum.name} with 1 of 2 runs complete; "
        f"continue with: stochca domainbed --config {output}/domainbed.yaml"
    )
    assert len(results_of(output)) == 1
    written = (output / "erm" / "seed-0" / "clay" / "summary.json").stat().st_mtime_ns
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "_train_step", lambda self, *rest: (steps.append(self.step), step(self, *rest))[1]
        )
        domainbed(DomainBedOptions(**yaml.safe_load((output / "domainbed.yaml").read_text())))
    assert steps == [3, 4, 5]
    assert (output / "erm" / "seed-0" / "clay" / "summary.json").stat().st_mtime_ns == written
    assert_same(output, undisturbed)


def test_a_signal_at_the_end_of_a_run_stops_before_the_next(make_options, tmp_path, monkeypatch):
    is_over = Trainer._is_over

    def stopped_when_it_is(self):  # after the run's last look at signals
        if is_over(self) and not self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return is_over(self)

    monkeypatch.setattr(Trainer, "_is_over", stopped_when_it_is)
    with pytest.raises(DomainBedInterrupted, match="stopped by SIGTERM with 1 of 2 runs complete"):
        domainbed(make_options(**OPTIONS))
    assert len(results_of(tmp_path / "bed")) == 1
    assert not (tmp_path / "bed" / "stochca").exists()


def test_a_killed_command_continues(folder, undisturbed, tmp_path):
    output = tmp_path / "bed"
    values = values_of(folder, output, **OPTIONS)
    (tmp_path / "options.json").write_text(json.dumps(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.domainbed.runs", str(tmp_path / "options.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (output / "stochca" / "seed-0" / "clay" / "trainer_state.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (output / "stochca" / "seed-0" / "clay" / "summary.json").exists()
    domainbed(DomainBedOptions(**values))
    assert_same(output, undisturbed)
