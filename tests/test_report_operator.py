"""Every case of the operator is in its page, whoever wins it."""

import pytest

from bench.report import operator
from tests.recorded import make_checkout, record


def timed(p50_us):
    return {"status": "timed", "p20_us": 0.9 * p50_us, "p50_us": p50_us, "p80_us": 1.1 * p50_us}


@pytest.fixture
def checkout(tmp_path):
    results = make_checkout(tmp_path)
    unsupported = {"status": "unsupported", "reason": "no kernel\nsecond line"}
    cases = [
        {
            "name": "self forward A",
            "best_rival": "cudnn",
            "ratio": 1.5,
            "providers": {"ours": timed(10.0), "cudnn": timed(15.0), "flash": unsupported},
        },
        {
            "name": "self forward B",
            "best_rival": "flash",
            "ratio": 0.8,
            "providers": {"ours": timed(10.0), "flash": timed(8.0)},
        },
        {
            "name": "self backward",
            "best_rival": None,
            "ratio": None,
            "providers": {"ours": {"status": "wrong", "reason": "5 times the error"}},
        },
        {"name": "cross", "reason": "OutOfMemoryError: 9 GiB"},
    ]
    goals = [
        {"goal": "forward", "at_least": 1.3, "ratio": 0.8, "verdict": "missed"},
        {"goal": "backward", "at_least": 1.15, "ratio": None, "verdict": "not measured"},
    ]
    record(results, "kernels", {"dtype": "bfloat16", "cases": cases, "goals": goals, "seconds": 9.0})
    return results


def test_winning_losing_and_failing_cases_are_shown(checkout):
    lines = operator.measured(checkout).splitlines()
    for line in (
        "| forward | 1.30 | 0.80 | **missed** |",
        "| backward | 1.15 | - | **not measured** |",
        "| self forward A | 10.0 (9.00-11.0) | cudnn | 15.0 (13.5-16.5) | 1.50 |",
        "| self forward B | 10.0 (9.00-11.0) | flash | 8.00 (7.20-8.80) | **0.80** |",
        "| self backward | *wrong* | - | - | - |",
        "| cross | - | - | - | - |",
        "- self forward A, flash: *unsupported*, no kernel",
        "- self backward, ours: *wrong*, 5 times the error",
        "- cross, all: *failed*, OutOfMemoryError: 9 GiB",
    ):
        assert line in lines


def test_what_is_missing_or_stale_is_said(checkout):
    assert "**Stale**" not in operator.measured(checkout)
    (checkout.root / "code" / "one.py").write_text("x = 2\n")
    assert operator.measured(checkout).startswith("**Stale**")
    (checkout.root / "bench" / "results" / "kernels.json").unlink()
    assert operator.measured(checkout).startswith("Not measured yet: `python3 -m bench.kernels")
