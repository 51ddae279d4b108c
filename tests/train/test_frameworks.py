"""StochCA trains under accelerate and Lightning as any module does."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from tests.models import make_images, make_model

STEPS = 3


def make_stochca():
    return make_model(dtype=torch.float32, depth=3)


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def make_loader():
    labels = torch.arange(4 * STEPS) % 5
    return DataLoader(TensorDataset(make_images(4 * STEPS, torch.float32), labels), batch_size=4)


@pytest.fixture(scope="module")
def expected():
    """Target and source after a plain loop."""
    model = make_stochca()
    before = {name: t.clone() for name, t in model.source.state_dict().items()}
    optimizer = make_optimizer(model)
    for images, labels in make_loader():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert all(torch.equal(t, model.source.state_dict()[name]) for name, t in before.items())
    return model


def assert_trained_alike(model, expected):
    assert model.coins.step == STEPS
    for ours, theirs in ((model.target, expected.target), (model.source, expected.source)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(p.requires_grad for p in model.source.parameters())
    assert not model.source.training
    initial = make_stochca().target.state_dict()
    assert all(not torch.equal(t, initial[name]) for name, t in model.target.state_dict().items())


def test_accelerate_trains_as_a_plain_loop(expected, tmp_path):
    from accelerate import Accelerator  # here, as it takes seconds

    accelerator = Accelerator(cpu=True)
    model = make_stochca()
    wrapped, optimizer, loader = accelerator.prepare(model, make_optimizer(model), make_loader())
    for images, labels in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(F.cross_entropy(wrapped(images), labels))
            accelerator.clip_grad_norm_(wrapped.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.unwrap_model(wrapped) is model
    assert_trained_alike(model, expected)
    accelerator.save_model(wrapped, tmp_path)
    again = make_stochca()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("target.") for name in saved)
    again.load_state_dict(saved)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def make_lightning_module(lightning):
    """What a user of Lightning writes."""

    class FineTuning(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_stochca()

        def training_step(self, batch, _):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return make_optimizer(self.model)

    return FineTuning()


# Lightning's own.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_trains_as_a_plain_loop(expected, tmp_path):
    import lightning  # here, as it takes seconds

    module = make_lightning_module(lightning)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, make_loader())
    assert trainer.global_step == STEPS
    assert_trained_alike(module.model, expected)
    path = tmp_path / "lightning.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert list(saved) == [f"model.target.{name}" for name in expected.target.state_dict()]
