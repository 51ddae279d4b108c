"""A frozen source that is not what the target starts from."""

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from stochca.train import Trainer, finetune
from tests.models import perturb
from tests.weights.others import NAME, SIZES, torchvision_vit


@pytest.fixture
def target_path(tmp_path):
    return save_vit(tmp_path / "target.pth", seed=0)


@pytest.fixture
def source_path(tmp_path):
    return save_vit(tmp_path / "source.pth", seed=1)


def save_vit(path, seed, num_classes=7, **kwargs):
    model = timm.create_model(NAME, num_classes=num_classes, **{**SIZES, **kwargs})
    perturb(model, seed)
    torch.save(model.state_dict(), path)
    return path


def weight(path):
    return torch.load(path)["blocks.1.mlp.fc1.weight"]


def test_target_and_source_have_weights_of_their_own(make_options, target_path, source_path):
    model = Trainer(make_options(target_path, source_path=str(source_path))).model
    assert torch.equal(model.target.blocks[1].mlp.fc1.weight, weight(target_path))
    assert torch.equal(model.source.blocks[1].mlp.fc1.weight, weight(source_path))
    assert not any(p.requires_grad for p in model.source.parameters())


def test_a_target_from_scratch_reads_a_pretrained_source(make_options, source_path):
    options = make_options("", pretrained=False, source_path=str(source_path))
    options.pretrained_path = None
    model = Trainer(options).model
    assert torch.equal(model.source.blocks[1].mlp.fc1.weight, weight(source_path))
    assert not torch.equal(model.target.blocks[1].mlp.fc1.weight, weight(source_path))


def test_a_source_of_its_own_has_the_head_of_its_weights(make_options, target_path, source_path):
    options = make_options(target_path, source_path=str(source_path), losses=["distillation"])
    model = Trainer(options).model
    assert torch.equal(model.source.head.weight, torch.load(source_path)["head.weight"])
    assert (model.source.num_classes, model.target.num_classes) == (7, 2)


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [({}, 0.5, 0.5), ({"mean": [0.3], "std": [0.25]}, 0.3, 0.25)],
    ids=["models", "given"],
)
def test_images_are_renormalised_for_a_source_of_another_normalisation(
    make_options, tmp_path, target_path, given, mean, std
):
    path = tmp_path / "torchvision.pth"
    theirs = torchvision_vit().eval()
    torch.save(theirs.state_dict(), path)
    model = Trainer(make_options(target_path, source_path=str(path), **given)).model
    pixels = torch.rand(2, 3, 24, 24)
    of_source = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None]
    expected = theirs((pixels - of_source[0]) / of_source[1])
    found = model.source_logits((pixels - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_source_of_another_architecture_is_refused_with_both_values(make_options, tmp_path, target_path):
    deit = timm.create_model("deit_tiny_distilled_patch16_224", **SIZES)
    torch.save(deit.state_dict(), tmp_path / "deit.pth")
    options = {"source_model": "deit_tiny_distilled_patch16_224", "source_path": str(tmp_path / "deit.pth")}
    with pytest.raises(ValueError, match="prefix tokens: target 1, source 2"):
        Trainer(make_options(target_path, **options))


def test_the_source_may_see_the_same_images_in_another_size(make_options, target_path):
    trainer = Trainer(make_options(target_path, source_img_size=32))
    model = trainer.model
    assert (model.target.patch_embed.num_patches, model.source.patch_embed.num_patches) == (9, 16)
    assert torch.equal(model.source.blocks[1].mlp.fc1.weight, weight(target_path))
    assert trainer.run()["steps"] == 4


def test_position_embeddings_of_both_are_resampled_as_torchvision_does(
    make_options, target_path, source_path
):
    options = make_options(
        target_path, source_path=str(source_path), source_img_size=32, pos_embed_interpolation="torchvision"
    )
    model = Trainer(options).model
    assert torch.equal(model.target.pos_embed, torch.load(target_path)["pos_embed"])
    assert model.source.pos_embed.shape == (1, 17, 48)


def test_a_run_with_a_source_of_its_own_resumes_with_that_source_alone(
    make_options, target_path, source_path
):
    options = make_options(target_path, source_path=str(source_path))
    digest = Trainer(options).source_digest
    finetune(options)
    again = Trainer(make_options(target_path, source_path=str(source_path), resume=options.output))
    assert again.source_digest == digest
    with pytest.raises(ValueError, match=r"--source-path was .*source\.pth, is .*target\.pth"):
        Trainer(make_options(target_path, source_path=str(target_path), resume=options.output))
    save_vit(source_path, seed=2)
    with pytest.raises(ValueError, match="its frozen source cannot be restored"):
        Trainer(make_options(target_path, source_path=str(source_path), resume=options.output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": False}, "--no-pretrained leaves no use for --pretrained-path"),
        (
            {"pretrained": False, "pretrained_path": None, "source_img_size": 32},
            "--source-img-size needs pretrained weights, or --source-model or --source-path",
        ),
        ({"source_path": "/nowhere"}, "--source-path /nowhere is not a file"),
        ({"source_model": "vit_of_nobody"}, "Unknown model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(make_options, target_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Trainer(make_options(target_path, **changes))
