"""What `StochCA.forward_step` hands to losses is what two whole passes compute."""

import collections
import itertools

import pytest
import torch

from stochca.plan import StepPlan
from tests import plain
from tests.losses.steps import make_pair, whole_step
from tests.models import make_images, make_model

DEPTH = 3
ALL_COINS = list(itertools.product([False, True], repeat=DEPTH))
NAMES = ["".join("SC"[coin] for coin in coins) for coins in ALL_COINS]
READS = [((), False), ((0,), False), ((0, 2), False), ((3,), False), ((1,), True), ((), True)]
every_pattern = pytest.mark.parametrize("coins", ALL_COINS, ids=NAMES)


def scalar(outputs):
    """A number in which all outputs that want a gradient have different shares."""
    tensors = [outputs.logits, outputs.features, *outputs.taps.values()]
    generator = torch.Generator().manual_seed(1)
    return sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in tensors
    )


def assert_same_step(model, outputs, expected, tolerance=1e-11):
    assert outputs.taps.keys() == expected.taps.keys() == outputs.source_taps.keys()
    torch.testing.assert_close(outputs.taps, expected.taps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(outputs.source_taps, expected.source_taps, rtol=tolerance, atol=tolerance)
    for name in ("logits", "features", "source_logits"):
        actual, wanted = getattr(outputs, name), getattr(expected, name)
        if actual is not None:
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    parameters = list(model.target.parameters())
    grads, wanted = (
        torch.autograd.grad(
            scalar(o), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for o in (outputs, expected)
    )
    torch.testing.assert_close(grads, wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("class_rows", "way"),
    [
        (True, "kept"),
        (False, "kept"),
        (True, "recompute"),
        (False, "checkpointing"),
        (True, "recompute-checkpointing"),
    ],
)
@every_pattern
def test_every_coin_pattern_equals_two_whole_passes(coins, class_rows, way):
    model = make_pair(stochca={"class_rows": class_rows, "recompute": "recompute" in way})
    model.set_grad_checkpointing("checkpointing" in way)
    whole = whole_step(model, make_images(), coins, range(DEPTH + 1))
    for taps, source_logits in READS[1:] if way == "kept" else [((0, 2), False), ((1,), True)]:
        outputs = model.forward_step(make_images(), coins, taps=taps, source_logits=source_logits)
        assert (outputs.source_logits is not None) == source_logits
        at_taps = {name: {t: getattr(whole, name)[t] for t in taps} for name in ("taps", "source_taps")}
        assert_same_step(model, outputs, whole._replace(**at_taps))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"global_pool": "avg"},
        {"global_pool": "map", "class_token": False},
        {"reg_tokens": 2, "init_values": 0.5},
        {"qk_norm": True},
        {"pre_norm": True},
    ],
)
@pytest.mark.parametrize("coins", [(False, True, True), (True, False, torch.tensor([True, False]))])
def test_other_models_and_coins_per_sample_equal_two_whole_passes(coins, kwargs):
    model = make_pair(**kwargs)
    for taps in ((1,), (0, 3)):
        outputs = model.forward_step(make_images(), coins, taps=taps, source_logits=True)
        assert_same_step(model, outputs, whole_step(model, make_images(), coins, taps))


@pytest.mark.parametrize("mode", ["mix", "sum", "concat"])
def test_deterministic_alternatives_equal_two_whole_passes(mode):
    model = make_pair(stochca={"mode": mode})
    outputs = model.forward_step(make_images(), taps=(2,), source_logits=True)

    def attend(q, own, source, coin):
        return plain.mix(q, own, source, mode, 0.5)

    assert_same_step(model, outputs, whole_step(model, make_images(), (None,) * DEPTH, (2,), attend))


@every_pattern
def test_the_source_runs_no_further_than_coins_taps_and_logits_need(coins):
    model = make_pair()
    ran = collections.Counter()
    parts = {"stem": [model.source.patch_embed], "norm": [model.source.norm], "head": [model.source.head]}
    parts["norm1"] = [block.norm1 for block in model.source.blocks]
    parts["mlp"] = [block.mlp for block in model.source.blocks]
    for name, modules in parts.items():
        for module in modules:
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    last_pair = max((i + 1 for i, coin in enumerate(coins) if coin), default=0)
    for taps, source_logits in READS:
        ran.clear()
        model.forward_step(make_images(), coins, taps=taps, source_logits=source_logits)
        deepest = DEPTH if source_logits else max(taps, default=0)
        assert ran["stem"] == bool(last_pair or deepest or taps)
        assert ran["norm1"] == max(last_pair, deepest)
        assert ran["mlp"] == max(last_pair - 1, deepest, 0)
        assert ran["norm"] == ran["head"] == source_logits
        assert model.plan == StepPlan(coins, taps, source_logits)


def test_class_rows_alone_are_computed_after_the_last_tap():
    model = make_pair()
    tokens = []
    for block in model.target.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    for taps, expected in (((), [1, 1, 1]), ((0,), [1, 1, 1]), ((1,), [10, 1, 1]), ((1, 2), [10, 10, 1])):
        tokens.clear()
        model.forward_step(make_images(), (True,) * DEPTH, taps=taps)
        assert tokens == expected
    model.forward_step(make_images(), (True,) * DEPTH, taps=(3,))
    assert tokens[-DEPTH:] == [10, 10, 10]


def test_a_step_draws_the_coins_that_forward_draws():
    model = make_pair()
    images, drawn = make_images(), []
    for _ in range(4):
        model.forward_step(images, taps=(1,))
        drawn.append(model.plan.coins)
    assert model.coins.step == 4
    model.coins.step = 0
    for coins in drawn:
        logits = model(images)
        assert model.plan.coins == coins
        torch.testing.assert_close(logits, model.forward_step(images, coins).logits, rtol=1e-12, atol=1e-12)


def test_what_comes_of_the_source_is_constant():
    outputs = make_pair().forward_step(make_images(), (True,) * DEPTH, taps=(0, 3), source_logits=True)
    assert not any(t.requires_grad for t in (*outputs.source_taps.values(), outputs.source_logits))
    assert all(t.requires_grad for t in (*outputs.taps.values(), outputs.features, outputs.logits))


def test_taps_may_be_any_iterable_in_any_order():
    model = make_pair()
    outputs = model.forward_step(make_images(), (True,) * DEPTH, taps=iter([2, 0, 2]))
    assert_same_step(model, outputs, whole_step(model, make_images(), (True,) * DEPTH, (0, 2)))


@pytest.mark.parametrize("source_dtype", [None, "bfloat16"])
def test_a_step_under_autocast_stays_near(source_dtype):
    coins = (False, True, True)
    model = make_pair(dtype=torch.float32, stochca={"source_dtype": source_dtype})
    images = make_images(dtype=torch.float32)
    expected = whole_step(make_pair(), images.double(), coins, (1, 3))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.forward_step(images, coins, taps=(1, 3), source_logits=True)
    for tap in (1, 3):
        for actual, wanted in ((outputs.taps, expected.taps), (outputs.source_taps, expected.source_taps)):
            torch.testing.assert_close(actual[tap].double(), wanted[tap], rtol=0.05, atol=0.05)
    torch.testing.assert_close(outputs.source_logits.double(), expected.source_logits, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be")
def test_a_compiled_step_equals_two_whole_passes():
    model = make_pair()
    model.compile(backend="eager", fullgraph=True)
    for coins in ((False, True, False), (True, True, True)):
        outputs = model.forward_step(make_images(), coins, taps=(0, 2), source_logits=True)
        assert_same_step(model, outputs, whole_step(model, make_images(), coins, (0, 2)))


@pytest.mark.parametrize("taps", [(4,), (-1,), (0, 7)])
def test_taps_outside_the_model_are_refused_before_a_coin_is_drawn(taps):
    model = make_pair()
    with pytest.raises(ValueError, match=r"taps must be from 0 to the depth of the model \(3\), got"):
        model.forward_step(make_images(), taps=taps)
    assert model.coins.step == 0


def test_two_classifiers_are_refused():
    model = make_model("deit_tiny_distilled_patch16_224")
    with pytest.raises(ValueError, match="VisionTransformerDistilled has 2 classifiers, wanted one"):
        model.forward_step(make_images())
