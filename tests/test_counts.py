"""The savings are counted, and stay within what the method promises."""

import itertools

import pytest
import timm
import torch

from bench import counts
from stochca import StepPlan, StochCA
from tests.models import make_images, make_model

VIT_B = "vit_base_patch16_224"


def costs_of_all_draws(cost):
    """The costs of all 4,096 draws of 12 blocks, by coins.

    What blocks cost adds up, so that a few draws tell all; two more show that it does.
    """
    classes = counts.by_signature(12)
    kinds = sorted({kind for blocks, _ in classes for kind in blocks})

    def row(signature):
        return [1.0, float(signature[1]), *(float(signature[0].count(kind)) for kind in kinds)]

    def measured(signature):
        return float(cost(classes[signature][0]))

    signatures, rank, chosen = list(classes), 0, []
    for signature in signatures:
        tried = torch.tensor([row(s) for s in [*chosen, signature]], dtype=torch.float64)
        if torch.linalg.matrix_rank(tried) > rank:
            rank, chosen = rank + 1, [*chosen, signature]
    found = torch.tensor([[measured(s)] for s in chosen], dtype=torch.float64)
    rows = torch.tensor([row(s) for s in chosen], dtype=torch.float64)
    of_each = torch.linalg.lstsq(rows, found, driver="gelsd").solution[:, 0]
    costs = (torch.tensor([row(s) for s in signatures], dtype=torch.float64) @ of_each).tolist()
    by_signature = dict(zip(signatures, costs, strict=True))
    for signature in (signatures[len(signatures) // 2], signatures[-3]):
        assert signature not in chosen
        assert by_signature[signature] == pytest.approx(measured(signature), rel=1e-6)
    return {coins: by_signature[signature] for signature, members in classes.items() for coins in members}


def expectation(costs, p):
    return sum(cost * counts.probability(coins, p) for coins, cost in costs.items())


def test_step_flops_of_vit_b_stay_within_their_bounds():
    bounds = {0.0: 0.92, 0.1: 1.045, 0.3: 1.105, 0.5: 1.075, 0.8: 0.86}
    with torch.device("meta"):
        model = StochCA(timm.create_model(VIT_B, num_classes=10)).train()
        images = torch.empty(1, 3, 224, 224)
    plain = counts.step_flops(lambda: model.target(images))
    costs = costs_of_all_draws(lambda coins: counts.step_flops(lambda: model(images, coins=coins)) / plain)
    for p, bound in bounds.items():
        assert 0.8 < expectation(costs, p) <= bound, f"p={p}"
    assert max(costs.values()) < 1.334, "the full source in lockstep costs 1.334 in every step"


def test_expected_costs_are_those_of_all_draws():
    found = counts.relative_costs(12, lambda coins: 100 + sum(coins) * len(coins), 100, [0.0, 0.3, 1.0])
    costs = {coins: 1 + sum(coins) * len(coins) / 100 for coins in counts.draws(12)}
    for p, (mean, largest) in zip((0.0, 0.3, 1.0), found, strict=True):
        assert mean == pytest.approx(expectation(costs, p))
        assert largest == max(cost for coins, cost in costs.items() if counts.probability(coins, p))


def test_the_source_costs_a_third_of_a_step_and_less_the_earlier_it_stops():
    whole, expected = counts.source_flops(VIT_B, [0.0, 0.1, 0.5, 1.0])
    assert whole == pytest.approx(1 / 3, abs=2e-3)
    assert expected[0] == 0
    assert expected == sorted(expected)
    assert 0.40 < expected[1] / whole < 0.42
    assert expected[3] < whole


@pytest.mark.parametrize(
    ("recompute", "bounds"), [(False, {0.1: 0.93, 0.5: 0.90}), (True, {0.1: 0.88, 0.5: 0.88})]
)
def test_bytes_that_vit_b_keeps_stay_within_their_bounds(recompute, bounds):
    model = StochCA(timm.create_model(VIT_B, num_classes=10), recompute=recompute, impl="sdpa").train()
    images = torch.zeros(1, 3, 224, 224)
    parameters = [*model.parameters(), *model.source.parameters()]
    plain = counts.saved_bytes(lambda: model.target(images), parameters)
    assert plain > 100e6

    def cost(coins):
        return counts.saved_bytes(lambda: model(images, coins=coins), parameters) / plain

    costs = costs_of_all_draws(cost)
    assert max(costs.values()) <= 1, "no draw keeps more than plain fine-tuning"
    assert cost(max(costs, key=costs.get)) <= 1
    for p, bound in bounds.items():
        assert 0.3 < expectation(costs, p) <= bound, f"p={p}"


@pytest.mark.parametrize("class_rows", [True, False])
def test_draws_of_one_signature_cost_the_same(class_rows):
    model = make_model(stochca={"class_rows": class_rows, "impl": "sdpa"})
    flops, kept = {}, {}
    for coins in counts.draws(4):
        key = counts.signature(coins)
        flops.setdefault(key, set()).add(
            counts.step_flops(lambda coins=coins: model(make_images(), coins=coins))
        )
        kept.setdefault(key, set()).add(
            counts.saved_bytes(lambda coins=coins: model(make_images(), coins=coins))
        )
    assert all(len(values) == 1 for values in flops.values())
    assert all(len(values) == 1 for values in kept.values())
    assert len(flops) > 8


def test_a_storage_is_counted_once_and_a_parameter_not_at_all():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    x = torch.randn(5, 3, requires_grad=True)
    assert counts.saved_bytes(lambda: torch.nn.functional.linear(x, weight), [weight]) == 5 * 3 * 4
    assert counts.saved_bytes(lambda: x[:2] * x[2:4]) == 5 * 3 * 4


def test_flops_of_a_product_are_counted_forward_and_backward():
    a, b = torch.randn(7, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    assert counts.step_flops(lambda: a @ b) == 3 * 2 * 7 * 5 * 3


def test_probabilities_of_all_draws_sum_to_one():
    for p in (0.0, 0.1, 0.5, 1.0):
        assert sum(counts.probability(coins, p) for coins in counts.draws(6)) == pytest.approx(1)


def test_expected_share_of_the_source_is_as_derived():
    """E[last block read] of L coins is L - sum_j (1 - p)^j."""
    for depth, p in itertools.product((4, 12), (0.1, 0.5)):
        expected = (depth - sum((1 - p) ** j for j in range(1, depth + 1))) / depth
        assert counts.expected_source_fraction(depth, p) == pytest.approx(expected)
    assert StepPlan((False, True, False)).source_fraction == pytest.approx(2 / 3)
