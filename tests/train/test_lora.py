"""`--lora-rank`: a run trains adapters and the classifier, and writes files of the plain model."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from stochca import checkpoint as files
from stochca.cli import main
from stochca.recipe import create_model
from stochca.train import Interrupted, Trainer, finetune
from tests.train.interruption import assert_same_run, resumed, stop_after
from tests.train.test_cli import arguments_of

LORA = {"lora_rank": 4, "lora_targets": ["qkv", "proj", "fc1"]}


def load_plain(run, name="last.safetensors"):
    metadata = files.read_metadata(run / name)
    return timm.create_model(
        metadata["model"], checkpoint_path=str(run / name), **metadata["model_kwargs"]
    ).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"model_ema": True, "model_ema_decay": 0.5}], ids=["last", "average"]
)
def test_files_of_weights_are_the_plain_model_with_what_was_learned(make_options, changes):
    trainer = Trainer(make_options(**LORA, **changes, lr=0.01))
    before = trainer.model.target(images := torch.randn(2, 3, *trainer.data_config["input_size"][1:]))
    trainer.run()
    trained = trainer.average.module if trainer.average is not None else trainer.model.target
    plain = load_plain(trainer.output)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), trained.eval()(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain(images), before, atol=1e-3)
    assert not [name for name in load_file(trainer.output / "last.safetensors") if "lora" in name]


def test_what_is_trained_is_adapters_and_the_classifier(make_options):
    trainer = Trainer(make_options(**LORA))
    before = {name: p.clone() for name, p in trainer.model.target.named_parameters()}
    trainer.run()
    changed = {
        name for name, p in trainer.model.target.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {name for name in before if ".lora_" in name or name.startswith("head.")}
    assert {name.split(".")[-4] for name in changed if ".lora_" in name} == {"qkv", "proj", "fc1"}
    assert not [name for name in changed if name.startswith("patch_embed")]


def test_the_source_shares_the_weights_below(make_options):
    model = create_model(make_options(**LORA, amp=True), num_classes=3)
    own = {id(p) for p in model.target.parameters()}
    alone = [name for name, p in model.source.named_parameters() if id(p) not in own]
    assert alone == ["head.weight", "head.bias"]


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(make_options, tmp_path, monkeypatch):
    options = make_options(**LORA, lora_dropout=0.1)
    finetune(options)
    broken = make_options(**LORA, lora_dropout=0.1, output=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            finetune(broken)
    finetune(resumed(broken))
    assert_same_run(broken.output, options.output)


def test_a_checkpoint_is_evaluated_as_any_other(make_options, folder, capsys):
    options = make_options(**LORA)
    finetune(options)
    assert main(["evaluate", f"{options.output}/best.safetensors", "--data-dir", str(folder)]) == 0
    assert "top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swad": True}, "--swad averages weights, which --lora-rank does not train"),
        ({"distribute": "fsdp"}, "use ddp with --lora-rank"),
        ({"source_dtype": "float32"}, "--source-dtype float32 casts the source's weights"),
        (
            {"lora_targets": ["conv"]},
            "no layer of the blocks has one of the names ['conv']; they have ['fc1'",
        ),
        ({"lora_dropout": 1.5}, "--lora-dropout must be between 0 and 1"),
        ({"losses": "[l2_sp]"}, "l2_sp needs a source whose blocks.0.attn.qkv.base_layer.weight"),
    ],
)
def test_what_does_not_go_with_adapters_is_one_line(make_options, capsys, changes, message):
    assert main(["finetune", *arguments_of(make_options(**LORA)), *_flags(changes)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def _flags(changes):
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        yield from [flag] if value is True else [flag, *(value if isinstance(value, list) else [str(value)])]
