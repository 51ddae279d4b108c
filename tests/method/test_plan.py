import itertools

import numpy as np
import pytest
import torch

from stochca import CoinSampler, StepPlan
from stochca.attention import Blend
from stochca.plan import replay


def draw(n=1, depth=12, batch=8, **kwargs):
    sampler = CoinSampler(depth=depth, **kwargs)
    return [sampler.draw(batch).coins for _ in range(n)]


def test_coins_depend_on_seed_and_step_alone():
    first = draw(20, p=0.5, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert draw(20, p=0.5, seed=3) == first
    assert draw(20, p=0.5, seed=4) != first
    resumed = CoinSampler(0.5, 12, seed=3)
    resumed.step = 7
    assert [resumed.draw(8).coins for _ in range(13)] == first[7:]


def test_drawing_leaves_the_global_generators_alone():
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    draw(5, p=0.5)
    draw(5, p=0.5, per="sample")
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_frequency_of_the_coins_is_p(per, p):
    coins = draw(500, p=p, per=per, batch=8)
    share = np.mean(
        [np.mean([np.mean(c.numpy() if isinstance(c, torch.Tensor) else c) for c in row]) for row in coins]
    )
    assert abs(share - p) < 4 * (p * (1 - p) / (500 * 12)) ** 0.5 + 1e-12


def test_official_stream_is_the_authors():
    """One scalar bernoulli draw per block from torch's default generator, in the order of the blocks."""
    torch.manual_seed(5)
    expected = [tuple(bool(torch.bernoulli(torch.tensor(0.3))) for _ in range(12)) for _ in range(50)]
    torch.manual_seed(5)
    assert draw(50, p=0.3, rng="official") == expected


@pytest.mark.parametrize("p", [0, 1, False, True, None])
def test_p_may_be_an_int_a_bool_or_none(p):
    assert draw(p=p) == [(bool(p),) * 12]


def test_p_per_block_and_over_steps():
    assert draw(p=[0, 1, 0, 1], depth=4) == [(False, True, False, True)]
    assert draw(3, p=lambda step: float(step == 1), depth=2) == [(False,) * 2, (True,) * 2, (False,) * 2]
    assert draw(2, p=lambda step: [step, 1 - step], depth=2) == [(False, True), (True, False)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"p": 1.5}, "between 0 and 1"),
        ({"p": -0.1}, "between 0 and 1"),
        ({"p": float("nan")}, "between 0 and 1"),
        ({"p": [0.1, 0.2]}, r"one per block \(12\)"),
        ({"p": lambda step: 2.0}, "between 0 and 1"),
        ({"p": 0.1, "per": "token"}, "per must be one of"),
        ({"p": 0.1, "mode": "max"}, "mode must be one of"),
        ({"p": 0.1, "rng": "cuda"}, "rng must be one of"),
        ({"p": 0.1, "rng": "official", "per": "sample"}, 'use per="batch"'),
        ({"p": 0.1, "seed": -1}, "seed must not be negative"),
    ],
)
def test_options_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CoinSampler(depth=12, **kwargs)


def test_plan_stops_the_source_at_the_last_block_that_reads_it():
    for coins in itertools.product([False, True], repeat=6):
        plan = StepPlan(coins)
        assert not any(coins[plan.source_blocks :])
        assert plan.source_blocks == 0 or coins[plan.source_blocks - 1]
        first = plan.first_class_row_block
        assert all(coins[first + 1 :])
        assert first == 0 or not coins[first]


def test_blocks_whose_samples_agree_have_one_coin():
    for coins in draw(30, p=0.5, per="sample", batch=2):
        assert {type(c) for c in coins} <= {bool, torch.Tensor}
        assert all(c.any() and not c.all() for c in coins if isinstance(c, torch.Tensor))
    assert draw(p=1.0, per="sample") == [(True,) * 12]


def test_deterministic_modes_draw_nothing():
    assert draw(p=[0, 0.5, 1], depth=3, mode="mix") == [(False, Blend("mix", 0.5), True)]
    assert draw(p=0.5, depth=2, mode="sum") == [(Blend("sum"),) * 2]
    assert StepPlan((Blend("concat"),) * 3).source_blocks == 3
    assert StepPlan((Blend("concat"),) * 3).first_class_row_block == 2


def test_replayed_coins_are_checked():
    with pytest.raises(ValueError, match=r"one entry per block \(2\), got 1"):
        replay([True], 2, 4)
    with pytest.raises(ValueError, match=r"shape \(4,\), got torch.bool of shape \(3,\)"):
        replay([True, torch.ones(3, dtype=torch.bool)], 2, 4)
    with pytest.raises(ValueError, match=r"got torch.float32"):
        replay([True, torch.ones(4)], 2, 4)
    assert replay([np.bool_(True), False], 2, 4).coins == (True, False)
    for blend in (Blend("max"), Blend("mix", 7.0)):
        with pytest.raises(ValueError, match="must mix, sum or concat"):
            replay([True, blend], 2, 4)
    with pytest.raises(TypeError, match="got int"):
        replay([True, 1], 2, 4)


def test_a_process_is_one_of_all():
    coins = CoinSampler(0.5, 4)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank must be from 0 to 1, got {rank}"):
            coins.spread(rank, 2)
