"""Traps of training: checkpointing, compilation, autocast, optimizers."""

import copy
import io
import itertools
import pickle

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from bench.counts import saved_bytes
from stochca import StochCA
from tests.models import make_images, make_model, make_target

COINS = (False, True, False, True)


def compiles(test):
    """Tracing looks at the .grad of tensors that have none, and makes an instance of autograd functions."""
    ignored = (
        "ignore:The .grad attribute of a Tensor",
        "ignore:.*autograd.function.Function.* should not be",
    )
    return pytest.mark.usefixtures("compiler")(pytest.mark.filterwarnings(*ignored)(test))


def test_checkpointing_keeps_fewer_bytes():
    model = make_model()
    kept = {}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        kept[checkpointing] = saved_bytes(lambda: model(make_images(), coins=COINS), model.parameters())
    assert kept[True] < 0.3 * kept[False]


def test_checkpointing_draws_no_second_coin():
    model = make_model()
    model.set_grad_checkpointing()
    model(make_images()).sum().backward()
    assert model.coins.step == 1


@compiles
@torch._dynamo.config.patch(recompile_limit=2)  # a graph for one batch size, and one for any
@pytest.mark.parametrize("kwargs", [{}, {"drop_path_rate": 0.3, "global_pool": "avg"}])
def test_no_batch_size_and_no_other_model_exhausts_the_compiler(kwargs):
    """Beyond its limit torch would run eagerly; with fullgraph=True it raises."""
    for width, batches in ((48, (4, 3)), (96, (4,))):
        model = make_model(embed_dim=width, **kwargs)
        model.compile(backend="eager", fullgraph=True)
        for batch in batches:
            mixed = torch.arange(batch) % 2 == 0
            for coins in (
                COINS,
                (True, True, False, False),
                (False, True, True, True),
                (mixed, False, mixed, True),
            ):
                model(make_images(batch), coins=coins)


@compiles
def test_no_order_of_draws_makes_the_number_of_tokens_dynamic():
    """Blocks that run on class rows alone are cases of their own, the first draw of a run may have them."""
    model = make_model()
    sizes = []

    def backend(graph, inputs):
        sizes.extend(x for x in inputs if isinstance(x, torch.SymInt))
        return graph

    model.compile(backend=backend, fullgraph=True)
    for coins in ((False, False, False, True), (True, False, False, False), (True, True, True, True), COINS):
        model(make_images(), coins=coins)
    assert not sizes


def test_accumulated_gradients_are_those_of_the_joined_batch():
    model = make_model()
    images = make_images(batch=4)
    model(images, coins=COINS).sum().backward()
    joined = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for half in images.split(2):
        model(half, coins=COINS).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, joined[name], rtol=1e-12, atol=1e-12)


def test_only_the_target_is_saved_trained_and_switched():
    model = make_model()
    names = {f"target.{name}" for name in model.target.state_dict()}
    assert set(model.state_dict()) == names
    assert {name for name, _ in model.named_parameters()} <= names
    assert not any(module is model.source for module in model.modules())
    model.eval().train()
    assert not any(module.training for module in model.source.modules())
    assert not any(p.requires_grad for p in model.source.parameters())
    model(make_images()).sum().backward()
    assert all(p.grad is None for p in model.source.parameters())


def test_the_source_follows_the_module():
    model = make_model().to(torch.float32)
    assert {p.dtype for p in model.source.parameters()} == {torch.float32}
    assert {p.device.type for p in model.to("meta").source.parameters()} == {"meta"}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_restore_target_and_source(how):
    model = make_model()
    model(make_images())
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    assert clone.source is not model.source
    assert clone.coins.step == 1
    expected = model(make_images(), coins=COINS)
    with torch.no_grad():
        for p in itertools.chain(model.parameters(), model.source.parameters()):
            p.zero_()
    assert torch.equal(clone(make_images(), coins=COINS), expected)


@compiles
def test_a_compiled_model_can_be_copied():
    model = make_model()
    model.compile(backend="eager")
    model(make_images())
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(clone(make_images(), coins=COINS), model(make_images(), coins=COINS))


def test_the_target_is_left_a_plain_timm_model(tmp_path):
    target = make_target()
    modules = {name: type(module) for name, module in target.named_modules()}
    model = make_model()
    assert {name: type(module) for name, module in model.target.named_modules()} == modules
    save_for_hf(model.target, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(make_images()), model.eval()(make_images()), rtol=1e-6, atol=1e-6)


def test_moving_averages_hold_the_target_alone():
    model = make_model()
    ema = ModelEmaV3(model, decay=0.5)
    before = model.target.head.weight.detach().clone()
    with torch.no_grad():
        model.target.head.weight.add_(1.0)
    ema.update(model)
    torch.testing.assert_close(ema.module.target.head.weight, before + 0.5)
    torch.testing.assert_close(ema.module.source.head.weight, model.source.head.weight)
    assert set(ema.module.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_layer_decay_and_weight_decay_see_the_targets_layers(name):
    model = make_model(name)

    def groups(module, prefix=""):
        optimizer = create_optimizer_v2(module, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
        names = {id(p): n.removeprefix(prefix) for n, p in module.named_parameters()}
        return {
            names[id(p)]: (group["lr_scale"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert groups(model, "target.") == groups(model.target)
    assert len({scale for scale, _ in groups(model).values()}) == len(model.target.blocks) + 2


def test_renormalisation_shows_the_source_its_own_images():
    target, source = make_target(), make_target()
    target.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    source.pretrained_cfg = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    pixels = make_images().sigmoid()

    def normalised(cfg):
        mean, std = (torch.tensor(cfg[key], dtype=pixels.dtype)[:, None, None] for key in ("mean", "std"))
        return (pixels - mean) / std

    model = StochCA(target, source).train()
    seen = []
    source.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(normalised(target.pretrained_cfg), coins=(True,) * 4)
    torch.testing.assert_close(seen[0], normalised(source.pretrained_cfg), rtol=1e-6, atol=1e-6)
