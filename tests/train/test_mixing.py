"""Mixup and CutMix: what is mixed, how often, and until when."""

import pytest
import torch
import torch.nn.functional as F
from interruption import assert_resumes

from stochca.train import Trainer

CLASSES = 3


def next_batch(trainer):
    """A batch as it is read, and as a step gets it."""
    trainer.sampler.epoch = trainer.sampler.start = 0
    plain = [t.clone() for t in next(iter(trainer.loader))]
    trainer.sampler.epoch = trainer.sampler.start = 0
    return plain, trainer._next(iter(trainer.loader))


def shares_of(images, mixed):
    """The share of each image in what it was mixed to, `[B]`."""
    ratio = (mixed - images.flip(0)) / (images - images.flip(0))
    return ratio.flatten(1).nanmedian(dim=1).values


def mixed_labels(labels, shares, smoothing=0.0):
    one_hot = (1 - smoothing) * F.one_hot(labels, CLASSES) + smoothing / CLASSES
    return shares * one_hot + (1 - shares) * one_hot.flip(0)


@pytest.mark.parametrize(
    ("mode", "smoothing"), [("batch", 0.0), ("batch", 0.3), ("pair", 0.0), ("elem", 0.3)]
)
def test_mixup_mixes_images_and_labels_by_the_same_shares(make_options, mode, smoothing):
    trainer = Trainer(make_options(mixup=1.0, smoothing=smoothing, mixup_mode=mode))
    (images, labels), (mixed, soft) = next_batch(trainer)
    shares = shares_of(images, mixed)
    assert ((shares > 0.001) & (shares < 0.999)).all()
    each = shares[:, None, None, None]
    torch.testing.assert_close(mixed, each * images + (1 - each) * images.flip(0), rtol=1e-3, atol=1e-3)
    expected = mixed_labels(labels, shares[:, None], smoothing)
    torch.testing.assert_close(soft, expected, rtol=1e-3, atol=1e-3)
    assert len(labels.unique()) > 1
    number = {"batch": 1, "pair": 2, "elem": 4}[mode]
    assert len((1000 * shares).round().unique()) == number


def test_cutmix_pastes_a_box_and_labels_by_its_area(make_options):
    trainer = Trainer(make_options(cutmix=1.0, smoothing=0.0))
    (images, labels), (mixed, soft) = next_batch(trainer)
    pasted = (mixed != images).any(dim=1).any(dim=0)  # [H, W]
    rows, columns = pasted.any(dim=1).nonzero()[:, 0], pasted.any(dim=0).nonzero()[:, 0]
    box = (..., slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    expected = images.clone()
    expected[box] = images.flip(0)[box]
    assert torch.equal(mixed, expected)
    area = len(rows) * len(columns) / pasted.numel()
    assert 0 < area < 1
    torch.testing.assert_close(soft, mixed_labels(labels, 1 - area))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"mixup": 1.0, "mixup_prob": 0.0}, 0.0),
        ({"mixup": 1.0, "cutmix": 1.0, "mixup_switch_prob": 0.0}, 1.0),
        ({"mixup": 1.0, "cutmix": 1.0, "mixup_switch_prob": 1.0}, 0.5),
    ],
)
def test_how_often_is_mixed_and_by_which_of_the_two(make_options, options, share):
    """Mixup changes whole images, cutmix a part."""
    (images, _), (mixed, _) = next_batch(Trainer(make_options(**options)))
    changed = (mixed != images).double().mean().item()
    assert changed == pytest.approx(share, abs=0.45 if share == 0.5 else 0.05)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_a_mixed_run_resumes_bitwise_equal(make_options, monkeypatch, tmp_path, mode):
    options = {"mixup": 0.4, "cutmix": 1.0, "mixup_mode": mode, "mixup_prob": 0.7, "mixup_off_epoch": 2}
    assert_resumes(make_options, monkeypatch, tmp_path, steps=(2, 7), **options)


def test_batches_are_mixed_until_the_epoch_that_says_so(make_options, monkeypatch):
    trainer = Trainer(make_options(mixup=1.0, mixup_off_epoch=2, smoothing=0.0))
    seen, forward = [], trainer.module.forward

    def spying(images, labels):
        seen.append(bool(((labels > 0) & (labels < 1)).any()))
        return forward(images, labels)

    monkeypatch.setattr(trainer.module, "forward", spying)
    trainer.run()
    assert any(seen[:4])
    assert any(seen[4:8])
    assert not any(seen[8:])
