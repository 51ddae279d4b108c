"""Losses by name: what options say, and what they are refused for."""

import pytest
from torch import nn

from stochca import StochCA
from stochca.losses import LOSSES, MIRO, Companion, create_losses
from tests.losses.steps import make_pair
from tests.models import make_model, make_target

NAMES = ["l2_sp", "bss", "co_tuning", "miro", "distillation", "feature_distillation"]


def test_every_loss_is_made_by_name_in_the_order_given():
    assert list(LOSSES) == NAMES
    losses = create_losses(["bss", {"miro": {"weight": 0.5, "taps": [3, 1]}}, {"l2_sp": None}], make_pair())
    assert type(losses) is nn.ModuleList
    assert [loss.name for loss in losses] == ["bss", "miro", "l2_sp"]
    assert (losses[1].weight, losses[1].taps) == (0.5, (1, 3))
    assert len(create_losses([], make_pair())) == 0
    every = create_losses(NAMES, make_pair())
    assert [type(loss) for loss in every] == list(LOSSES.values())
    assert all(isinstance(loss, Companion) for loss in every)


def test_a_loss_says_what_it_reads_and_shows_its_options():
    losses = {loss.name: loss for loss in create_losses(NAMES, make_pair())}
    assert [name for name, loss in losses.items() if loss.taps] == ["miro", "feature_distillation"]
    assert [name for name, loss in losses.items() if loss.reads_source_logits] == ["distillation"]
    assert [name for name, loss in losses.items() if loss.fits_source_logits] == ["co_tuning"]
    assert {name for name, loss in losses.items() if list(loss.parameters())} == {"co_tuning", "miro"}
    assert {name: loss.lr_mult for name, loss in losses.items() if loss.lr_mult != 1} == {"miro": 10}
    assert all("weight=" in loss.extra_repr() for loss in losses.values())
    assert MIRO(make_pair(), lr_mult=2).lr_mult == 2


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("bss", "losses must be a list, got 'bss'"),
        ({"bss": None}, "losses must be a list"),
        (["mirro"], f"unknown loss 'mirro': did you mean 'miro'\\? Valid are {', '.join(NAMES)}"),
        (["L2SP"], "unknown loss 'L2SP'"),
        ([{"bss": {}, "miro": {}}], "a loss must be a name, or one name with its options, got {'bss'"),
        ([{}], "a loss must be a name, or one name with its options, got {}"),
        ([3], "a loss must be a name, or one name with its options, got 3"),
        ([{3: None}], "unknown loss 3"),
        ([{"bss": 0.1}], "the options of bss must be names with values, got 0.1"),
        (["bss", "miro", {"bss": {"k": 2}}], "losses must differ, got bss twice"),
        (
            [{"miro": {"wieght": 1.0}}],
            "miro has no option 'wieght': did you mean 'weight'\\? Valid are weight, taps, variance, lr_mult",
        ),
        ([{"bss": {"model": 1}}], "bss has no option 'model'"),
        ([{"bss": {1: 1}}], "bss has no option 1"),
        *(
            ([{name: {"weight": value}}], f"{name}: weight must be a number of at least 0, got {value!r}")
            for name in NAMES
            for value in (-0.1, "0.1", True, None)
        ),
        ([{"bss": {"weight": float("nan")}}], "bss: weight must be a number of at least 0, got nan"),
        *(
            ([{"bss": {"k": value}}], f"bss: k must be a whole number of at least 1, got {value!r}")
            for value in (0, 1.0, True, "1")
        ),
        ([{"l2_sp": {"head_weight": -1}}], "l2_sp: head_weight must be a number of at least 0, got -1"),
        (
            [{"co_tuning": {"relationship": "guess"}}],
            "relationship must be one of learned, direct, got 'guess'",
        ),
        ([{"co_tuning": {"relationship": ["direct"]}}], "relationship must be one of"),
        ([{"co_tuning": {"tau": 0}}], "co_tuning: tau must be a number above 0, got 0"),
        ([{"co_tuning": {"lr_mult": "2"}}], "co_tuning: lr_mult must be a number"),
        ([{"miro": {"variance": 0.0}}], "miro: variance must be a number above 0, got 0.0"),
        ([{"miro": {"variance": 1e-6}}], "miro: variance must be above 1e-05, got 1e-06"),
        ([{"miro": {"lr_mult": -1}}], "miro: lr_mult must be a number"),
        ([{"miro": {"taps": 3}}], "miro: taps must be a list of whole numbers, got 3"),
        ([{"miro": {"taps": []}}], r"miro: taps must be a list of whole numbers, got \[\]"),
        ([{"miro": {"taps": [1.0]}}], "miro: taps must be a list of whole numbers"),
        ([{"miro": {"taps": [0, 4]}}], r"from 0 to the depth of the model \(3\), got \[0, 4\]"),
        ([{"feature_distillation": {"taps": [-1]}}], "feature_distillation: taps must be different numbers"),
        ([{"feature_distillation": {"taps": [1, 1]}}], r"taps must be different numbers .* got \[1, 1\]"),
        ([{"distillation": {"temperature": 0}}], "distillation: temperature must be a number above 0, got 0"),
        (
            [{"distillation": {"head": "both"}}],
            "distillation: head must be one of source, target, got 'both'",
        ),
        ([{"distillation": {"head": "target"}}], "needs a target of the source's 7 classes, got 5"),
    ],
)
def test_a_mistake_is_named(specs, message):
    with pytest.raises(ValueError, match=message):
        create_losses(specs, make_pair())


@pytest.mark.parametrize("name", ["co_tuning", "distillation"])
@pytest.mark.parametrize("classes", [0, 1])
def test_a_source_without_a_head_cannot_serve(name, classes):
    with pytest.raises(
        ValueError,
        match=rf"{name} needs a source with a classifier of at least 2 classes, got a .* of {classes}",
    ):
        create_losses([name], make_pair(source_classes=classes))


@pytest.mark.parametrize("name", ["l2_sp", "co_tuning"])
def test_a_target_without_a_classifier_cannot_serve(name):
    model = StochCA(make_target(num_classes=0), make_target())
    with pytest.raises(
        ValueError, match=f"{name} needs a target with a classifier of at least .*, got a Identity of 0"
    ):
        create_losses([name], model)


@pytest.mark.parametrize("name", ["l2_sp", "co_tuning", "distillation"])
def test_two_classifiers_cannot_serve(name):
    with pytest.raises(ValueError, match=rf"{name} needs a \w+ with one classifier, got 2"):
        create_losses([name], make_model("deit_tiny_distilled_patch16_224"))


def test_a_source_without_a_weight_of_the_target_cannot_serve():
    model = StochCA(make_target(init_values=0.1), make_target())
    with pytest.raises(
        ValueError, match=r"needs a source whose blocks.0.ls1.gamma is \(48,\) in .*, got none"
    ):
        create_losses(["l2_sp"], model)
