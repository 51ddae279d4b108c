"""Processes that run an export without this package, as somebody who has downloaded it."""

import json
import subprocess
import sys
from pathlib import Path

import torch

IN_TIMM = """
import json, sys
from pathlib import Path
import timm, torch
torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    from_file = timm.create_model(
        config["architecture"], checkpoint_path=str(folder / "model.safetensors"), **config["model_args"]
    ).eval()
    images = torch.load(folder.with_suffix(".images"))
    with torch.no_grad():
        torch.save([model(images), from_file(images)], folder.with_suffix(".logits"))
    names = model.pretrained_cfg["label_names"]
    attention = type(model.blocks[0].attn).__module__
    found[folder.name] = [timm.data.resolve_model_data_config(model), names, attention]
assert "stochca" not in sys.modules
print(json.dumps(found))
"""

PROGRAMS = """
import json, sys
from pathlib import Path
import onnxruntime, torch
torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    images = torch.load(folder.with_suffix(".images"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    extra = {"metadata.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra).module()
    with torch.no_grad():
        torch.save([torch.from_numpy(logits), program(images)], folder.with_suffix(".logits"))
    found[folder.name] = [session.get_modelmeta().custom_metadata_map, json.loads(extra["metadata.json"])]
assert not {"stochca", "timm"} & {*sys.modules}
print(json.dumps(found))
"""


def run_elsewhere(code: str, *folders: Path):
    """Run `code` on folders outside this directory, and read the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)],
        cwd="/",
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


def write_images(folder: Path, images: torch.Tensor) -> None:
    """Where the processes look for them."""
    torch.save(images, folder.with_suffix(".images"))


def read_logits(folder: Path) -> list[torch.Tensor]:
    """What a process has written."""
    return torch.load(folder.with_suffix(".logits"))
