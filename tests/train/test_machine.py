"""What a run does with its machine: precision of products, and batches that do not fit."""

import pytest
import torch

import stochca.memory
from stochca.model import StochCA
from stochca.train import Trainer


@pytest.mark.parametrize(("tf32", "precision"), [(False, "highest"), (True, "high")])
def test_tf32_is_for_products_of_float32(make_options, tf32, precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        Trainer(make_options(tf32=tf32))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def limit_memory(monkeypatch):
    """Have the model run out of memory above some number of images."""

    def limit(images_that_fit):
        forward = StochCA.forward

        def limited(model, images, *args, **kwargs):
            if len(images) > images_that_fit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(model, images, *args, **kwargs)

        monkeypatch.setattr(StochCA, "forward", limited)

    return limit


@pytest.mark.parametrize(
    ("batch_size", "fits", "accumulate", "message"),
    [
        (16, 16, 1, None),
        (16, 11, 1, "at --batch-size 16; 8 fits: --batch-size 8 --grad-accum-steps 2 is a step of as many"),
        (18, 2, 3, "at --batch-size 18; 2 fits: --batch-size 2 --grad-accum-steps 27 is"),
        (6, 1, 1, "at --batch-size 6; 1 fits: --batch-size 1 --grad-accum-steps 6 is"),
        (16, 0, 1, "at --batch-size 16, and not even one image fits: --recompute, --grad-checkpointing"),
    ],
)
def test_out_of_memory_says_what_fits(make_options, limit_memory, batch_size, fits, accumulate, message):
    limit_memory(fits)
    # One step in the last epoch of a schedule, after which nothing is to be drawn.
    options = make_options(
        batch_size=batch_size, grad_accum_steps=accumulate, epochs=1, steps=1, p_schedule=[0.5]
    )
    trainer = Trainer(options)
    before = [p.detach().clone() for p in trainer.model.target.parameters()]
    if message is None:
        trainer.run()
        return
    with pytest.raises(ValueError, match=f"^step 1: out of memory {message}"):
        trainer.run()
    for p, q in zip(trainer.model.target.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


def test_what_fits_is_tried_with_the_coins_that_did_not(make_options, limit_memory, monkeypatch):
    trainer = Trainer(make_options())
    trainer.model.coins.step = 8  # drawn by the step that failed: 7
    steps, draw = [], trainer.model.coins.draw

    def recording(*args):
        steps.append(trainer.model.coins.step)
        return draw(*args)

    monkeypatch.setattr(trainer.model.coins, "draw", recording)
    limit_memory(1)
    limited = StochCA.forward

    def drawing(model, images, *args):
        model.coins.draw(len(images))
        return limited(model, images, *args)

    monkeypatch.setattr(StochCA, "forward", drawing)
    assert stochca.memory.largest_fitting(trainer.model.train(), (3, 32, 32), 8) == 1
    assert set(steps[:3]) == {7}
    assert trainer.model.coins.step == 8
