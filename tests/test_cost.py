"""Work on paper equals work as torch counts it, for every draw."""

import random

import numpy as np
import pytest
import timm
import torch

from bench import cost, counts
from stochca import StepPlan, StochCA

VIT_B = "vit_base_patch16_224"
SMALL = {"img_size": 48, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def meta_model(name=VIT_B, class_rows=True, **kwargs):
    with torch.device("meta"):
        model = StochCA(timm.create_model(name, **kwargs), class_rows=class_rows).train()
        return model, torch.empty(1, 3, *model.target.patch_embed.img_size)


@pytest.fixture(scope="module")
def vit_b():
    with torch.device("meta"):
        return cost.Size.of(timm.create_model(VIT_B))


@pytest.mark.parametrize("class_rows", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"reg_tokens": 2, "init_values": 1e-5}])
def test_flops_of_every_draw_are_those_that_torch_counts(kwargs, class_rows):
    model, images = meta_model(class_rows=class_rows, **SMALL, **kwargs)
    size = cost.Size.of(model.target)
    for coins in counts.draws(4):
        counted = counts.step_flops(lambda coins=coins: model(images, coins=coins))
        assert cost.step_flops(size, coins, class_rows) == counted, coins
    assert cost.plain_flops(size) == counts.step_flops(lambda: model.target(images))


def test_flops_of_a_real_model_are_those_that_torch_counts(vit_b):
    model, images = meta_model()
    picker = random.Random(0)
    draws = [tuple(picker.random() < p for _ in range(12)) for p in (0.1, 0.3, 0.5, 0.8)]
    for coins in [(False,) * 12, (True,) * 12, (False,) * 11 + (True,), (True,) + (False,) * 11, *draws]:
        counted = counts.step_flops(lambda coins=coins: model(images, coins=coins))
        assert cost.step_flops(vit_b, coins) == counted, coins
    assert cost.plain_flops(vit_b) == counts.step_flops(lambda: model.target(images))


def test_savings_switched_off_cost_what_they_save(vit_b):
    coins = (True, False) * 5 + (True, True)
    savings = ({}, {"row_kv": True}, {"own_kv": True}, {"full_source": True}, {"class_rows": False})
    ours, *without = (cost.step_flops(vit_b, coins, **switch) for switch in savings)
    assert all(flops > ours for flops in without)
    tokens, weights = vit_b.length, vit_b.width * vit_b.attention_width
    # Block 9 is the last to read itself: five blocks read the source with all tokens, two with the class row.
    assert without[1] - ours == 6 * 2 * weights * (5 * tokens + 2)
    all_kv = 4 * tokens * weights
    over_tokens = 4 * vit_b.heads * tokens * vit_b.width + 4 * weights
    # One self-attention (forward, two in the backward) and two cross-attentions (one in the backward).
    assert without[0] - ours == (3 + 1) * all_kv + (3 + 2 * 2) * (4 * tokens * vit_b.width - over_tokens)
    attention, linear = cost.work(vit_b, cost.Part.SOURCE).attention, 2 * tokens * 12 * weights
    assert without[2] - ours == attention + linear, "one more block of the source"


def test_by_hand_is_a_step_of_plain_timm_and_a_forward_more(vit_b):
    flops = sum(cost.total(vit_b, cost.parts(vit_b, (False,) * 12, cost.BY_HAND), cost.BY_HAND))
    assert flops / cost.plain_flops(vit_b) == pytest.approx(1.334, abs=1e-3)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_classes_of_draws_are_all_draws(depth):
    classes, wanted = cost.draw_classes(depth), counts.by_signature(depth)
    assert {counts.signature(coins): count for coins, count in classes} == {
        key: len(members) for key, members in wanted.items()
    }
    assert len(classes) == len(wanted)
    assert len({cost.draw_class(coins) for coins, _ in classes}) == len(classes)
    for members in wanted.values():
        assert len({cost.draw_class(coins) for coins in members}) == 1, members[0]


@pytest.mark.parametrize("depth", [4, 12])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_expected_flops_are_the_mean_over_all_draws(depth, p):
    with torch.device("meta"):
        size = cost.Size.of(timm.create_model(VIT_B, depth=depth))
    draws = counts.draws(depth)
    mean = sum(counts.probability(coins, p) * cost.step_flops(size, coins) for coins in draws)
    assert cost.expected_flops(size, p) == pytest.approx(mean, rel=1e-12)
    source = sum(counts.probability(coins, p) * StepPlan(coins).source_blocks for coins in draws)
    assert cost.expected_source_blocks(depth, p) == pytest.approx(source)


def test_representative_draws_stand_for_all(vit_b):
    for p in (0.1, 0.3, 0.5, 0.8):
        draws = cost.representative_draws(vit_b, p, 8)
        assert len(draws) == 8
        flops = np.mean([cost.step_flops(vit_b, coins) for coins in draws])
        source = np.mean([StepPlan(coins).source_blocks for coins in draws])
        assert flops == pytest.approx(cost.expected_flops(vit_b, p), rel=2e-3)
        assert source == pytest.approx(cost.expected_source_blocks(12, p), abs=0.25)
        assert draws == cost.representative_draws(vit_b, p, 8)
    assert cost.representative_draws(vit_b, 0.0, 8) == [(False,) * 12]
    assert cost.representative_draws(vit_b, 1.0, 8) == [(True,) * 12]


def test_models_whose_work_is_not_known_are_refused():
    with torch.device("meta"):
        for name in (
            "vit_giant_patch14_dinov2",
            "vit_base_patch16_siglip_224",
            "deit_base_distilled_patch16_224",
        ):
            model = timm.create_model(name)
            with pytest.raises(ValueError, match=r"must be|not counted"):
                cost.Size.of(model)
    with pytest.raises(ValueError, match="between 0 and 1"):
        cost.distribution(4, 1.5)
