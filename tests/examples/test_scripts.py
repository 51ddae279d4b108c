"""Each example does what it says, with the command that it names, on small data."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("sklearn")

from stochca import StepPlan, StochCA
from tests.train.image_folder import write_images

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
SMALL = ["--model", "test_vit", "--no-pretrained", "--img-size", "32"]
CHANCE = math.log(10)  # cross-entropy of a guess between ten classes


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script, or its changed text, as if by its command; return its names and what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def run(name, *flags, code=None):
        torch.manual_seed(0)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        path = EXAMPLES / f"{name}.py"
        if code is not None:
            path = tmp_path / f"{name}.py"
            path.write_text(code)
        names = runpy.run_path(str(path), run_name="__main__")
        return names, capsys.readouterr().out

    yield run
    sys.modules.pop("common", None)


def numbers(text, name):
    return [float(value) for value in re.findall(rf"{name} (-?[\d.]+)", text)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_is_short_names_its_command_and_is_listed(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    (command,) = re.findall(rf"^((?:python|torchrun .*) examples/{name}.py)(?:$|  )", text, re.MULTILINE)
    assert text.startswith('"""')
    assert len(text.splitlines()) < 60
    (row,) = [line for line in (EXAMPLES / "README.md").read_text().splitlines() if f"({name}.py)" in line]
    assert f"`{command}`" in row


def test_fine_tuning_ends_in_a_plain_timm_model(run):
    names, printed = run("finetune_timm", *SMALL, "--epochs", 1, "--lr", 2e-3)
    assert numbers(printed, "loss")[0] < CHANCE - 0.4
    assert names["model"].coins.step == 30
    plain = timm.create_model(
        "test_vit", num_classes=10, img_size=32, checkpoint_path="finetuned.safetensors"
    ).to(names["DEVICE"])
    assert numbers(printed, "accuracy")[-1] == pytest.approx(names["accuracy"](plain, names["val"]), abs=0.05)


def test_fine_tuning_takes_image_folders(run, tmp_path):
    write_images(tmp_path / "birds", {"train": 6, "val": 2})
    run(
        "finetune_timm",
        *SMALL,
        "--data-dir",
        tmp_path / "birds",
        "--epochs",
        1,
        "--output",
        "birds.safetensors",
    )
    timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path="birds.safetensors")


def test_two_lines_turn_a_plain_loop_into_stochca(run):
    code = (EXAMPLES / "two_lines.py").read_text()
    plain_code, count = re.subn(r"^.*  # line (one|two)\n", "", code, flags=re.MULTILINE)
    assert count == 2
    assert not re.search("StochCA|stochca", plain_code.partition("import")[2])
    for text, kind in ((code, StochCA), (plain_code, timm.models.VisionTransformer)):
        names, printed = run("two_lines", *SMALL, "--epochs", 1, "--lr", 5e-3, code=text)
        assert type(names["model"]) is kind
        assert numbers(printed, "loss")[0] < CHANCE - 0.1


def test_a_model_of_ones_own_learns_with_its_frozen_copy_as_the_source(run):
    names, printed = run("own_model", "--steps", 60)
    assert min(numbers(printed, "accuracy")) > 80
    assert names["coins"].step == 60  # of the second half alone
    model, images = names["model"], names["images"][:2]
    source = names["source"]  # is at the end what the model is
    ran = []
    for i, block in enumerate(source.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    through_source = model(images, source.pairs(images, StepPlan((True, False, True, False))))
    torch.testing.assert_close(through_source, model(images))
    assert ran == [0, 1]


def test_two_processes_end_with_the_same_weights():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "examples/ddp.py", *SMALL, "--epochs", "1", "--lr", "0.02"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert numbers(done.stdout, "loss")[0] < CHANCE - 0.1
    for rank in (0, 1):
        assert f"process {rank} of 2: weights equal those of process 0: True" in done.stdout


def test_miro_is_a_term_of_the_loss_and_learns_its_variances(run):
    names, printed = run("miro", *SMALL, "--epochs", 1, "--lr", 2e-3)
    (loss,), (cross_entropy,), (miro,) = (
        numbers(printed, name) for name in ("loss", "cross_entropy", "miro")
    )
    assert loss == pytest.approx(cross_entropy + miro, abs=2e-3)
    assert cross_entropy < CHANCE - 0.4
    untrained = type(names["miro"])(names["model"])
    assert all(not torch.equal(b, b0.to(b)) for b, b0 in zip(names["miro"].b, untrained.b, strict=True))


def test_segmentation_finds_discs_and_squares_plain_and_with_stochca(run):
    names, printed = run("segmentation", *SMALL, "--steps", 30, "--lr", 2e-3)
    plain, stochca = numbers(printed, "mean IoU")
    masks = names["masks"]
    guess = names["mean_iou"](torch.zeros_like(masks), masks)
    assert min(plain, stochca) > 45 > 30 > guess
    assert plain != stochca
    assert (names["backbone"].coins.p, names["backbone"].coins.step) == (0.3, 30)


def test_mean_iou_is_intersection_over_union(run):
    names, _ = run("segmentation", *SMALL, "--steps", 1)
    predicted, masks = torch.randint(3, (2, 4, 5, 5), generator=torch.Generator().manual_seed(0))
    ious = [
        ((predicted == c) & (masks == c)).sum() / ((predicted == c) | (masks == c)).sum() for c in range(3)
    ]
    assert names["mean_iou"](predicted, masks) == pytest.approx(100 * sum(ious).item() / 3)
