"""Which images a process sees, in which order: however many load them, wherever a run was interrupted."""

import os
import signal

import numpy as np
import pytest
import torch

import stochca.data.loader
from tests.data.helpers import assert_same, batches_of, loader_of, read


@pytest.mark.parametrize("augmentation", [{}, {"reprob": 0.9, "auto_augment": "rand-m9-mstd0.5"}])
def test_images_and_augmentation_do_not_depend_on_the_number_of_workers(folder, augmentation):
    assert_same(batches_of(folder, **augmentation), batches_of(folder, workers=1, **augmentation))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_leaves_a_worker_alone_from_its_start(folder, monkeypatch, signum):
    prepare = stochca.data.loader._outlive_signals

    def prepare_after_the_signal(worker_info):
        os.kill(os.getpid(), signum)
        return prepare(worker_info)

    monkeypatch.setattr(stochca.data.loader, "_outlive_signals", prepare_after_the_signal)
    assert_same(batches_of(folder), batches_of(folder, workers=1))


def test_an_epoch_that_starts_in_the_middle_is_the_rest_of_the_whole_one(folder):
    assert_same(batches_of(folder, epoch=1)[2:], batches_of(folder, epoch=1, start=8))


def test_an_image_is_augmented_anew_in_every_epoch_and_for_every_seed_but_else_the_same(folder):
    images, _, _ = loader_of(folder, "train")
    other, _, _ = loader_of(folder, "train", seed=1)
    first, again, next_epoch, other_seed = images[5][0], images[5][0], images[18 + 5][0], other[5][0]
    assert (first == again).all()
    assert (first != next_epoch).any()
    assert (first != other_seed).any()


def test_epochs_and_seeds_differ_in_order(folder):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        _, _, sampler = loader_of(folder, "train", seed=seed)
        sampler.epoch = epoch
        orders.append([position % 18 for position in sampler])
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_loading_leaves_the_global_generators_alone(folder):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches_of(folder)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(("batch_size", "world_size"), [(6, 1), (3, 1), (3, 2), (1, 9)])
def test_each_image_is_seen_once_per_epoch(folder, batch_size, world_size):
    for epoch in range(2):
        seen = []
        for rank in range(world_size):
            _, _, sampler = loader_of(folder, "train", batch_size, rank=rank, world_size=world_size)
            sampler.epoch = epoch
            seen += [position - epoch * 18 for position in sampler]
        assert sorted(seen) == list(range(18))


@pytest.mark.parametrize("start", [0, 8])
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 2), (2, 4), (1, 8)])
def test_processes_together_see_the_batches_of_one(folder, batch_size, world_size, start):
    whole = batches_of(folder, epoch=1, start=start, batch_size=8)
    parts = [
        batches_of(
            folder,
            epoch=1,
            start=start,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            workers=rank % 2,
        )
        for rank in range(world_size)
    ]
    joined = [tuple(torch.cat(part) for part in zip(*step, strict=True)) for step in zip(*parts, strict=True)]
    assert len(whole) == 2 - start // 8
    assert_same(whole, joined)


@pytest.mark.parametrize(("batch_size", "world_size"), [(5, 1), (4, 3), (2, 4), (5, 2)])
def test_all_processes_have_equally_many_batches(folder, batch_size, world_size):
    for rank in range(world_size):
        _, loader, sampler = loader_of(folder, "train", batch_size, rank=rank, world_size=world_size)
        batches = read(loader, sampler)
        assert len(loader) == len(batches) == 18 // (batch_size * world_size)
        assert [len(target) for _, target in batches] == [batch_size] * len(batches)


def test_evaluation_sees_every_image_once_the_last_partial_batch_included(folder):
    _, loader, _ = loader_of(folder, "validation")
    assert [len(target) for _, target in loader] == [4, 4, 1]
    assert torch.cat([target for _, target in loader]).tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_evaluate_every_image_once_and_some_may_have_none(folder, workers):
    _, whole, _ = loader_of(folder, "validation", batch_size=9)
    pixels = next(iter(whole))[0].clone()
    for world_size in (2, 4, 11):
        for rank in range(world_size):
            _, loader, sampler = loader_of(
                folder, "validation", batch_size=2, rank=rank, world_size=world_size, workers=workers
            )
            assert sampler is None
            batches = [images.clone() for images, _ in loader]
            expected = pixels[rank::world_size]
            assert len(loader) == len(batches) == -(-len(expected) // 2)
            assert torch.equal(torch.cat([*batches, pixels[:0]]), expected)


def test_too_few_images_for_a_batch_are_refused(folder):
    with pytest.raises(ValueError, match="--batch-size is 19, but there are only 18 training images"):
        loader_of(folder, "train", batch_size=19)
    with pytest.raises(
        ValueError, match="is 5 in each of 4 processes, but there are only 18 training images"
    ):
        loader_of(folder, "train", batch_size=5, rank=1, world_size=4)
