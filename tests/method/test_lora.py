"""LoRA: a source that is the target without its adapters, and has no weights of its own."""

import copy
import itertools
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from stochca import StochCA
from stochca.export.model import export_model
from stochca.lora import base_model, merged_model
from tests import plain
from tests.models import make_images, make_target

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
COINS = list(itertools.product([False, True], repeat=3))
STATUS = Path("/proc/self/status")
EVERYWHERE = ["qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc2"]
NAMES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "average-pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "dinov3": ("vit_base_patch16_dinov3", {}),
    "eva02-split": ("eva02_base_patch14_224", {}),
}


def adapt(target, modules=EVERYWHERE, **kwargs):
    """Adapters that change the output."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, modules_to_save=["head"], **kwargs)
    inject_adapter_in_model(config, target)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in target.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return target


def make_lora(variant="vit", dtype=torch.float64, stochca=None, **kwargs):
    """StochCA on adapters, and a separate copy of what is below them."""
    name, shape = NAMES[variant]
    target = make_target(name, dtype, **SMALL, **shape)
    below = copy.deepcopy(target)
    model = StochCA(adapt(target, **kwargs).to(dtype), **(stochca or {})).train()
    return model, below


def trained_gradients(target, output):
    """As `plain.gradients`, of what is trained."""
    trained = nn.Module()
    for name, p in target.named_parameters():
        if p.requires_grad:
            trained.register_parameter(name.replace(".", "_"), p)
    return plain.gradients(trained, output)


def resident_bytes():
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("variant", NAMES)
def test_every_coin_pattern_equals_the_full_computation_with_a_separate_copy(variant):
    model, below = make_lora(variant)
    images = make_images()
    for coins in COINS:
        out = model(images, coins=coins)
        expected = plain.logits(model.target, below, images, coins)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grads, wanted = trained_gradients(model.target, out), trained_gradients(model.target, expected)
        assert set(grads) == set(wanted)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-10)


def test_adapters_change_what_the_target_reads_of_itself_alone():
    model, _ = make_lora()
    adapted, plain_target = model.target, base_model(model.target)
    images = make_images()
    assert not torch.allclose(adapted(images), plain_target(images))
    for name, p in plain_target.named_parameters():
        assert "lora" not in name
        assert not p.requires_grad or name.startswith("head")


def test_the_source_has_no_tensor_of_its_own_but_what_is_trained_beside_the_adapters():
    model, _ = make_lora()
    own = {p.data_ptr() for p in model.target.parameters()}
    shared = [name for name, p in model.source.named_parameters() if p.data_ptr() in own]
    alone = [name for name, p in model.source.named_parameters() if p.data_ptr() not in own]
    assert len(shared) > 40
    assert alone == []  # the head that is trained is a copy, and its original is the source's


def test_weights_trained_beside_the_adapters_are_copied():
    target = adapt(make_target(**SMALL))
    target.norm.requires_grad_(True)
    model = StochCA(target)
    before = model.source.norm.weight.clone()
    with torch.no_grad():
        target.norm.weight.add_(1)
    assert torch.equal(model.source.norm.weight, before)


@pytest.mark.parametrize("move", [lambda m: m.float(), copy.deepcopy], ids=["cast", "copy"])
def test_target_and_source_still_share_after(move):
    model = move(make_lora()[0])
    own = {id(p) for p in model.target.parameters()}
    assert all(id(p) in own for p in model.source.parameters())


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc to read the memory of a process")
def test_a_process_holds_no_second_copy():
    """ViT-S/16, 84 MiB in float32."""

    def growth(adapted):
        target = timm.create_model("vit_small_patch16_224")
        target = adapt(target, ["qkv"]) if adapted else target
        size, before = sum(p.nbytes for p in target.parameters()), resident_bytes()
        model = StochCA(target)
        assert model.source is not target
        return (resident_bytes() - before) / size

    assert growth(adapted=False) > 0.9
    assert growth(adapted=True) < 0.1


@pytest.mark.parametrize("variant", ["vit", "eva02-split"])
def test_dropout_of_adapters_draws_for_the_tokens_that_ask(variant):
    model, _ = make_lora(variant, lora_dropout=0.5)
    images = make_images()
    for coins in COINS:
        outs = [model(images, coins=coins) for _ in range(2)]
        assert not torch.equal(*outs)
        outs[0].sum().backward()
    trained = [p for p in model.target.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("setting", ["checkpointing", "recompute"])
def test_recomputation_changes_no_gradient(setting):
    model, _ = make_lora()
    images, coins = make_images(), (False, True, False)
    expected = trained_gradients(model.target, model(images, coins=coins))
    model.recompute = setting == "recompute"
    model.set_grad_checkpointing(setting == "checkpointing")
    for name, grad in trained_gradients(model.target, model(images, coins=coins)).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


def test_autocast_is_as_exact_as_the_layers_themselves():
    model, below = make_lora(dtype=torch.float32)
    images = make_images(dtype=torch.float32)
    for coins in COINS:
        exact = plain.logits(
            copy.deepcopy(model.target).double(), copy.deepcopy(below).double(), images.double(), coins
        )
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = model(images, coins=coins), plain.logits(model.target, below, images, coins)
        assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-3


def test_every_adapter_has_a_gradient_in_every_step():
    """As `DistributedDataParallel` needs it."""
    for variant in NAMES:
        model, _ = make_lora(variant)
        for coins in COINS:
            model.zero_grad()
            model(make_images(), coins=coins).sum().backward()
            assert [n for n, p in model.target.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_state_dict_of_a_step_has_adapters_and_no_source():
    model, _ = make_lora()
    assert not [name for name in model.state_dict() if not name.startswith("target.")]


def test_a_peft_model_is_refused_with_the_way_out():
    peft_model = get_peft_model(make_target(**SMALL), LoraConfig(target_modules=["qkv"]))
    with pytest.raises(TypeError, match=r"got PeftModel: pass its get_base_model\(\)"):
        StochCA(peft_model)
    assert isinstance(StochCA(peft_model.get_base_model()).source.blocks[0].attn.qkv, nn.Linear)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"use_dora": True}, ValueError, "attention 0: its qkv is a LoRA of another kind"),
        (
            {"stochca": {"source_dtype": "bfloat16"}},
            ValueError,
            "would cast weights that are also the target's",
        ),
        (
            {"stochca": {"source_dtype": "float8"}},
            ValueError,
            "would cast weights that are also the target's",
        ),
    ],
)
def test_what_cannot_be_driven_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_lora(**kwargs)


def test_an_adapter_that_timm_would_pass_by_is_refused():
    with pytest.raises(ValueError, match="EvaAttention reads the weight of its qkv past an adapter"):
        StochCA(adapt(make_target("eva02_small_patch14_224", **SMALL), ["qkv"]))
    assert StochCA(adapt(make_target("eva02_small_patch14_224", **SMALL), ["proj"])).source is not None


def test_merged_adapters_are_refused():
    target = adapt(make_target(**SMALL))
    target.blocks[1].attn.qkv.merge()
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv has its adapter merged"):
        StochCA(target)


def test_adapters_that_are_switched_off_do_nothing():
    model, below = make_lora()
    for module in model.target.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    images = make_images()
    for coins in COINS:
        expected = plain.logits(below, below, images, coins)
        torch.testing.assert_close(model(images, coins=coins), expected, rtol=1e-12, atol=1e-12)


def test_a_merged_model_computes_the_same_without_peft():
    model, below = make_lora()
    merged, images = merged_model(model.target), make_images()
    assert merged.state_dict().keys() == below.state_dict().keys()
    torch.testing.assert_close(merged(images), model.target(images), rtol=1e-12, atol=1e-12)
    assert any("lora_" in name for name, _ in model.target.named_parameters())  # which is left as it was
    out = model(images, coins=(False, True, False))
    torch.testing.assert_close(
        out, plain.logits(model.target, below, images, (False, True, False)), rtol=1e-12, atol=1e-12
    )


def test_an_export_is_the_merged_model(tmp_path):
    model, _ = make_lora(dtype=torch.float32)
    export_model(model, tmp_path / "export")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = make_images(dtype=torch.float32)
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-5, atol=1e-5)
