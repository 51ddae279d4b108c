"""What the README says is so."""

import re
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("jsonargparse")

from bench import predictions
from bench.kernels import goals
from bench.kernels.shapes import VIT_B_224
from stochca.cli import main

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_goal_has_a_prediction():
    rows = predictions.rows()
    assert len(rows) == sum(len(goal.cases) for goal in goals.GOALS)
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)
    # Tiles of 64 x 208 against 128 x 128: the padding that is not computed is what is won.
    ours, rival = predictions.forward(VIT_B_224)
    assert rival / ours == pytest.approx((256 * 256) / (256 * 208))


def test_the_ten_lines_of_python_run(monkeypatch, tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[1]
    create = timm.create_model

    def small(name, pretrained, **kwargs):
        assert pretrained
        return create(name, img_size=32, patch_size=16, depth=2, **kwargs)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    loader = [(torch.randn(2, 3, 32, 32), torch.tensor([3, 150]))] * 2
    names = {"loader": loader}
    exec(code, names)
    again = create("vit_base_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=200)
    again.load_state_dict(torch.load("vit.pt", weights_only=True), strict=True)
    assert names["model"].coins.step == 2


def test_commands_and_flags_exist(capsys):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for command in ("finetune", "evaluate", "info"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        text = capsys.readouterr().out
        for line in re.findall(rf"^stochca {command} (.*)$", TEXT, flags=re.MULTILINE):
            for flag in re.findall(r"--[\w-]+", line):
                assert flag in text, f"{command} {flag}"
