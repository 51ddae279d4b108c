"""Publishing, against a hub in this process."""

import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants

from stochca import StochCA
from stochca.export.model import push_model
from tests.models import make_images, make_target


class Hub:
    """What timm calls of `huggingface_hub.HfApi`; keeps what is uploaded."""

    def __init__(self, folder, has_card=False):
        self.folder, self.has_card, self.made = folder, has_card, []

    def __call__(self, **kwargs):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, **kwargs):
        return self.has_card

    def upload_folder(self, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, self.folder)
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("timm.models._hub.HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    return hub


@pytest.fixture
def target():
    return make_target(dtype=torch.float32).eval()


def test_what_is_published_is_the_target_with_its_classes_preparation_and_card(hub, target):
    model = StochCA(target)
    commit = push_model(
        model, "zoo/ants", private=True, classes=[*"abcde"], data_config={"mean": (0.1, 0.2, 0.3)}
    )
    assert commit == "https://hub/zoo/ants/commit/1"
    assert hub.made == [("zoo/ants", True, True)]
    names = {path.name for path in hub.folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    card = (hub.folder / "README.md").read_text()
    assert "# Model card for ants" in card
    assert 'timm.create_model("hf-hub:zoo/ants", pretrained=True)' in card
    loaded = timm.create_model(f"local-dir:{hub.folder}", pretrained=True).eval()
    images = make_images(2, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(images), target.eval()(images))
    assert loaded.pretrained_cfg["label_names"] == [*"abcde"]
    assert timm.data.resolve_model_data_config(loaded)["mean"] == [0.1, 0.2, 0.3]


def test_a_card_that_is_there_is_kept(hub, target):
    hub.has_card = True
    push_model(target, "zoo/ants")
    assert not (hub.folder / "README.md").exists()


def test_a_model_that_timm_does_not_rebuild_is_not_published(hub, target):
    with pytest.raises(ValueError, match="model_args"):
        push_model(target, "zoo/ants", model_args={"dept": 3})
    assert not hub.made


@pytest.mark.parametrize("name", ["ants", "zoo/ants/red", "zoo/an ts"])
def test_a_name_that_is_none_is_refused(hub, target, name):
    with pytest.raises(ValueError, match=name):
        push_model(target, name)


def test_without_a_token_it_says_how_to_get_one(target, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        OSError, match=r"the Hugging Face hub needs a token: run `hf auth login`, or set HF_TOKEN"
    ):
        push_model(target, "zoo/ants")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")],
    ids=["switched off", "refused"],
)
def test_without_a_network_it_is_one_error(target, monkeypatch, setting, value):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, setting, value)
    with pytest.raises(OSError, match="cannot publish zoo/ants on the Hugging Face hub: "):
        push_model(target, "zoo/ants")
