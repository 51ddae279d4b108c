"""What the host does before a launch: the same whether Triton is asked for the program or not, and little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from stochca_kernels import backward, backward_joint, forward, launch

ROOT = Path(__file__).parents[2]
# Python functions that one call calls, as counted on Python 3.11 with torch 2.11 and Triton 3.6.
MOST_CALLS = {
    "self, forward": 76,
    "self, backward": 60,
    "cross, forward": 83,
    "cross, backward": 59,
    "per sample, forward": 84,
    "per sample, backward": 84,
    "source, forward": 76,
}


@pytest.fixture(scope="module")
def calls():
    # Another process: in this one the kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.host_calls"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_what_is_remembered_is_launched_as_if_triton_were_asked(calls):
    # Calls that differ in anything that a program, its grid or its arguments depend on.
    programs = {(name, key) for name, key, _, _ in calls["asked"]}
    assert len(programs) > 100
    assert {name for name, _ in programs} == {
        "_attn_fwd_kernel",
        "_attn_bwd_dq_kernel",
        "_attn_bwd_dkdv_kernel",
        "_attn_bwd_joint_kernel",
    }
    assert calls["remembered"] == calls["asked"]


def test_a_call_that_was_made_before_asks_triton_for_nothing(calls):
    assert calls["searches"] == dict.fromkeys(MOST_CALLS, 0)


def test_a_call_takes_no_more_python_than_it_did(calls):
    assert {name: n for name, n in calls["counts"].items() if n > MOST_CALLS[name]} == {}


def test_kinds_of_launches_are_not_collected_without_bound():
    kinds = (
        forward._kind_of_launch,
        backward._kind_of_dq,
        backward._kind_of_dkdv,
        backward_joint._kind_of_launch,
    )
    assert {function.cache_info().maxsize for function in kinds} == {launch.MAX_KINDS}


def test_a_kind_keeps_no_tensor_alive():
    kind = launch.Launch(1, [(8, 4, 1)], 1, (3,), {"SIZE": 2})
    x, coins = torch.zeros(2), torch.zeros(2)
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((grid, arguments, constants))

    kind(Kernel(), (x,), (coins,))
    assert launched == [((1,), (x, 8, 4, 1, coins, 3), {"SIZE": 2})]
    assert kind._arguments == [None, 8, 4, 1, None, 3]
