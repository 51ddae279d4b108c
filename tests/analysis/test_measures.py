"""Each measure is its definition, written out."""

import math

import numpy as np
import pytest
import torch

from stochca.analysis.attention import attention_measures, jensen_shannon, mean_distance, received, scores
from stochca.analysis.heads import Heads, Layout
from stochca.analysis.measures import MEASURES
from stochca.analysis.moments import Moments
from stochca.analysis.similarity import cosine, similarities

GRID = (2, 3)
POSITIONS = torch.tensor(
    [[8.0 * row, 16.0 * column] for row in range(2) for column in range(3)], dtype=torch.float64
)
DISTANCES = (POSITIONS[:, None] - POSITIONS).norm(dim=-1)
LAYOUTS = {
    "class-token": Layout(True, 1, GRID, DISTANCES),
    "class-token-and-registers": Layout(True, 3, GRID, DISTANCES),
    "registers-alone": Layout(False, 2, GRID, DISTANCES),
    "patches-alone": Layout(False, 0, GRID, DISTANCES),
}


def make_heads(layout, seed=0):
    """Two images, three heads, vectors of four numbers."""
    generator = torch.Generator().manual_seed(seed)
    n = layout.num_prefix + len(POSITIONS)
    return Heads(
        *(torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for _ in range(3)), scale=0.5
    )


def divergence(p, q):
    """In bits, by the sum over Kullback-Leibler divergences to the mean."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += sum(0.5 * x * math.log2(x / m) for x in (a, b) if x > 0)
    return total


def attend(heads, image, head, row, columns):
    """Attention of one token to some others, as a list that sums to 1."""
    weights = [
        math.exp(heads.scale * float(heads.q[image, head, row] @ heads.k[image, head, column]))
        for column in columns
    ]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("name", LAYOUTS)
def test_similarities_are_means_of_cosines_over_tokens(name):
    layout = LAYOUTS[name]
    target, source = make_heads(layout), make_heads(layout, seed=1)
    found = similarities(target, source, layout)
    for part, x, y in (
        ("query", target.q, source.q),
        ("key", target.k, source.k),
        ("value", target.v, source.v),
    ):
        x, y = x.numpy(), y.numpy()
        cosines = np.einsum("bhnd,bhnd->bhn", x, y) / (
            np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        )
        np.testing.assert_allclose(found[f"{part}_cosine"], cosines.mean(-1), rtol=1e-12)
        if layout.has_class:
            np.testing.assert_allclose(found[f"class_{part}_cosine"], cosines[:, :, 0], rtol=1e-12)
    assert len(found) == (6 if layout.has_class else 3)


def test_cosines_know_direction_alone_and_are_taken_in_float64():
    x = torch.tensor([[3.0, 4.0], [1e-20, 0.0], [1.0, 0.0]])
    y = torch.tensor([[30.0, 40.0], [0.0, 1.0], [-2.0, 0.0]])
    found = cosine(x, y)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), rtol=0, atol=1e-15)
    near = torch.tensor([1.0, 1e-4])  # whose cosine float32 rounds to 1
    assert 0 < 1 - cosine(torch.tensor([1.0, 0.0]), near).item() == pytest.approx(0.5e-8, rel=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_measures_are_their_definitions(name):
    layout = LAYOUTS[name]
    target, source = make_heads(layout), make_heads(layout, seed=1)
    found = attention_measures(target, source, layout)
    everything = range(layout.num_prefix + len(POSITIONS))
    patches = everything[layout.num_prefix :]
    for image in range(2):
        for head in range(3):

            def diverge(row, columns, image=image, head=head):
                return divergence(*(attend(heads, image, head, row, columns) for heads in (target, source)))

            expected = {"attention_divergence": np.mean([diverge(row, everything) for row in everything])}
            if layout.has_class:
                expected["class_attention_divergence"] = diverge(0, patches)
            for whose, heads in (("target", target), ("source", source)):
                reach = []
                for row in patches:
                    shares = attend(heads, image, head, row, patches)
                    here = POSITIONS[row - layout.num_prefix]
                    distances = [math.dist(here, there) for there in POSITIONS]
                    reach.append(np.dot(shares, distances))
                expected[f"attention_distance_{whose}"] = np.mean(reach)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key][image, head].item() == pytest.approx(value, rel=1e-10), key


def test_the_divergence_is_one_bit_for_disjoint_and_zero_for_equal_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4], dtype=torch.float64)
    q = torch.tensor([[0.0, 0.0, 0.25, 0.75], [0.25] * 4], dtype=torch.float64)
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([1.0, 0.0], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1000, 50, generator=generator, dtype=torch.float64).softmax(-1)
    assert (jensen_shannon(random, random) >= 0).all()


def test_distances_are_weighted_by_attention():
    distances = torch.tensor([[0.0, 16.0, 12.0], [16.0, 0.0, 20.0], [12.0, 20.0, 0.0]], dtype=torch.float64)
    nowhere_else = torch.eye(3, dtype=torch.float64)
    assert mean_distance(nowhere_else, distances) == 0
    everywhere = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    assert mean_distance(everywhere, distances) == pytest.approx(2 * (16 + 12 + 20) / 9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_patches_receive_sums_to_one_and_is_the_class_tokens_where_there_is_one(name):
    layout = LAYOUTS[name]
    heads = make_heads(layout)
    found = received(heads, layout)
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    asking = scores(heads)[:, :, :1] if layout.has_class else scores(heads)
    expected = asking[..., layout.num_prefix :].softmax(-1).mean((1, 2))
    torch.testing.assert_close(found, expected)


def test_attention_that_registers_draw_wholly_leaves_numbers():
    """Among patches it is a softmax of their scores, not a quotient of vanishing shares."""
    layout = LAYOUTS["class-token-and-registers"]
    target, source = make_heads(layout), make_heads(layout, seed=1)
    target.k[:, :, 1] = 1e4 * target.q[:, :, 0]
    for values in attention_measures(target, source, layout).values():
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 2, 1], [1] * 5])
def test_moments_do_not_depend_on_the_batches(sizes):
    generator = torch.Generator().manual_seed(0)
    # Far from zero and close together, where a sum of squares would cancel.
    values = 1 - 1e-9 * torch.rand(5, 2, 3, generator=generator, dtype=torch.float64)
    moments = Moments()
    for batch in values.split(sizes):
        moments.add(batch)
    estimate = moments.estimate()
    assert moments.count == 5
    np.testing.assert_allclose(estimate.mean, values.numpy().mean(0), rtol=1e-15)
    np.testing.assert_allclose(estimate.deviation, values.numpy().std(0, ddof=1), rtol=1e-5)


def test_one_image_has_no_spread():
    moments = Moments()
    moments.add(torch.ones(1, 2, dtype=torch.float64))
    estimate = moments.estimate()
    assert np.isnan(estimate.deviation).all()
    assert estimate.deviation.shape == estimate.mean.shape == (2,)


def test_names_are_those_of_the_definitions():
    layout = LAYOUTS["class-token"]
    target, source = make_heads(layout), make_heads(layout, seed=1)
    found = {**similarities(target, source, layout), **attention_measures(target, source, layout)}
    assert list(found) == list(MEASURES)
    assert all(name == measure.name for name, measure in MEASURES.items())
