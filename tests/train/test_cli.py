"""What the command takes, prints and returns."""

import contextlib
import dataclasses
import json
import math
import re
import resource
import subprocess
import sys
import typing

import pytest
import yaml

pytest.importorskip("jsonargparse")

from stochca.analysis.options import AnalyzeOptions
from stochca.cli import main
from stochca.config import (
    INTERPOLATIONS,
    DomainBedOptions,
    EvaluateOptions,
    FinetuneOptions,
    InfoOptions,
    flag,
)
from stochca.export.options import ExportOptions
from stochca.sweep.options import SweepOptions
from stochca.train import Trainer, finetune
from stochca.weights.options import ConvertOptions
from tests.train.image_folder import write_images


def changes_of(options: FinetuneOptions) -> dict:
    """What differs from the defaults."""
    return {key: value for key, value in vars(options).items() if value != getattr(FinetuneOptions(), key)}


def arguments_of(options: FinetuneOptions) -> list[str]:
    """The flags that differ from the defaults."""
    arguments = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if value == default:
            continue
        if value is False:
            arguments.append(flag(field.name).replace("--", "--no-"))
        elif isinstance(value, list):
            arguments += [flag(field.name), *map(str, value)]
        else:
            arguments += [flag(field.name), value if isinstance(value, str) else json.dumps(value)]
    return arguments


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"]])
def test_help_comes_within_a_second_and_without_torch(arguments):
    code = f"""
import sys
from stochca.cli import main
try:
    main({arguments})
finally:
    assert "torch" not in sys.modules
"""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, whatever else it does.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("options_class", [FinetuneOptions, EvaluateOptions, ConvertOptions, InfoOptions])
def test_every_option_has_a_flag_and_a_line_of_help(options_class, capsys):
    with pytest.raises(SystemExit):
        main([options_class.__name__.removesuffix("Options").lower(), "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(options_class):
        assert (field.name if field.name == "checkpoint" else flag(field.name)) in shown
        assert field.metadata["help"].split()[0] in shown


def test_the_printed_config_holds_the_defaults_under_names_with_underscores(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--print_config"])
    assert FinetuneOptions(**yaml.safe_load(capsys.readouterr().out)) == FinetuneOptions()


def test_the_flags_are_those_of_timm():
    ours = {flag(field.name) for field in dataclasses.fields(FinetuneOptions)}
    timms = """--data-dir --dataset --train-split --val-split --dataset-download --model --pretrained
        --pretrained-path --num-classes --img-size --mean --std --crop-pct --interpolation --batch-size
        --validation-batch-size --workers --opt --lr --weight-decay --momentum --layer-decay --sched --epochs
        --warmup-epochs --warmup-lr --min-lr --drop-path --smoothing --aa --no-aug --scale --ratio --hflip
        --color-jitter --reprob --amp --amp-dtype --seed --output --resume --device --grad-accum-steps
        --clip-grad --grad-checkpointing --torchcompile --log-interval --val-interval --recovery-interval
        --eval-metric --model-kwargs --mixup --cutmix --mixup-prob --mixup-switch-prob --mixup-mode
        --mixup-off-epoch --train-crop-mode --crop-mode --grayscale-prob --train-num-samples --val-num-samples
        --model-ema --model-ema-decay --model-ema-warmup --log-wandb --wandb-project"""
    own = """--p --p-schedule --per --mode --impl --head-lr-mult --steps --warmup-steps --skip-corrupt
        --log-tensorboard --recompute --source-dtype --independent-coins --losses --layout --test-split
        --train-subset --subset-seed --distribute --tf32 --pos-embed-interpolation --val-steps --patience
        --swad --swad-converge --swad-tolerance --swad-tolerance-ratio --norm-eps --clip-projection
        --source-model --source-path --source-img-size
        --lora-rank --lora-alpha --lora-dropout --lora-targets"""
    assert ours == {*timms.split(), *own.split()}


def test_a_config_file_is_read_and_flags_go_on_top(make_options, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("stochca.train.Trainer", lambda options, world: seen.append(options) or _Done())
    path = tmp_path / "config.yaml"
    path.write_text(
        "lr: 0.5\nmodel_kwargs: {depth: 3}\nmean: [0.1, 0.2, 0.3]\np: [0.1, 0.2]\npretrained: false\n"
    )
    main(
        [
            "finetune",
            "--config",
            str(path),
            "--lr",
            "0.25",
            "--std",
            "0.5",
            "0.6",
            "0.7",
            "-b",
            "7",
            "--no-aug",
        ]
    )
    assert seen == [
        FinetuneOptions(
            lr=0.25,
            model_kwargs={"depth": 3},
            mean=[0.1, 0.2, 0.3],
            std=[0.5, 0.6, 0.7],
            p=[0.1, 0.2],
            pretrained=False,
            batch_size=7,
            no_aug=True,
        )
    ]


class _Done:
    def run(self):
        names = ("steps", "best_step", "best_top1", "last_top1", "images_per_second", "source_fraction")
        return {**dict.fromkeys(names, 0), "skipped": [], "output": ""}


def test_an_unknown_key_in_a_config_file_is_named(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("leraning_rate: 0.5\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["finetune", "--config", str(path)])
    assert exit_info.value.code == 2
    assert "leraning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--interpolation", "foo"],
        ["--scale", "0.5"],
        ["--std", "0"],
        ["--model-kwargs", "{in_chans: 1}"],
        ["--seed", str(2**64)],
    ],
    ids=lambda arguments: arguments[0].lstrip("-"),
)
def test_a_bad_option_is_one_line_and_code_2(arguments, capsys):
    assert main(["finetune", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("stochca finetune: ")
    assert errors.count("\n") == 1
    assert arguments[0] in errors


@pytest.mark.parametrize(
    ("command", "given", "nearest"),
    [
        ("finetune", "warmup_stps", "--warmup-steps"),
        ("domainbed", "holdout_fracton", "--holdout-fraction"),
        ("sweep", "setings", "--settings"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(tmp_path, capsys, command, given, nearest):
    path = tmp_path / "config.yaml"
    path.write_text(f"{given}: 3\n")
    for arguments in (["--config", str(path)], [f"--{given.replace('_', '-')}", "3"]):
        with pytest.raises(SystemExit) as exit_info:
            main([command, *arguments])
        assert exit_info.value.code == 2
        errors = capsys.readouterr().err
        assert f"did you mean {nearest}?" in errors
        assert errors.count("\n") == 2


def test_an_unknown_loss_is_one_line_with_the_nearest_one(make_options, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**vars(make_options()), "losses": ["bsss"]}))
    assert main(["finetune", "--config", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("stochca finetune: unknown loss 'bsss': did you mean 'bss'? Valid are l2_sp, ")
    assert errors.count("\n") == 1


def test_lists_are_given_one_after_the_other(monkeypatch):
    seen = []
    monkeypatch.setattr("stochca.domainbed.domainbed", lambda options: seen.append(options) or {})
    with contextlib.suppress(KeyError):
        main(["domainbed", "--methods", "erm", "miro", "--seeds", "3", "4", "--test-domains", "a b", "c"])
    assert (seen[0].methods, seen[0].seeds) == (["erm", "miro"], [3, 4])
    assert seen[0].test_domains == ["a b", "c"]


def test_domainbed_prints_its_tables(make_options, tmp_path, capsys):
    for domain in ("art", "photo"):
        write_images(tmp_path / "domains", {domain: 6}, classes=("ant", "bee"))
    options = changes_of(make_options())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**options, "data_dir": str(tmp_path / "domains"), "epochs": 1}))
    output = str(tmp_path / "domainbed")
    assert main(["domainbed", "--config", str(path), "--seeds", "0", "--output", output]) == 0
    printed = capsys.readouterr().out
    assert "| erm |" in printed
    assert f"all runs and tables are in {output}" in printed


def test_abbreviated_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--batch", "3"])
    assert "--batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "/nowhere"}, "--data-dir /nowhere does not exist"),
        ({"num_classes": 7}, "--num-classes is 7, but the dataset has 3 classes"),
        ({"batch_size": 100}, "--batch-size is 100, but there are only 18 training images"),
        ({"p": 1.5}, "p must be between 0 and 1, got 1.5"),
        ({"p": [0.1, 0.2, 0.3]}, "one per block (2)"),
        ({"device": "cuda:7"}, "--device cuda:7 is not there"),
        ({"device": "abacus"}, "--device abacus is not a device"),
        ({"device": "meta"}, "--device meta is not there, this machine has cpu"),
        ({"aa": "foo"}, "--aa foo is not a policy of timm: Unknown AA policy foo"),
        ({"aa": "rand-x3"}, "--aa rand-x3 is not a policy of timm"),
        ({"aa": "rand-m9.5"}, "--aa rand-m9.5 is not a policy of timm"),
        (
            {"dataset": "foo/bar"},
            "--dataset must be torch/..., hfds/..., hfids/..., tfds/..., wds/..., or empty",
        ),
        ({"model": "vit_of_nobody"}, "cannot create vit_of_nobody: Unknown model"),
        ({"model": "resnet18", "img_size": None, "model_kwargs": {}}, "got ResNet"),
        ({"model_kwargs": {"dept": 2}}, "unexpected keyword argument 'dept'"),
        ({"output": "/dev/null/run"}, "/dev/null"),
        ({"opt": "magic"}, "magic"),
        ({"mean": [0.1, 0.2]}, "--mean must be one number or one per channel (3), got [0.1, 0.2]"),
        ({"pretrained": True, "pretrained_path": "/nowhere"}, "--pretrained-path /nowhere is not a file"),
        ({"pretrained": True, "model": "vit_small_patch16_36x1_224"}, "No pretrained weights exist"),
        ({"resume": "/nowhere"}, "nothing to resume: there is no /nowhere/trainer_state.pt"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_user_can_mend_is_one_line_and_code_2(make_options, capsys, changes, message):
    options = make_options(**{k: v for k, v in changes.items() if k not in ("p", "resume")})
    arguments = arguments_of(options)
    for name in ("p", "resume"):
        if name in changes:
            arguments += [flag(name), str(changes[name])]
    assert main(["finetune", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("stochca finetune: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("batch_size", 0),
        ("drop_path", 1.5),
        ("steps", 0),
        ("clip_grad", 0.0),
        ("smoothing", -0.1),
        ("scale", [0.5]),
        ("scale", [0.5, 0.1]),
        ("scale", [0.0, 1.0]),
        ("scale", [0.5, 1.1]),
        ("ratio", [0.0, 1.0]),
        ("ratio", [2.0, 1.0]),
        ("ratio", [1.0, math.inf]),
        ("ratio", [0.5, 1.0, 2.0]),
        ("std", [0.5, 0.0, 0.5]),
        ("crop_pct", 0.0),
        ("crop_pct", 1.5),
        ("layer_decay", 0.0),
        ("seed", -1),
        ("seed", 2**32),
        ("interpolation", "foo"),
        ("interpolation", "random"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_flag(name, value):
    with pytest.raises(ValueError, match=rf"^{flag(name)} must be .*, got {re.escape(str(value))}$"):
        FinetuneOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", [1.0, 1.0]),
        ("ratio", [1.0, 1.0]),
        ("crop_pct", 1.0),
        ("layer_decay", 1.0),
        ("seed", 2**32 - 1),
        *(("interpolation", value) for value in INTERPOLATIONS),
    ],
)
def test_the_ends_of_the_ranges_run(make_options, name, value):
    Trainer(make_options(**{name: value})).run()


@pytest.mark.parametrize(
    ("model_kwargs", "message"),
    [
        ({"in_chans": 1}, "in_chans in --model-kwargs must be 3, as images are read as RGB, got 1"),
        ({"num_classes": 3}, "num_classes in --model-kwargs has a flag of its own: give it as --num-classes"),
        ({"drop_path_rate": 0.3}, "drop_path_rate in --model-kwargs .* give it as --drop-path$"),
        ({"img_size": 32}, "img_size in --model-kwargs .* --img-size"),
        ({"p": 0.3}, "p in --model-kwargs .* --p$"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_of_the_model_that_are_set_elsewhere_are_refused(model_kwargs, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(model_kwargs=model_kwargs)
    FinetuneOptions(model_kwargs={"in_chans": 3, "depth": 2})


def test_a_run_writes_the_options_that_repeat_it_and_resumes_by_its_folder_alone(make_options, capsys):
    options = make_options(epochs=1)
    assert main(["finetune", *arguments_of(options)]) == 0
    assert "4 steps done: best top-1" in capsys.readouterr().out
    with open(f"{options.output}/config.yaml") as file:
        assert FinetuneOptions(**yaml.safe_load(file)) == options
    assert main(["finetune", "--resume", options.output]) == 0
    assert "4 steps done: best top-1" in capsys.readouterr().out
    assert main(["finetune", "--resume", options.output, "--lr", "0.5"]) == 2
    assert "--lr was 0.001, is 0.5" in capsys.readouterr().err


def test_evaluate_prints_json_and_words(make_options, folder, capsys):
    options = make_options(epochs=1)
    summary = finetune(options)
    arguments = [
        "evaluate",
        f"{options.output}/best.safetensors",
        "--data-dir",
        str(folder),
        "--workers",
        "0",
    ]
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["top1"], result["images"]) == (pytest.approx(summary["best_top1"]), 9)
    assert main(arguments) == 0
    assert f"on 9 images: top-1 {result['top1']:.2f} %" in capsys.readouterr().out


def test_evaluate_refuses_a_checkpoint_that_is_not_ours(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none.safetensors"), "--data-dir", "x"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_info_names_the_implementation_and_the_reason(capsys):
    assert main(["info", "--device", "cpu"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["implementation"].strip().startswith("sdpa: ")
    assert {"stochca", "torch", "timm", "triton", "CUDA", "device"} <= lines.keys()


def kinds_of(hint):
    """The plain types that a type hint is made of."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    parts = [kinds_of(part) for part in typing.get_args(hint)]
    return set().union(*parts) if parts else {hint}


@pytest.mark.parametrize(
    "options",
    [FinetuneOptions, DomainBedOptions, SweepOptions, EvaluateOptions, ExportOptions, AnalyzeOptions],
)
def test_no_option_is_a_class_that_a_file_could_name(options):
    for name, hint in typing.get_type_hints(options).items():
        assert kinds_of(hint) <= {str, int, float, bool, type(None), typing.Any}, name
