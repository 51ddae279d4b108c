"""Domains of the same classes: their splits, and batches that hold all of them alike."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from stochca.data import make_domain_loader, make_loader, open_domains, open_images
from tests.data.helpers import CONFIG, assert_same, damage, defaults, read
from tests.train.image_folder import write_images


def training_domains(root, **how):
    return [splits["in"] for splits in open_domains(str(root), seed=0, **how).values()]


def loader_of(root, batch_size=2, **how):
    return make_domain_loader(training_domains(root), CONFIG, batch_size, **{**defaults(), **how})


def names_of(images):
    return [images.name(index) for index in range(len(images))]


def places_of(root, epoch=0, start=0, **how):
    """Pairs of a domain and a position that the sampler of a loader gives."""
    _, sampler = loader_of(root, **how)
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


def test_each_domain_is_split_in_two(domains_folder):
    domains = open_domains(str(domains_folder), seed=0)
    assert list(domains) == ["clay", "ink", "oil"]
    for (name, splits), total in zip(domains.items(), (12, 15, 30), strict=True):
        whole = open_images(str(domains_folder / name), "", "", is_training=False)
        assert len(splits["out"]) == total // 5
        assert sorted(names_of(splits["in"]) + names_of(splits["out"])) == sorted(names_of(whole))
        assert splits["in"].classes == splits["out"].classes == ["ant", "bee", "cow"]


def test_the_split_depends_on_seed_and_domain_alone(domains_folder, tmp_path):
    def held_out(root, **how):
        splits = {name: names_of(its["out"]) for name, its in open_domains(str(root), **how).items()}
        return {name: [path.removeprefix(str(root)) for path in paths] for name, paths in splits.items()}

    first = held_out(domains_folder, seed=0)
    assert first == held_out(domains_folder, seed=0)
    assert all(first[name] != paths for name, paths in held_out(domains_folder, seed=1).items())
    root = tmp_path / "two"
    for name in ("ink", "oil"):
        shutil.copytree(domains_folder / name, root / name)
    assert held_out(root, seed=0) == {name: first[name] for name in ("ink", "oil")}
    assert [len(paths) for paths in held_out(root, seed=0, holdout_fraction=0.5).values()] == [7, 15]


def test_domains_of_the_same_images_are_split_and_ordered_differently(tmp_path):
    root = write_images(tmp_path, {"clay": 6})
    shutil.copytree(root / "clay", root / "wax")
    clay, wax = (splits["out"].indices.tolist() for splits in open_domains(str(root), seed=0).values())
    assert clay != wax
    places = places_of(root, batch_size=15)
    assert [place for domain, place in places if domain == 0] != [place for domain, place in places if domain]


def test_a_split_is_evaluated_as_any_images(domains_folder):
    splits = open_domains(str(domains_folder), seed=0)["oil"]
    loader, sampler = make_loader(splits["out"], CONFIG, 4, **defaults())
    targets = torch.cat([target for _, target in loader])
    assert sampler is None
    assert targets.tolist() == splits["out"].targets().tolist()


def test_a_batch_holds_as_many_images_of_each_domain_in_their_order(domains_folder):
    domains = training_domains(domains_folder)
    loader, sampler = loader_of(domains_folder, no_aug=True)
    plain = [make_loader(domain, CONFIG, 1, **defaults())[0].dataset for domain in domains]
    assert len(loader) == 24 // 2  # the longest domain has 24 of its 30 images in this split
    places = list(sampler)
    for number, (_, target) in enumerate(read(loader, sampler)):
        step = places[number * 6 : number * 6 + 6]
        assert [domain for domain, _ in step] == [0, 0, 1, 1, 2, 2]
        assert target.tolist() == [
            int(plain[domain].targets()[position % len(plain[domain])]) for domain, position in step
        ]


def test_each_domain_is_walked_through_in_epochs_of_its_own(domains_folder):
    places = [place for epoch in range(4) for place in places_of(domains_folder, epoch)]
    orders = []
    for domain, length in enumerate((10, 12, 24)):
        walk = [position for number, position in places if number == domain]
        assert len(walk) == 4 * 24
        for epoch in range(4 * 24 // length):
            once = walk[epoch * length : (epoch + 1) * length]
            assert sorted(once) == list(range(epoch * length, (epoch + 1) * length))
            orders.append([domain, *(position % length for position in once)])
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_that_starts_in_the_middle_is_the_rest_of_the_whole_one(domains_folder, workers):
    loader, sampler = loader_of(domains_folder, workers=workers)
    whole = read(loader, sampler, epoch=2)
    loader, sampler = loader_of(domains_folder)
    assert sampler.global_batch_size == 6
    rest = read(loader, sampler, epoch=2, start=5 * 6)
    assert len(rest) == 12 - 5
    assert_same(whole[5:], rest)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(("batch_size", "world_size"), [(2, 2), (1, 4)])
def test_processes_together_see_the_batches_of_one(domains_folder, batch_size, world_size, start):
    def by_domain(batch, parts):
        return [torch.stack(chunks) for chunks in zip(*(part.chunk(3) for part in parts), strict=True)]

    loader, sampler = loader_of(domains_folder, batch_size=4)
    whole = read(loader, sampler, epoch=1, start=start * sampler.global_batch_size)
    parts = []
    for rank in range(world_size):
        loader, sampler = loader_of(domains_folder, batch_size=batch_size, rank=rank, world_size=world_size)
        parts.append(read(loader, sampler, epoch=1, start=start * sampler.global_batch_size))
        assert len(parts[-1]) == len(whole) == 6 - start
    for step, (images, target) in enumerate(whole):
        ours = [part[step] for part in parts]
        for tensor, chunks in ((images, [i for i, _ in ours]), (target, [t for _, t in ours])):
            joined = [torch.cat(pieces) for pieces in zip(*(c.chunk(3) for c in chunks), strict=True)]
            assert torch.equal(torch.cat(joined), tensor)


def test_a_batch_may_be_larger_than_a_domain(domains_folder):
    walk = [position for domain, position in places_of(domains_folder, batch_size=25) if domain == 0]
    assert sorted(walk[:20]) == list(range(20))
    assert len(walk) == 25


def test_a_damaged_image_of_any_domain_is_named(tmp_path):
    root = write_images(tmp_path / "images", {"clay": 2, "ink": 2})
    domains = training_domains(root)
    bad = damage(Path(domains[1].name(0)), "truncated")
    loader, _ = make_domain_loader(domains, CONFIG, 6, device=torch.device("cpu"), workers=1)
    list(loader)
    assert loader.dataset.unreadable_names() == [str(bad)]
    with pytest.raises(ValueError, match=f"cannot read image {bad}"):
        loader.dataset.check_readable()
    assert not domains[1].unreadable_names()


def test_domains_of_other_classes_are_named(tmp_path):
    root = write_images(tmp_path, {"clay": 1, "ink": 1})
    shutil.move(root / "ink" / "bee", root / "ink" / "elk")
    with pytest.raises(
        ValueError,
        match=r"domain ink in .* has other classes than domain clay: lacks 1 \(bee\) and adds 1 \(elk\)",
    ):
        open_domains(str(root), seed=0)


def test_a_class_without_images_is_named(tmp_path):
    root = write_images(tmp_path, {"clay": 1, "ink": 1})
    (root / "ink" / "bee" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"domain ink in .* has no images in its class folders bee"):
        open_domains(str(root), seed=0)


def test_folders_within_class_folders_are_refused(tmp_path):
    root = write_images(tmp_path, {"clay": 1, "ink": 1})
    shutil.copytree(root / "ink" / "bee", root / "ink" / "cow" / "more")
    with pytest.raises(
        ValueError, match=r"domain ink .* has other classes than its folders say: adds 1 \(more\)"
    ):
        open_domains(str(root), seed=0)


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        ({}, "it has: no folders"),
        ({"PACS.zip": None}, "it has: no folders and the archives PACS.zip, which must be extracted first"),
        ({"PACS/photo/dog/0.jpg": None}, "it has: PACS"),
        ({"photo/dog/0.jpg": None, "sketch.tar.gz": None}, "it has: photo and the archives sketch.tar.gz"),
        (
            {"photo/dog/0.jpg": None, "sketch/all.zip": None},
            "sketch has: no folders and the archives all.zip",
        ),
        ({"photo/dog/0.jpg": None, "__MACOSX/x": None, ".cache/x": None}, "it has: photo"),
    ],
)
def test_a_folder_of_another_layout_is_told_from_the_wanted_one(tmp_path, layout, found):
    for name in layout:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"must hold one folder per domain, .*; {re.escape(found)}"):
        open_domains(str(tmp_path), seed=0)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere must hold one folder per domain, .* it is not there"
    ):
        open_domains(str(tmp_path / "nowhere"), seed=0)


def test_a_split_without_images_is_refused(tmp_path):
    root = write_images(tmp_path, {"clay": 1, "ink": 1})
    with pytest.raises(ValueError, match=r"domain clay has 3 images, of which 0\.2 is none"):
        open_domains(str(root), seed=0)
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
            open_domains(str(root), seed=0, holdout_fraction=fraction)


def test_no_domains_are_refused():
    with pytest.raises(ValueError, match="at least one training domain"):
        make_domain_loader([], CONFIG, 1, **defaults())
