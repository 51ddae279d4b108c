"""Which runs there are; what does not fit is refused before anything is trained."""

import shutil

import pytest

from stochca.domainbed import domainbed
from stochca.domainbed.plan import make_plan
from tests.train.image_folder import write_images


def test_methods_can_be_compared_after_the_first_domain(make_options, tmp_path):
    runs = make_plan(make_options(methods=["miro", "erm"], seeds=[3, 1], test_domains=["ink", "clay"])).runs()
    assert [(run.method, run.seed, run.domain) for run in runs] == [
        (method, seed, domain) for seed in (3, 1) for domain in ("ink", "clay") for method in ("miro", "erm")
    ]
    for run in runs:
        assert run.folder == tmp_path / "bed" / run.method / f"seed-{run.seed}" / run.domain
        assert run.options.seed == run.seed


def test_a_run_does_not_depend_on_what_other_runs_there_are(make_options):
    few = make_plan(make_options(methods=["miro"], seeds=[1], test_domains=["ink"])).runs()
    many = make_plan(make_options(methods=["erm", "miro"], seeds=[0, 1], spread="standard deviation")).runs()
    assert few[0] in many


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_domains": ["clay", "Real"]},
            "--test-domains has Real, .* the nearest is Real World, all are Real World, clay, ink",
        ),
        ({"test_domains": []}, r"--test-domains must be different domains, at least one, got \[\]"),
        ({"test_domains": ["ink", "ink"]}, "--test-domains must be different domains"),
        ({"data_dir": None}, "--data-dir must be a folder with one folder per domain"),
        ({"seed": 3}, "--seed would be without effect: give --seeds 3"),
        ({"resume": "there"}, "--resume is not needed"),
        ({"losses": ["bss", {"miro": {"weight": 1.0}}]}, "--losses .* must be without miro"),
        ({"losses": ["miro"]}, "--losses .* must be without miro"),
        ({"layout": "pacs"}, "PACS wants the domains art_painting, cartoon, photo, sketch"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(make_options, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        domainbed(make_options(**changes))
    assert not (tmp_path / "bed").exists()


def test_one_domain_is_too_few(make_options, tmp_path):
    root = write_images(tmp_path / "images", {"clay": 4})
    with pytest.raises(ValueError, match=r"one folder per domain, at least two, .* it has: clay"):
        domainbed(make_options(data_dir=str(root)))


def test_a_class_that_a_domain_lacks_is_named(make_options, folder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    shutil.rmtree(root / "ink" / "bee")
    with pytest.raises(ValueError, match=r"domain ink .* has other classes .* lacks 1 \(bee\)"):
        domainbed(make_options(data_dir=str(root)))


def test_a_folder_of_something_else_is_left_alone(make_options, tmp_path):
    (tmp_path / "bed").mkdir()
    (tmp_path / "bed" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and holds no runs of stochca domainbed"):
        domainbed(make_options())


def test_a_run_that_fails_is_named(make_options):
    with pytest.raises(ValueError, match=r"^erm, seed 0, without clay: the loss is nan at step 2"):
        domainbed(make_options(methods=["erm"], test_domains=["clay"], lr=float("inf")))
