"""Which target and source an analysis reads."""

import json
import shutil

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.data import OPENAI_CLIP_MEAN

from stochca.analysis.runs import find_runs, load
from stochca.checkpoint import digest
from stochca.config import FinetuneOptions
from stochca.train import Trainer
from tests.train.image_folder import TINY
from tests.weights.others import CLIP_NAME, SIZES, openai_state

CREATE = {**TINY, "img_size": 32}


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the second run, to change."""
    return shutil.copytree(runs[1], tmp_path / "copied")


def only(options):
    (run,) = find_runs(options)
    return run


def test_target_and_source_are_those_of_the_run(runs, make_options, tmp_path):
    for path in runs:
        models = load(only(make_options(runs=[str(path)])), None)
        saved = safetensors.torch.load_file(path / "best.safetensors")
        torch.testing.assert_close(models.target.state_dict(), saved, rtol=0, atol=0)
        config = yaml.safe_load((path / "config.yaml").read_text())
        begun = Trainer(FinetuneOptions(**{**config, "output": str(tmp_path / path.name)}))
        assert digest(models.source) == begun.source_digest
        assert models.data_config == json.loads(json.dumps(begun.data_config))
        assert "random initialisation with seed 0 (the digest is that of the run's source)" in models.origin


def test_the_weights_of_a_folder_are_chosen_and_a_file_is_taken_as_it_is(runs, make_options):
    folder = runs[0]
    assert only(make_options(runs=[str(folder)], weights="last")).path == folder / "last.safetensors"
    assert only(make_options(runs=[str(folder / "last.safetensors")])).path == folder / "last.safetensors"
    with pytest.raises(FileNotFoundError, match=r"hold swad\.safetensors, it has: best\.safetensors, last"):
        find_runs(make_options(weights="swad"))


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(runs, make_options, tmp_path):
    assert [run.name for run in find_runs(make_options())] == ["plain", "stochca"]
    for parent in "ab":
        shutil.copytree(runs[0], tmp_path / parent / "plain")
    twins = [str(tmp_path / parent / "plain") for parent in "ab"]
    assert [run.name for run in find_runs(make_options(runs=twins))] == ["a/plain", "b/plain"]
    files = [str(runs[0] / f"{weights}.safetensors") for weights in ("best", "last")]
    assert [run.name for run in find_runs(make_options(runs=files))] == [
        "best.safetensors",
        "last.safetensors",
    ]
    dotted = [str(shutil.copytree(runs[0], tmp_path / name)) for name in ("p0.1", "p0.3")]
    assert [run.name for run in find_runs(make_options(runs=dotted))] == ["p0.1", "p0.3"]
    assert [run.name for run in find_runs(make_options(names=["one", "two"]))] == ["one", "two"]
    with pytest.raises(ValueError, match="each run can be given once"):
        find_runs(make_options(runs=[twins[0], twins[0]]))


def test_a_source_that_is_not_the_runs_is_refused(copied, make_options):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 1}))
    with pytest.raises(
        ValueError, match=r"seed 1 is not what .* was trained against: the digest .* --source"
    ):
        load(only(make_options(runs=[str(copied)])), None)


def test_without_its_state_a_run_says_that_its_source_is_not_certain(copied, make_options):
    (copied / "trainer_state.pt").unlink()
    origin = load(only(make_options(runs=[str(copied)])), None).origin
    assert origin == "random initialisation with seed 0 (the run recorded no digest of its source)"


def test_the_runs_own_source_may_lie_elsewhere_now(make_run, make_options, tmp_path):
    """The file that a run started from was moved, and is given by hand."""
    pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **CREATE)
    at = tmp_path / "pretrained.safetensors"
    safetensors.torch.save_file(pretrained.state_dict(), at)
    run = make_run("from-file", pretrained=True, pretrained_path=str(at))
    moved = at.rename(tmp_path / "moved.safetensors")
    found = only(make_options(runs=[str(run)]))
    with pytest.raises(FileNotFoundError, match=r"pretrained\.safetensors"):
        load(found, None)
    models = load(found, str(moved))
    assert models.origin == f"{moved} (the digest is that of the run's source)"
    assert torch.equal(models.source.blocks[1].attn.qkv.weight, pretrained.blocks[1].attn.qkv.weight)


def test_another_source_can_be_asked_for_and_is_called_another(runs, make_options, tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", num_classes=7, **CREATE)
    at = tmp_path / "other.safetensors"
    safetensors.torch.save_file(other.state_dict(), at)
    models = load(only(make_options(runs=[str(runs[0])])), str(at))
    assert models.origin == f"{at} (not the source of the run: its digest is another)"
    assert torch.equal(models.source.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_any_two_checkpoints_of_a_timm_model_are_a_pair(make_options, tmp_path):
    models = [timm.create_model("vit_tiny_patch16_224", num_classes=n, **CREATE) for n in (3, 1000)]
    torch.save(models[0].state_dict(), tmp_path / "target.pth")
    safetensors.torch.save_file(models[1].state_dict(), tmp_path / "source.safetensors")
    options = make_options(
        runs=[str(tmp_path / "target.pth")], model="vit_tiny_patch16_224", model_kwargs=TINY, img_size=32
    )
    loaded = load(only(options), str(tmp_path / "source.safetensors"))
    for found, saved in zip((loaded.target, loaded.source), models, strict=True):
        torch.testing.assert_close(found.blocks.state_dict(), saved.blocks.state_dict(), rtol=0, atol=0)
        assert torch.equal(found.pos_embed, saved.pos_embed)
    assert loaded.data_config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("place", ["target", "source"])
def test_a_checkpoint_that_lacks_a_models_blocks_is_refused(place, make_options, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **CREATE)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("target", "source")}
    for name, path in paths.items():
        prefix = "visual." if name == place else ""
        safetensors.torch.save_file({prefix + key: t for key, t in model.state_dict().items()}, path)
    options = make_options(
        runs=[str(paths["target"])], model="vit_tiny_patch16_224", model_kwargs=TINY, img_size=32
    )
    with pytest.raises(ValueError, match=rf"{place}\.safetensors"):
        load(only(options), str(paths["source"]))


def test_a_file_alone_is_compared_with_timms_pretrained_weights(runs, make_options, tmp_path):
    """It says how its model is built, not what it started from."""
    file = shutil.copy(runs[0] / "best.safetensors", tmp_path)
    run = only(make_options(runs=[str(file)]))
    assert run.options.pretrained
    assert run.options.pretrained_path is None
    assert (run.options.img_size, run.options.model_kwargs, run.num_classes) == (32, TINY, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"runs": []}, ValueError, "nothing to analyse"),
        ({"runs": ["/nowhere"]}, FileNotFoundError, "there is no run /nowhere"),
        ({"source": "/nowhere"}, FileNotFoundError, "--source /nowhere is not a file"),
        ({"model": "vit_tiny_patch16_224"}, FileNotFoundError, "a file of weights, as --model is given"),
    ],
    ids=["none", "no-run", "no-source", "folder-as-weights"],
)
def test_what_is_not_there_is_named(changes, error, message, make_options):
    with pytest.raises(error, match=message):
        find_runs(make_options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["one"]}, r"--names must be one per run \(2\), got 1"),
        ({"names": ["one", "one"]}, "--names must differ"),
        ({"img_size": 32}, "--model-kwargs and --img-size are for --model"),
        ({"num_images": 0}, "--num-images must be at least 1, got 0"),
        ({"pictures": -1}, "--pictures must be at least 0, got -1"),
    ],
    ids=["names", "twins", "size", "images", "pictures"],
)
def test_options_that_do_not_fit_are_refused(changes, message, make_options):
    with pytest.raises(ValueError, match=message):
        make_options(**changes)


def test_a_file_that_is_not_of_a_run_is_refused(make_options, tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was not written by stochca finetune"):
        find_runs(make_options(runs=[str(tmp_path / "other.safetensors")]))


def test_a_configuration_of_something_else_is_refused(copied, make_options):
    (copied / "config.yaml").write_text("p: 0.1\n")
    with pytest.raises(ValueError, match=r"config\.yaml holds no options of stochca finetune"):
        find_runs(make_options(runs=[str(copied)]))


def test_a_run_with_adapters_is_read_with_what_they_learned(make_run, make_options):
    path = make_run("adapters", lora_rank=2)
    models = load(only(make_options(runs=[str(path)])), None)
    saved = safetensors.torch.load_file(path / "best.safetensors")
    torch.testing.assert_close(models.target.state_dict(), saved, rtol=0, atol=0)
    assert "the digest is that of the run's source" in models.origin


def test_a_run_after_clips_projection_is_read_as_it_was_saved(make_run, make_options, tmp_path):
    torch.save(openai_state(), tmp_path / "clip.pth")
    sizes = {"img_size": SIZES["img_size"], "model_kwargs": {k: SIZES[k] for k in SIZES if k != "img_size"}}
    weights = {"pretrained": True, "pretrained_path": str(tmp_path / "clip.pth"), "clip_projection": True}
    path = make_run("clip", model=CLIP_NAME, **sizes, **weights)
    models = load(only(make_options(runs=[str(path)])), None)
    saved = safetensors.torch.load_file(path / "best.safetensors")
    torch.testing.assert_close(models.target.state_dict(), saved, rtol=0, atol=0)
    assert models.target.pretrained_cfg["mean"] == OPENAI_CLIP_MEAN
    assert "the digest is that of the run's source" in models.origin
