"""Experiments compute attention, and say what their programs need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.experiments import descriptors
from bench.experiments.__main__ import main
from stochca_kernels import stochca_attention
from stochca_kernels.testing import make_inputs
from stochca_kernels.tiles import Tiles

ROOT = Path(__file__).parents[1]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")


@interpreted
@pytest.mark.parametrize("length", [16, 32, 50, 65])
@pytest.mark.parametrize("warp_specialize", [False, True], ids=["", "specialized"])
def test_descriptors_attend(length, warp_specialize):
    q, (k, v), _, _ = make_inputs(2, 2, 33, length, length, 16)
    request = descriptors.request(q, k, v, Tiles(16, 16, 4, 2, "test"), warp_specialize)
    request.out.fill_(float("nan"))
    torch.testing.assert_close(request.run(), stochca_attention(q, (k, v), None, False, impl="reference"))


def test_gluon_compiles_for_hopper():
    # In another process: in this one kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.experiments", "--compile", "--only", "Gluon"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 10
    for line in lines:
        found = dict(pair.rsplit(" ", 1) for pair in line.partition("sm_90 ")[2].split(", "))
        assert (found["spills"], found["tma"]) == ("0", "2"), line
        assert int(found["wgmma"]) >= 8
        assert int(found["registers_later"]) > int(found["registers"])


@pytest.mark.parametrize(("value", "message"), [("1", "unset TRITON_INTERPRET"), ("", "no experiment")])
def test_arguments_that_cannot_be_met_are_refused(value, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert message in capsys.readouterr().err
