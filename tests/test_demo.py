"""The demo runs, writes what it says, and compares variants on equal terms. Nothing here is about gains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from bench.demo.__main__ import main
from bench.demo.digits import NUM_CLASSES, Labels, draw_task, load_parts
from bench.demo.experiment import DEFAULT, DROP_PATH, PLAIN, QUICK, STOCHCA, VARIANTS
from bench.demo.report import compare
from bench.demo.training import build_model, finetune, prepare, task_batches
from stochca import StochCA


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    main(["--quick", "--workers", "1", "--output", str(folder)])
    return folder


def test_quick_run_writes_everything_it_names(output: Path) -> None:
    metrics = json.loads((output / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == [variant.name for variant in VARIANTS]
    assert len(metrics["runs"]) == QUICK.seeds * (len(VARIANTS) + 1 + len(STOCHCA))
    assert {"machine", "versions", "commit", "dirty", "settings"} <= metrics.keys()
    assert all(variant.name in metrics["table"] for variant in VARIANTS)
    for name in ("accuracy.png", "mechanism.png", "cost.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_means_in_the_metrics_are_those_of_their_runs(output: Path) -> None:
    metrics = json.loads((output / "metrics.json").read_text())
    for row in metrics["rows"]:
        runs = [r for r in metrics["runs"] if r["variant"]["name"] == row["name"] and r["labels"]["noise"]]
        mean = sum(100 * run["accuracy"] for run in runs) / len(runs)
        assert row["noisy"]["mean"] == pytest.approx(mean)


def test_checkpoint_is_the_run_it_names_in_plain_timm(output: Path) -> None:
    description = json.loads((output / "target.json").read_text())
    target = timm.create_model(**{**description["timm.create_model"], "checkpoint_path": ""})
    target.load_state_dict(load_file(output / "target.safetensors"))
    source = build_model()
    source.load_state_dict(load_file(output / "source.safetensors"))

    run = next(r for r in QUICK.runs() if r.variant == STOCHCA[1])
    _, again = finetune(run, load_parts(), source)
    pixels = load_parts().target_test.pixels
    with torch.inference_mode():
        torch.testing.assert_close(target.eval()(pixels), again.eval()(pixels), rtol=0, atol=0)


def test_cost_of_plain_is_the_unit(output: Path) -> None:
    rows = {row["name"]: row for row in json.loads((output / "metrics.json").read_text())["rows"]}
    assert [rows[PLAIN.name]["cost"][key] for key in ("time", "flops", "saved_bytes")] == [1, 1, 1]
    assert rows[PLAIN.name]["source_fraction"] == 0
    fractions = [rows[variant.name]["source_fraction"] for variant in STOCHCA]
    assert fractions == sorted(fractions)


def test_no_image_is_in_two_parts() -> None:
    parts = load_parts()
    rows = torch.cat([part.rows for part in parts])
    assert len(rows.unique()) == len(rows) == 1797


def test_training_images_come_from_the_pool_and_are_balanced() -> None:
    pool = load_parts().target_pool
    task = draw_task(pool, Labels(per_class=20, noise=0.4), steps=3, batch_size=4, seed=5)
    assert set(task.train.rows.tolist()) <= set(pool.rows.tolist())
    assert task.train.rows.unique().numel() == 20 * NUM_CLASSES
    assert task.clean_labels.bincount().tolist() == [20] * NUM_CLASSES


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_exactly_the_stated_share_of_labels_is_replaced_at_random(noise: float) -> None:
    pool, labels, wrong = load_parts().target_pool, Labels(per_class=20, noise=noise), 0
    for seed in range(20):
        task = draw_task(pool, labels, steps=1, batch_size=1, seed=seed)
        assert task.replaced.unique().numel() == noise * 100
        differs = task.train.labels != task.clean_labels
        assert set(differs.nonzero().flatten().tolist()) <= set(task.replaced.tolist())
        assert task.train.labels.max() < NUM_CLASSES
        wrong += int(differs.sum())
    # One in five replacements is the right class again.
    assert wrong / 2000 == pytest.approx(0.8 * noise, abs=0.05)


def test_variants_of_a_seed_differ_in_nothing_but_themselves() -> None:
    source = build_model()
    plain = prepare(PLAIN, source, seed=3)[0].state_dict()
    for variant in [*STOCHCA, DROP_PATH]:
        torch.testing.assert_close(prepare(variant, source, seed=3)[0].state_dict(), plain, rtol=0, atol=0)

    # A block that reads the source at one p also does so at every larger one.
    draws = []
    for variant in STOCHCA:
        model = prepare(variant, source, seed=3)[1]
        assert isinstance(model, StochCA)
        draws.append(torch.tensor([model.coins.draw(1).coins for _ in range(200)]))
    assert all((draws[i] <= draws[i + 1]).all() for i in range(len(draws) - 1))


def test_shorter_runs_see_the_first_of_the_same_batches() -> None:
    pool = load_parts().target_pool
    task = draw_task(pool, Labels(per_class=2, noise=0.5), steps=8, batch_size=4, seed=1)
    recipe = replace(DEFAULT.finetuning, steps=8)
    long, short = list(task_batches(task, recipe)), list(task_batches(task, replace(recipe, steps=2)))
    assert (len(long), len(short)) == (8, 2)
    torch.testing.assert_close(short, long[:2], rtol=0, atol=0)
    other = draw_task(pool, Labels(per_class=2, noise=0.5), steps=8, batch_size=4, seed=2)
    assert not torch.equal(task.batches, other.batches)


def test_a_run_repeats_exactly() -> None:
    run = next(run for run in QUICK.runs() if run.variant == DROP_PATH)
    first, second = (finetune(run, load_parts(), build_model())[0] for _ in range(2))
    assert first == second


def test_paired_differences_are_seed_by_seed() -> None:
    paired = compare([3.0, 5.0, 4.0], [1.0, 4.0, 4.0])
    assert (paired.mean, paired.std, paired.difference, paired.above) == (4.0, 1.0, 1.0, 2)
    assert paired.error == pytest.approx(1 / 3**0.5)


def test_default_has_enough_seeds_for_every_variant() -> None:
    for labels, least, variants in ((DEFAULT.noisy, 8, VARIANTS), (DEFAULT.clean, 5, [PLAIN, *STOCHCA])):
        for variant in variants:
            seeds = {run.seed for run in DEFAULT.runs() if (run.variant, run.labels) == (variant, labels)}
            assert len(seeds) >= least


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--steps", "3"], ["--workers", "0"]])
def test_out_of_range_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{arguments[0]}: must be at least" in capsys.readouterr().err
