"""The average of weights along the flat part of a run."""

import pytest
import torch

from stochca.swad import Swad

STEPS = 2  # of a segment


def run(losses, *, resume_after=None, **options):
    """The average of weights that are the number of the step."""
    swad = Swad(**options)
    for segment, loss in enumerate(losses):
        for step in range(segment * STEPS + 1, (segment + 1) * STEPS + 1):
            swad.update({"w": torch.tensor([float(step)]), "n": torch.tensor(step)})
            if step == resume_after:
                state, swad = swad.state(), Swad(**options)
                swad.restore(state, torch.device("cpu"))
        swad.end_segment((segment + 1) * STEPS, loss)
    return swad.result()


def by_definition(losses, converge, tolerance, ratio):
    """The steps of the average, found with all losses at hand."""
    for first in range(len(losses) - converge + 1):
        window = losses[first : first + converge]
        if losses[first] == min(window):
            threshold = (1 + ratio) * sum(window) / converge
            break
    else:
        return None
    last = first
    while last < len(losses) and min(losses[last : last + tolerance]) <= threshold:
        last += 1
    return first * STEPS + 1, last * STEPS


@pytest.mark.parametrize("converge", [1, 2, 3])
@pytest.mark.parametrize("tolerance", [1, 3, 6])
def test_the_average_is_over_the_steps_of_the_definition(converge, tolerance):
    generator = torch.Generator().manual_seed(converge + 10 * tolerance)
    seen = set()
    for _ in range(60):
        length = int(torch.randint(1, 12, (), generator=generator))
        losses = (1 + torch.rand(length, generator=generator)).tolist()
        span = by_definition(losses, converge, tolerance, 0.1)
        options = {"converge": converge, "tolerance": tolerance, "tolerance_ratio": 0.1}
        found = run(losses, **options)
        resumed = run(losses, resume_after=int(torch.randint(1, 24, (), generator=generator)), **options)
        seen.add(span is None)
        if span is None:
            assert found is None
            continue
        assert (found.start, found.end) == span
        torch.testing.assert_close(found.mean["w"].item(), sum(span) / 2)
        assert found.mean["n"].dtype == torch.float32
        assert torch.equal(resumed.mean["w"], found.mean["w"])
    assert False in seen


def test_weights_are_copied():
    weight = torch.zeros(3)
    swad = Swad(converge=1)
    swad.update({"w": weight})
    weight += 1
    swad.update({"w": weight})
    weight += 1
    swad.end_segment(2, 1.0)
    assert swad.result().mean["w"].tolist() == [0.5] * 3
