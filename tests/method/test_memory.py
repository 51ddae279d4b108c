"""What is kept for the backward, and the dtype that the frozen weights are held in."""

import copy
import gc
import sys

import pytest
import timm.layers
import torch

from bench.counts import saved_bytes
from stochca import StochCA
from stochca.recompute import Recomputation, _Recipe
from tests import plain
from tests.method.test_training import compiles
from tests.models import make_images, make_model, make_target, perturb

COINS = (False, True, False, True)
MIXED = (torch.tensor([True, False]), True, torch.tensor([False, True]), False)


def with_recomputation(model):
    again = copy.deepcopy(model)
    again.recompute = True
    return again


def gradients(model, coins, images, dtype=None):
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(images, coins=coins)
    return out, plain.gradients(model.target, out)


def assert_equal_bits(first, second):
    assert torch.equal(first[0], second[0])
    for name, grad in first[1].items():
        assert torch.equal(grad, second[1][name]), name


@pytest.mark.parametrize("impl", ["sdpa", "triton", "reference"])
def test_recomputation_changes_no_bit_of_any_implementation(impl):
    model = make_model(dtype=torch.float32, stochca={"impl": impl})
    images = make_images(dtype=torch.float32)
    assert_equal_bits(gradients(model, COINS, images), gradients(with_recomputation(model), COINS, images))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("mlp", ["GatedMlp", "SwiGLU", "GluMlp"])
def test_recomputation_knows_other_mlps(mlp, dtype):
    model = make_model(dtype=torch.float32, mlp_layer=getattr(timm.layers, mlp))
    images = make_images(dtype=torch.float32)
    again = with_recomputation(model)
    assert_equal_bits(gradients(model, COINS, images, dtype), gradients(again, COINS, images, dtype))


def test_recomputation_under_checkpointing_changes_no_bit_and_keeps_tokens_for_pairs():
    """Also where the tokens are fewer than the channels of a head, as those of a ViT-B/32 are."""
    model = make_model(stochca={"class_rows": False})
    model.set_grad_checkpointing()
    again = with_recomputation(model)
    images = make_images()
    assert_equal_bits(gradients(model, COINS, images), gradients(again, COINS, images))
    tokens = []
    step = again._target_step
    again._target_step = lambda *args: tokens.append(args[2]) or step(*args)
    again(images, coins=(False, True, True, True))
    assert [type(kv).__name__ for kv in tokens] == ["NoneType"] + ["Projection"] * 3


@compiles
def test_recomputation_in_a_compiled_model_changes_no_gradient_and_keeps_fewer_bytes():
    coins, images = (True, False, True, False), make_images()
    kept, results = {}, []
    for recompute in (False, True):
        model = make_model(stochca={"recompute": recompute, "class_rows": False})
        model.compile(backend="aot_eager", fullgraph=True)
        results.append(gradients(model, coins, images))
        parameters = [*model.parameters(), *model.source.parameters()]
        kept[recompute] = saved_bytes(lambda model=model: model(images, coins=coins), parameters)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-12, atol=1e-12)
    tokens = images.shape[0] * 10 * 48 * images.element_size()
    assert kept[False] - kept[True] >= 2 * tokens * 0.9


def kept_bytes(model, coins, dtype=None):
    images = make_images(dtype=torch.float32)
    parameters = [*model.parameters(), *model.source.parameters()]

    def forward():
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            model(images, coins=coins)

    return saved_bytes(forward, parameters)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputation_keeps_no_norm_no_activation_and_no_pair(dtype):
    model = make_model(dtype=torch.float32, depth=2, stochca={"class_rows": False, "impl": "sdpa"})
    again = with_recomputation(model)
    size = 2 * 10 * 48 * (4 if dtype is None else 2)  # of a tensor [B, N, C] in the dtype of products
    # Two norms, the activation of four times their width, and one of K, V, whose tokens are kept instead.
    for coins, saved in (((False, False), 2 * (2 + 4)), ((True, True), 2 * (2 + 4 + 1))):
        assert kept_bytes(model, coins, dtype) - kept_bytes(again, coins, dtype) == saved * size


def test_a_recipe_dies_with_its_tensor_and_with_the_context():
    with Recomputation() as recomputation:
        x = torch.ones(3)
        recomputation.instead_of([x], torch.zeros_like, torch.ones(3))
        assert len(recomputation._recipes) == 1
        del x
        assert not recomputation._recipes
        y = torch.ones(3)
        recomputation.instead_of([y], torch.zeros_like, torch.ones(3))
    assert not recomputation._recipes


def test_a_tensor_that_was_changed_is_kept_as_it_is():
    weight = torch.ones(3, requires_grad=True)
    with Recomputation() as recomputation:
        x = torch.ones(3)
        recomputation.instead_of([x], torch.ones_like, torch.zeros(3))
        x.mul_(5)
        (weight * x).sum().backward()
    assert weight.grad.tolist() == [5, 5, 5]


def test_views_of_one_storage_are_computed_once():
    weight, calls = torch.ones(2, requires_grad=True), []
    with Recomputation() as recomputation:
        packed = torch.arange(4.0)
        first, second = packed[:2], packed[2:]
        recomputation.instead_of([first, second], lambda: calls.append(1) or torch.arange(4.0))
        out = (weight * first + weight * second).sum()
    out.backward()
    assert weight.grad.tolist() == [2, 4]
    assert len(calls) == 1


def test_recomputation_leaves_no_hook_and_nothing_in_memory():
    model = make_model(stochca={"recompute": True})
    out = model(make_images(), coins=COINS)
    assert not any(module._forward_hooks for module in model.target.modules())
    assert any(type(thing) is _Recipe for thing in gc.get_objects())
    del out
    assert not any(type(thing) is _Recipe for thing in gc.get_objects())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", ["blocks.1.norm1.weight", "blocks.1.mlp.fc1.weight"])
def test_weights_changed_before_the_backward_are_an_error(recompute, which):
    model = make_model(stochca={"recompute": recompute})
    loss = model(make_images(), coins=COINS).sum()
    with torch.no_grad():
        model.target.get_parameter(which).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_source_changed_before_the_backward_is_an_error():
    model = make_model(stochca={"recompute": True, "class_rows": False})
    loss = model(make_images(), coins=COINS).sum()
    model.source.blocks[1].attn.qkv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_on_norms_and_activations_act_in_the_backward_too():
    model = make_model()
    for block in model.target.blocks:
        for module in (block.norm1, block.mlp.act):
            module.register_forward_hook(lambda module, inputs, output: output * 3)
        block.norm2.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    images = make_images()
    assert_equal_bits(gradients(model, COINS, images), gradients(with_recomputation(model), COINS, images))


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Sigmoid, torch.nn.GELU, torch.nn.SiLU])
def test_recomputation_never_keeps_more(activation):
    model = make_model(dtype=torch.float32, act_layer=activation)
    assert kept_bytes(with_recomputation(model), COINS) < kept_bytes(model, COINS)


def test_a_backward_under_autocast_recomputes_what_the_forward_computed():
    model = make_model(dtype=torch.float32, stochca={"impl": "sdpa"})
    grads = []
    for variant in (model, with_recomputation(model)):
        out = variant(make_images(dtype=torch.float32), coins=COINS)
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(plain.gradients(variant.target, out))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_a_recipe_is_for_one_storage():
    with Recomputation() as recomputation, pytest.raises(ValueError, match="got 2 storages"):
        recomputation.instead_of([torch.ones(3), torch.ones(3)], torch.ones_like, torch.ones(3))


def held(dtype, arithmetic=torch.bfloat16, **kwargs):
    model = make_model(dtype=torch.float32, stochca={"source_dtype": dtype}, **kwargs)
    return model, gradients(model, COINS, make_images(dtype=torch.float32), arithmetic)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"pre_norm": True, "init_values": 0.5}])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_weights_held_in_the_dtype_of_autocast_change_no_bit(name, kwargs):
    dtype = getattr(torch, name)
    model, result = held(name, dtype, **kwargs)
    assert_equal_bits(held(None, dtype, **kwargs)[1], result)
    attn = model.source.blocks[0].attn
    assert attn.qkv.weight.dtype == model.source.patch_embed.proj.weight.dtype == dtype
    assert model.source.blocks[0].norm1.weight.dtype == model.source.pos_embed.dtype == torch.float32
    assert {p.dtype for p in model.target.parameters()} == {torch.float32}


def test_weights_held_are_cast_no_more(monkeypatch):
    model, _ = held("bfloat16")
    pointers = {p.data_ptr() for p in model.source.parameters() if p.ndim > 1}
    casts = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_to_copy" in str(function) and args[0].data_ptr() in pointers:
                casts.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", torch.bfloat16):
        model(make_images(dtype=torch.float32), coins=(True,) * 4)
    assert {tuple(shape) for shape in casts} <= {(1, 1, 48), (1, 10, 48)}  # embeddings


def test_held_weights_refuse_another_arithmetic():
    model, _ = held("bfloat16")
    for coins in (COINS, (False,) * 4):  # whether this step reads the source or not
        with pytest.raises(
            ValueError, match=r"steps in torch.bfloat16, but this one computes in torch.float32"
        ):
            model(make_images(dtype=torch.float32), coins=coins)
        with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"torch.float16"):
            model(make_images(dtype=torch.float32), coins=coins)
    with pytest.raises(ValueError, match="source_dtype must be one of"):
        StochCA(model.target, source_dtype="float4")


def test_a_source_in_float8_is_near_and_keeps_queries_keys_and_values_in_bfloat16():
    pytest.importorskip("torchao")
    (_, exact), (model, result) = held("bfloat16"), held("float8")
    error = (result[0] - exact[0]).norm() / exact[0].norm()
    assert 0 < error < 0.1
    block = model.source.blocks[1]
    assert type(block.attn.qkv) is torch.nn.Linear
    assert {type(block.attn.proj).__name__, type(block.mlp.fc1).__name__} == {"Float8Linear"}
    assert not any("float8" in type(module).__name__.lower() for module in model.target.modules())


def test_float8_refuses_widths_that_its_products_do_not_take():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"widths that 16 divides, the source has \[24\]"):
        held("float8", embed_dim=24, num_heads=1)


def test_a_held_source_survives_a_copy():
    model, result = held("bfloat16")
    again = copy.deepcopy(model)
    perturb(model.source, seed=5)
    assert_equal_bits(gradients(again, COINS, make_images(dtype=torch.float32), torch.bfloat16), result)


def test_a_mistaken_arithmetic_leaves_the_source_as_it_was():
    model = make_model(dtype=torch.float32, stochca={"source_dtype": "bfloat16"})
    before = copy.deepcopy(model.source.state_dict())
    with pytest.raises(ValueError, match=r"computes in torch\.float32"):
        model(make_images(dtype=torch.float32), coins=COINS)
    for name, tensor in model.source.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_weights_are_held_again_after_a_cast_of_the_whole_model(dtype):
    if dtype == "float8":
        pytest.importorskip("torchao", reason="needs torchao")
    model, result = held(dtype)
    model.float()
    assert_equal_bits(gradients(model, COINS, make_images(dtype=torch.float32), torch.bfloat16), result)
    assert model.source.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


def test_float8_is_refused_before_anything_runs(monkeypatch):
    target = make_target(dtype=torch.float32)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ImportError, match=r'pip install "stochca\[float8\]"'):
        StochCA(target, source_dtype="float8")


def test_float8_is_emulated_with_the_rounding_of_a_gpu():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model, _ = held("float8", embed_dim=64, num_heads=4)
    emulated = model.source.blocks[0].mlp.fc1
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    weight, tokens = (
        quantization.Float8Tensor.from_hp(t, granularity=quantization.PerRow()).dequantize()
        for t in (emulated.weight.detach(), x)
    )
    expected = torch.nn.functional.linear(tokens.float(), weight.float(), emulated.bias.float())
    error = (emulated(x).float() - expected).norm() / expected.norm()
    exact = torch.nn.functional.linear(x.float(), emulated.weight.float(), emulated.bias.float())
    assert error < 0.6 * (exact - expected).norm() / exact.norm()


def test_images_are_renormalised_without_a_new_tensor_in_every_step(monkeypatch):
    target = make_target()
    target.pretrained_cfg = {**target.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    source = copy.deepcopy(target)
    source.pretrained_cfg = {**source.pretrained_cfg, "mean": (0.4,) * 3, "std": (0.2,) * 3}
    model = StochCA(target, source).train()
    first = model(make_images(), coins=COINS)
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    assert torch.equal(model(make_images(), coins=COINS), first)
