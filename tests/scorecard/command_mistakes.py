"""Mistakes on the command line: arguments, and a pattern of what stderr says."""

from collections.abc import Iterator
from pathlib import Path

from tests.scorecard.commands import finetuning

Wrong = tuple[list[str], str]


def options(root: Path) -> Iterator[Wrong]:
    """Names and values of options, and files of them."""
    start = finetuning(root / "images", root / "new")
    for more, message in (
        ("--epoch 3", "--epoch 3: did you mean --epochs"),
        ("--p 2", "p must be between 0 and 1, got 2.0"),
        ("--p nan", r"--p: Expected a float or list\[float\]. Got value: nan"),
        ("--p half", r"--p: Expected a float or list\[float\]. Got value: half"),
        ("--p [0.1,0.2,0.3]", r"p must be a number or one per block \(2\), got shape \(3,\)"),
        ("--p-schedule 0.1 0.2 1.5", "--p-schedule must be .* got"),
        ("--per image", "--per: Expected one of 'batch', 'sample'. Got value: image"),
        ("--mode both", "--mode.*stochastic.*both"),
        ("--lr -1", "--lr must be .* got -1"),
        ("--lr fast", "--lr: Expected a float. Got value: fast"),
        ("--batch-size 0", "--batch-size must be .* got 0"),
        ("--batch-size 5", "--batch-size is 5, but there are only 4 training images"),
        ("--epochs 1.5", "--epochs: Expected a int. Got value: 1.5"),
        ("--workers -1", "--workers must be .* got -1"),
        ("--seed -1", "--seed must be .* got -1"),
        ("--seed 4294967296", "--seed must be .* got 4294967296"),
        ("--img-size 0", "--img-size must be .* got 0"),
        ("--amp-dtype int8", "--amp-dtype.*bfloat16.*int8"),
        ("--source-dtype float16", "--source-dtype float16 does not fit steps in float32"),
        ("--losses nonsense", "nonsense"),
        ("--losses [{miro:{weight:-1}}]", "weight.*-1"),
        ("--opt nonsense", "nonsense"),
        ("--sched steps", "--sched.*cosine.*steps"),
        ("--aa nonsense", "nonsense"),
        ("--interpolation cubic", "--interpolation must be .* got cubic"),
        ("--mean 0.5 0.5", "--mean .*got .*0.5"),
        ("--scale 1.0 0.1", "--scale .*got"),
        ("--drop-path 2", "--drop-path must be .* got 2"),
        ("--device tpu", "--device tpu is not"),
        ("--device cuda:7", "--device cuda:7 is not"),
        ("--distribute fsdp", "--distribute fsdp needs processes"),
        ("--num-classes 3", "--num-classes is 3, but the dataset has 2 classes"),
        ("--model resnet18", "cannot create resnet18: .* unexpected keyword argument 'img_size'"),
        ("--model vit_gigantic", "cannot create vit_gigantic: Unknown model"),
        ('--model-kwargs {"dept":3}', "cannot create .* unexpected keyword argument 'dept'"),
        ("--model-kwargs 3", "--model-kwargs: Expected a dict. Got value: 3"),
        ("--lora-rank 2 --swad", "--swad .* --lora-rank .* use one of them"),
        (
            "--lora-rank 2 --lora-targets head",
            r"no layer of the blocks has one of the names \['head'\]; they have",
        ),
        ("--layout nonsense", "--layout must be .* got nonsense"),
        ("--train-subset 0", "--train-subset must be .* got 0"),
        (f"--config {root}/nowhere.yaml", "nowhere.yaml"),
        (f"--config {root}/unknown.yaml", "learning_rate"),
        (f"--config {root}/type.yaml", "lr.*fast"),
        (f"--config {root}/nested.yaml", "--model-kwargs: Expected a dict"),
        (f"--config {root}/list.yaml", "list.yaml|config"),
        (f"--config {root}/broken.yaml", "broken.yaml|config"),
        (f"--config {root}/code.yaml", "code.yaml|config"),
        (f"--config {root}/file.txt", "file.txt|config"),
    ):
        yield [*start, *more.split()], message
    yield ["train"], "finetune.*evaluate"
    yield [], "command"


def data(root: Path) -> Iterator[Wrong]:
    """Folders and datasets."""
    new, run = root / "new", root / "run"
    for folder, message in (
        ("nowhere", "--data-dir .*nowhere does not exist"),
        ("empty", "cannot open split 'train' of .*empty: Found 0 images .*empty has: no folders"),
        ("flat", "flat.*one folder per class"),
        ("file.txt", "--data-dir must be a folder or a tar file, .*file.txt is a file"),
    ):
        yield finetuning(root / folder, new), message
    start = finetuning(root / "images", new)
    yield (
        [*start, "--train-split", "first"],
        "no folder for the split 'first', it has: train, validation",
    )
    yield [*start, "--dataset", "imagenet"], "--dataset must be .* got imagenet"
    yield [*start, "--dataset", "torch/nothing"], "--dataset torch/nothing is not known"
    weights = str(run / "last.safetensors")
    yield (
        ["evaluate", weights, "--data-dir", str(root / "others")],
        "other classes than .* lacks 1 .bee.* adds 1 .cow",
    )
    yield ["evaluate", weights], "--data-dir is missing"


def runs(root: Path) -> Iterator[Wrong]:
    """Folders of runs."""
    run, images = root / "run", root / "images"
    yield finetuning(images, run), "run already holds a run .*--resume .*run, or choose another --output"
    yield finetuning(images, root / "file.txt"), "--output .*file.txt is a file, wanted a folder"
    yield ["finetune", "--resume", str(root / "nowhere")], "nothing to resume: there is no .*nowhere"
    resume = ["finetune", "--resume", str(run)]
    for more, message in (
        ("--lr 0.5", "--lr was .* is 0.5"),
        ("--p 0.7", "--p was 0.1, is 0.7"),
        ("--opt sgd", "--opt was adamw, is sgd"),
        ("--model vit_small_patch16_224", "--model was vit_tiny_patch16_224, is vit_small"),
        (f"--data-dir {root}/others", "other classes"),
    ):
        yield [*resume, *more.split()], message
    yield ["sweep", "--base-config", str(root / "nowhere.yaml")], "nowhere.yaml|--"
    yield ["domainbed", "--data-dir", str(root / "nowhere"), "--output", str(root / "new")], "nowhere"


def files(root: Path) -> Iterator[Wrong]:
    """Files of weights, and what is made of them."""
    run, images, new = root / "run", root / "images", root / "new"
    weights, text = run / "last.safetensors", root / "file.txt"
    start = [argument for argument in finetuning(images, new) if argument != "--no-pretrained"]
    yield (
        [*start, "--pretrained-path", str(root / "nowhere.pth")],
        "--pretrained-path .*nowhere.pth is not a file",
    )
    yield [*start, "--pretrained-path", str(text)], "file.txt is not a complete file of weights"
    yield (
        [
            *start,
            "--pretrained-path",
            str(weights),
            "--model-kwargs",
            '{"depth":3,"embed_dim":48,"num_heads":3,"patch_size":8}',
        ],
        "last.safetensors does not fit .* Missing",
    )
    yield (
        [*start, "--pretrained-path", str(weights), "--no-pretrained"],
        "leaves no use for --pretrained-path",
    )
    yield [*start, "--model", "local-dir:nowhere"], "nowhere"
    for command in ("evaluate", "export", "convert", "analyze"):
        yield (
            [
                command,
                str(root / "nowhere.safetensors"),
                *(["--data-dir", str(images)] if command in ("evaluate", "analyze") else []),
            ],
            "nowhere.safetensors",
        )
    yield ["evaluate", str(text), "--data-dir", str(images)], "file.txt is not a complete safetensors file"
    yield ["export", str(run), "--output", str(root / "full")], "full"
    yield (
        ["export", str(weights), "--which", "best", "--output", str(new)],
        "--which is for the folder of a run",
    )
    yield ["export", str(run), "--formats", "timm", "timm"], "--formats must be different values"
    yield ["export", str(run), "--formats", "tflite"], "timm.*onnx.*tflite"
    yield ["export", str(run), "--tolerance", "-1"], "--tolerance must be at least 0, got -1"
    yield ["export", str(run), "--private"], "--private is for --push-to-hub"
    yield (
        ["convert", str(weights), "--output", "weights.bin"],
        "--output must end in .safetensors, got weights.bin",
    )
    yield ["convert", str(weights), "--output", str(weights)], "--output .*last.safetensors is there already"
    yield (
        [
            "convert",
            str(weights),
            "--model",
            "vit_small_patch16_224",
            "--output",
            str(root / "a.safetensors"),
        ],
        "does not fit vit_small_patch16_224",
    )
    yield ["analyze", "--data-dir", str(images)], "runs"
    yield ["analyze", str(root / "empty"), "--data-dir", str(images)], "empty must be or hold"
