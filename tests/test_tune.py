"""Tuning: the fastest candidate that is right becomes a row that the table understands."""

import argparse
import ast
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.kernels.shapes import TINY
from bench.tune import __main__ as command
from bench.tune import timing, winners
from bench.tune.__main__ import main
from bench.tune.candidates import candidates
from bench.tune.choice import column, fastest, format_row, format_tiles, format_winner
from bench.tune.compiled import Figures
from bench.tune.groups import KERNELS, Group, groups
from bench.tune.timing import Settings, Timed, difference, time_group
from bench.tune.uses import USES, Use, forced
from bench.tune.winners import KINDS, choose_winners
from stochca_kernels import forward, tiles
from stochca_kernels.dispatch import _WINNERS, Winner
from stochca_kernels.tiles import Tiles

ROOT = Path(__file__).parents[1]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")
GROUP = Group("fwd", 0, 208, (TINY,))
SETTINGS = Settings(torch.device("cpu"), torch.float32, 2)
ORIGIN = "NVIDIA H200, commit 94bdd42"


def times(*p50_us):
    return [Timed({"p50_us": t}) if t else Timed({}, "wrong") for t in p50_us]


def test_dry_run_lists_what_compiles(tmp_path):
    # In another process: in this one kernels may be interpreted.
    path = tmp_path / "tune.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--dry-run", "--quick", "--only", "dqkv", "--at-most", "2", "--workers", "1", "--output", path]
    run = subprocess.run(
        [sys.executable, "-m", "bench.tune", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(path.read_text())
    (group,) = result["groups"]
    assert result["rows"] == []
    assert [c["tiles"] for c in group["candidates"]] == [
        "Tiles(32, 0, 8, 2, smallest_part=64)",
        "Tiles(32, 0, 4, 2, smallest_part=64)",
    ]
    fits, spills = group["candidates"]
    assert fits["dropped"] == ""
    assert 128 < fits["registers"] < 256
    assert 0 < fits["shared"] <= 227 << 10
    assert fits["wgmma"] > 0
    assert "spills" in spills["dropped"]
    assert "dqkv column 0 up to 256 keys" in run.stdout


def test_the_fastest_in_all_cases_wins():
    assert fastest({"a": times(3, 2, 5), "b": times(3, 5, 5)}) == (0, pytest.approx(3))
    assert fastest({"a": times(3, 2), "b": times(3, 4)}) == (1, pytest.approx(8**0.5))


def test_who_was_refused_once_is_out():
    assert fastest({"a": times(9, 1), "b": times(9, None)}) == (0, pytest.approx(9))
    assert fastest({"a": times(None, None)}) is None
    assert fastest({}) is None


def test_a_printed_row_is_the_same_in_the_table():
    narrow = (Tiles(64, 0, 4, 1, ORIGIN, 208, True, 64), Tiles(128, 128, 8, 2, ORIGIN, block_c=64))
    for columns in ((narrow, (Tiles(64, 64, 4, 2, "compiled"),)), (narrow[:1], ())):
        lines = format_row(("fwd", "sm_90", "half"), columns)
        assert eval("{" + "\n".join(lines) + "}") == {("fwd", "sm_90", "half"): columns}
    assert format_tiles(narrow[1]) == f'Tiles(128, 128, 8, 2, "{ORIGIN}", block_c=64)'


def test_every_row_of_the_table_can_be_printed():
    for key, columns in tiles._TABLE.items():
        assert eval("{" + "\n".join(format_row(key, columns)) + "}") == {key: columns}


def test_rows_that_were_not_tuned_stay():
    present = (Tiles(64, 0, 4, 1, "compiled", max_keys=272), Tiles(64, 64, 4, 3, "compiled"))
    quick, slow = Tiles(128, 64, 8, 2, "candidate"), Tiles(64, 0, 8, 1, "candidate")
    assert column(present, {208: slow}, ORIGIN) == (
        slow._replace(origin=ORIGIN, max_keys=208),
        *present,
    )
    # Two rows with the same tiles are one.
    assert column(present, {272: quick, None: quick}, ORIGIN) == (quick._replace(origin=ORIGIN),)
    assert column(present, {}, ORIGIN) == present


def test_a_kernel_that_loses_has_no_row():
    present = tiles._TABLE["dqkv", "sm_90", "half"][0]
    assert column(present, {256: None}, ORIGIN) == present[:1]
    assert column((), {256: None}, ORIGIN) == ()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: x * 1.02, "differs"),
        (lambda x: x * float("nan"), "differs"),
        (lambda x: torch.cat([x[:-1], x[-1:] * 2]), "differs"),
        (lambda x: x[1:], "is torch"),
        (lambda x: x.float(), "is torch"),
    ],
    ids=["scaled", "NaN", "last row", "short", "dtype"],
)
def test_wrong_results_are_told_from_rounding(spoil, reason):
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    present = {"0": exact.bfloat16()}
    assert difference({"0": (exact * (1 + 1e-3)).bfloat16()}, present) == ""
    assert reason in difference({"0": spoil(present["0"])}, present)
    assert "0 results" in difference({}, present)


@interpreted
def test_a_wrong_candidate_is_refused_and_the_others_timed(monkeypatch):
    """Even the fastest: what is compared is what these tiles really compute."""
    right, wrong = Tiles(16, 16, 4, 1, "candidate"), Tiles(32, 16, 4, 1, "candidate")
    launch = forward._attn_fwd_kernel

    class Spoiled:
        def __getitem__(self, grid):
            def run(*args, BLOCK_M, **constants):
                args = list(args)
                position = launch.arg_names.index("scale")
                args[position] *= 1.1 if BLOCK_M == 32 else 1.0
                launch[grid](*args, BLOCK_M=BLOCK_M, **constants)

            return run

    monkeypatch.setattr(forward, "_attn_fwd_kernel", Spoiled())
    timed = time_group(GROUP, [wrong, right], SETTINGS)
    assert set(timed) == {f"{use} {TINY.name}" for use in ("self", "cross with source")}
    for refused, kept in timed.values():
        assert refused.times == {}
        assert "wrong: result 0 differs" in refused.reason
        assert 0 < kept.times["p20_us"] <= kept.times["p50_us"] <= kept.times["p80_us"]
    assert fastest(timed)[0] == 1


def test_a_candidate_that_fails_stops_nobody(monkeypatch):
    def run(tensors, scale):
        if forward.choose_tiles("fwd", tensors["x"], 1) == (broken,):
            raise MemoryError("too much")
        return (tensors["x"],)

    right, broken = Tiles(16, 16, 4, 1, "candidate"), Tiles(32, 16, 4, 1, "candidate")
    use = Use("one", lambda draw: {"x": draw.normal(2, 3)}, run)
    monkeypatch.setitem(timing.USES, "fwd", (use,))
    ((failed, kept),) = time_group(GROUP, [broken, right], SETTINGS).values()
    assert failed.reason == "failed: MemoryError: too much"
    assert kept.times


def test_only_one_kernel_is_forced():
    q, tile = torch.empty(1, 1, 5, 16), Tiles(16, 16, 4, 1, "candidate")
    with forced("fwd", tile):
        assert forward.choose_tiles("fwd", q, 5) == (tile,)
        assert forward.choose_tiles("dq", q, 5) == tiles.choose_tiles("dq", q, 5)
    with forced("dqkv", None):
        assert forward.choose_tiles("dqkv", q, 5) == ()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("quick", [False, True], ids=["all", "quick"])
def test_candidates_are_different_and_the_present_one_is_the_first(kernel, quick):
    assert any(use.timed for use in USES[kernel])
    for group in groups(kernel, quick):
        present = group.present("sm_90", "half")
        tried = candidates(group, "half", present, quick)
        assert tried[0] == present._replace(origin="candidate", max_keys=None)
        assert len(set(tried)) == len(tried) >= 3
        assert (None in tried) == (kernel == "dqkv")
        # The row for any number of keys cannot keep them on chip.
        assert group.most_keys or all(tile.block_n for tile in tried)
        assert any(row._replace(origin="candidate", max_keys=None) == tried[0] for row in table(group))


def table(group):
    return tiles._TABLE[group.kernel, "sm_90", "half"][group.column]


def test_winners_are_timed_with_the_rows_that_were_found():
    q, row = torch.empty(1, 1, 5, 16), Tiles(16, 16, 4, 1, ORIGIN)
    before = tiles.choose_tiles("fwd", q, 5)
    with winners.installed({("fwd", "sm_90", "half"): ((row,), ())}):
        assert tiles.choose_tiles("fwd", q, 5) == (row,)
    assert tiles.choose_tiles("fwd", q, 5) == before


def test_winners_are_chosen_by_length():
    kind = KINDS[0]

    def case(length, triton, sdpa):
        entries = {"triton": {"p50_us": triton}, "sdpa": {"p50_us": sdpa} if sdpa else {"reason": "wrong"}}
        return {"shape": {"length": length}, "providers": entries}

    triton, sdpa = Winner("triton", ORIGIN), Winner("sdpa", ORIGIN)
    cases = [case(197, 1, 2), case(257, 1, 2), case(785, 3, 2), case(1370, 3, 2)]
    assert choose_winners(kind, cases, ORIGIN) == [(272, triton), (None, sdpa)]
    assert choose_winners(kind, [case(785, 3, 2), case(1370, 1, 2)], ORIGIN) == [(None, triton)]
    assert choose_winners(kind, [case(197, 3, None)], ORIGIN) == [(208, triton)]
    assert choose_winners(kind, [{"shape": {"length": 197}, "reason": "failed"}], ORIGIN) == []
    line = format_winner(kind.name, "sm_90", 272, triton)
    assert eval(f"[{line}]") == [("self-attention", "sm_90", 272, triton)]


def test_kinds_are_those_of_the_table():
    assert {kind.name for kind in KINDS} == {row[0] for row in _WINNERS}
    for kind in KINDS:
        assert {row[3].choice for row in _WINNERS if row[0] == kind.name} <= set(kind.competitors)


def arguments(**others):
    fixed = {"gpu": "sm_90", "dtype": "float32", "quick": True, "dry_run": False, "at_most": None}
    return argparse.Namespace(**fixed, only=("fwd", "winners"), commit=None, **others)


@interpreted
def test_rows_and_winners_are_printed_and_recorded(monkeypatch, tmp_path, capsys):
    """All that a GPU would do but compiling, on the CPU."""

    def compiled(pool, group, tried, *arguments):
        done = [Future() for _ in tried]
        for i, future in enumerate(done):
            future.set_result(Figures("spills 8 bytes" if i > 1 else "", 99))
        return done

    small = Group("fwd", 0, 208, (TINY,))
    kinds = [k._replace(paths=tuple(replace(p, shapes=(TINY,)) for p in k.paths)) for k in KINDS[:2]]
    monkeypatch.setattr(command, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(command, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(command, "groups", lambda kernel, quick: [small])
    monkeypatch.setattr(command, "submit", compiled)
    monkeypatch.setattr(command, "KINDS", kinds)
    monkeypatch.setattr(winners, "MAIN", (TINY,))
    path = tmp_path / "new" / "tune.json"
    args = arguments(output=path, minutes=5)
    before = dict(tiles._TABLE)
    result = {"gpu": {"name": "CPU"}, "commit": "94bdd42abc", "dirty": True, "groups": [], "rows": []}
    command._run(args, None, result)
    printed = capsys.readouterr().out
    ((key, (narrow, wide)),) = eval("{" + "\n".join(result["rows"]) + "}").items()
    assert key == ("fwd", "nvidia", "ieee")
    assert (narrow[-1], wide) == (before[key][0][-1], before[key][1])
    assert narrow[0].origin == "CPU, commit 94bdd42"
    assert narrow[0].max_keys == 208
    for line in (*result["rows"], *result["winners"]):
        assert line in printed
    rows = eval("[" + "\n".join(result["winners"]) + "]")
    assert [row[:3] for row in rows] == [(kind.name, "sm_90", 208) for kind in KINDS[:2]]
    assert "Not a clean checkout" in printed
    recorded = json.loads(path.read_text())
    assert recorded["rows"] == result["rows"]
    assert all("p50_us" in each for each in recorded["groups"][0]["cases"]["self B2-N20-H2-D16"])
    assert before == tiles._TABLE, "the table is not changed"


@interpreted
def test_nothing_new_is_started_when_time_is_over(monkeypatch, capsys):
    monkeypatch.setattr(command, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(command, "submit", lambda *_: [Future()])
    args = arguments(output=None, minutes=-1)
    result = {"gpu": None, "commit": None, "dirty": None, "groups": [], "rows": []}
    command._run(args, None, result)
    assert result["rows"] == result["winners"] == []
    assert capsys.readouterr().out.count("out of time") == len(groups("fwd", True)) + len(KINDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "--dry-run"), (["--gpu", "sm_80"], "--dry-run"), (["--only", "nothing"], "invalid choice")],
)
def test_arguments_that_cannot_be_met_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_the_operator_does_not_tune():
    for file in (ROOT / "stochca_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "bench" for name in names), file


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_rows_are_printed(tmp_path, capsys):
    path = tmp_path / "tune.json"
    main(["--quick", "--only", "fwd", "--at-most", "2", "--output", str(path)])
    result = json.loads(path.read_text())
    ((key, columns),) = eval("{" + "\n".join(result["rows"]) + "}").items()
    assert key[0] == "fwd"
    assert torch.cuda.get_device_name() in columns[0][0].origin
    assert not any(
        "wrong" in f.get("reason", "") for g in result["groups"] for c in g["cases"].values() for f in c
    )
    assert "_TABLE" in capsys.readouterr().out
