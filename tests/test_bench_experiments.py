"""Other ways to run a step compute the same step. Those that need a GPU are checked in tests/gpu."""

import json

import pytest
import torch

from bench import float8
from bench.step import experiments
from bench.step.providers import BY_HAND_EAGER, OURS, OURS_RECOMPUTING, PROVIDERS
from bench.step.stage import Stage
from bench.step.workloads import TINY, Setting
from stochca import StochCA
from tests.steps import assert_same, outcome

DRAWS = [(True, False, True, False), (False, True, True, True), (True, True, False, True), (False,) * 4]


@pytest.fixture(scope="module")
def setting():
    return Setting.make(TINY, torch.device("cpu"))


@pytest.mark.parametrize("impl", ["sdpa", "triton"])
@pytest.mark.parametrize("coins", DRAWS)
def test_one_launch_computes_the_same_step(coins, impl, setting):
    ours = StochCA(setting.target, setting.source).train()
    expected = outcome(lambda x, c: ours(x, coins=c), setting, coins)
    for fused in (False, True):
        variant = experiments.one_launch(setting, fused)
        variant.model.impl = impl
        assert_same(outcome(variant, setting, coins), expected)


def test_who_holds_the_source_in_one_dtype_shares_it_and_changes_no_bit():
    stage, low = Stage(TINY, torch.device("cpu")), torch.bfloat16
    cast, *holding = (
        stage.ready(PROVIDERS[name], low).step
        for name in ("ours, source cast in every step", OURS, BY_HAND_EAGER, OURS_RECOMPUTING)
    )
    assert cast.setting is stage.setting
    assert len({id(step.setting.source) for step in holding}) == 1
    assert holding[0].setting.source.blocks[0].attn.qkv.weight.dtype == low
    for coins in DRAWS:
        for result, expected in zip(holding[0].outcome(coins), cast.outcome(coins), strict=True):
            assert torch.equal(result, expected)
    assert stage.ready(PROVIDERS[OURS], torch.float32).step.setting is stage.setting


def test_recomputation_computes_the_same_step(setting):
    ours = StochCA(setting.target, setting.source).train()
    for coins in DRAWS:
        expected = outcome(lambda x, c: ours(x, coins=c), setting, coins)
        assert_same(outcome(experiments.recomputing(setting), setting, coins), expected)


def test_what_ran_before_is_handed_over_block_by_block(setting):
    """As a source that was prefetched is."""
    ours, handing = StochCA(setting.target, setting.source).train(), experiments._Handing
    model = handing(setting.target, setting.source).train()
    for coins in DRAWS[:3]:
        model.handed = model.run_source(setting.images, experiments.StepPlan(coins))
        expected = outcome(lambda x, c: ours(x, coins=c), setting, coins)
        assert_same(outcome(lambda x, c: model(x, coins=c), setting, coins), expected)


def test_what_float8_changes_is_reported(tmp_path, capsys):
    pytest.importorskip("torchao", reason="needs torchao")
    arguments = ["--model", "vit_tiny_patch16_224", "--batch-size", "1", "--output", str(tmp_path / "f.json")]
    float8.main(arguments)
    result = json.loads((tmp_path / "f.json").read_text())
    assert any(result["coins"])
    low, lower = (result["differences"][name] for name in ("bfloat16", "float8"))
    for values in (low, lower):
        assert 0 < values["logits"] < 0.2
        assert 0 < values["gradients"] < 0.2
        assert 0.98 < values["cosine"] < 1
    for name in "qkv":
        assert low[name][0] == lower[name][0]  # the first block's are of tokens that float8 has not touched
        assert all(
            0.95 < f8 < bf16 <= 1.0001 for f8, bf16 in zip(lower[name][1:], low[name][1:], strict=True)
        )
    assert "float8" in capsys.readouterr().out
