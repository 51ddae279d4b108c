"""What timm's own tests ask of every model of its, asked of both ways to use StochCA."""

import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor

from stochca import StochCA, StochCAAttention
from tests.architectures import images_for, small, stride
from tests.method.timm_families import (
    BOTH,
    COINS,
    FAMILIES,
    IDS,
    ROTARY,
    joined,
    make_stochca,
    make_timms,
    make_with_layer,
)

DATA_CONFIGS = [
    getattr(timm.data, name)
    for name in ("resolve_model_data_config", "resolve_input_data_config")
    if hasattr(timm.data, name)  # the second is of timm 1.0.31
]
each = pytest.mark.parametrize(("make", "family"), BOTH, ids=IDS)
every_family = pytest.mark.parametrize("family", FAMILIES)
with_layer = pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ROTARY])


@each
def test_logits_and_all_gradients_are_there_and_finite(make, family):
    model, images = make(family).train(), images_for(FAMILIES[family])
    for coins in [COINS, (False,) * 3, (True,) * 3] if make is make_stochca else [None]:
        model.zero_grad()
        out = joined(model(images) if coins is None else model(images, coins=coins))
        out.square().mean().backward()
        assert out.shape[1] == 5
        assert out.isfinite().all()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
        assert [p.shape for p in model.parameters()] == [grad.shape for grad in gradients.values()]
    with torch.inference_mode():
        assert model.eval()(images).shape == (2, 5)


@each
def test_the_configuration_names_parameters_that_are_there(make, family):
    model = make(family)
    timms = getattr(model, "target", model)
    assert model.default_cfg is model.pretrained_cfg is timms.pretrained_cfg
    assert (model.num_classes, model.in_chans) == (5, 3)
    names = timms.state_dict().keys()
    for key in ("classifier", "first_conv"):
        parts = model.pretrained_cfg[key]
        for part in [parts] if isinstance(parts, str) else parts:
            assert f"{part}.weight" in names
    for resolve in DATA_CONFIGS:
        assert resolve(model) == resolve(timms)


@each
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_classifier_and_pooling_can_be_taken_away_and_given_back(make, family, training):
    model, images = make(family).train(training), images_for(FAMILIES[family])
    timms = getattr(model, "target", model)
    coins = {"coins": COINS} if training and timms is not model else {}

    def output():
        with torch.no_grad():
            return joined(model(images, **coins))

    with torch.no_grad():
        tokens = model.forward_features(images, **coins)
        features = model.forward_head(tokens, pre_logits=True)
    assert tokens.shape == (2, 6 + timms.num_prefix_tokens, timms.embed_dim)
    assert features.shape == (2, model.head_hidden_size)
    assert model.num_features == timms.num_features == model.head_hidden_size
    model.reset_classifier(7)
    heads = model.get_classifier()
    assert {head.out_features for head in (heads if isinstance(heads, tuple) else [heads])} == {7}
    assert model.num_classes == 7
    assert output().shape[1] == 7
    model.reset_classifier(0)
    torch.testing.assert_close(output()[:2], features)
    model.reset_classifier(0, "")
    if family != "two-heads":  # whose heads always read their two tokens
        assert torch.equal(output(), timms.fc_norm(tokens))


@with_layer
def test_the_attention_layer_draws_timms_initial_weights(family):
    states = []
    for layer in ({}, {"attn_layer": StochCAAttention}):
        torch.manual_seed(0)
        states.append(small(FAMILIES[family], **layer).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@every_family
def test_weights_go_back_and_forth_strictly(family, tmp_path):
    timms, images = make_timms(family).eval(), images_for(FAMILIES[family])
    model = StochCA(small(FAMILIES[family], depth=len(COINS)))
    model.target.load_state_dict(timms.state_dict(), strict=True)
    assert [f"target.{name}" for name in timms.state_dict()] == list(model.state_dict())
    path = tmp_path / "weights.pth"
    torch.save(model.target.state_dict(), path)
    layer = {} if family in ROTARY else {"attn_layer": StochCAAttention}
    again = small(FAMILIES[family], depth=len(COINS), checkpoint_path=str(path), **layer).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(images), timms(images))
        assert torch.equal(again(images), timms(images))


@each
def test_checkpointing_changes_no_gradient(make, family):
    model, images = make(family).train(), images_for(FAMILIES[family])
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = joined(model(images, **({"coins": COINS} if make is make_stochca else {})))
        out.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@each
def test_images_may_have_other_sizes(make, family):
    name = FAMILIES[family]
    model = make(family) if family == "naflex" else make(family, dynamic_img_size=True)
    options = {"coins": COINS} if make is make_stochca else {}
    for grid in ((2, 3), (3, 2), (4, 4)):
        images = images_for(name, grid)
        assert joined(model.train()(images, **options)).isfinite().all()
        assert torch.equal(model.eval()(images), getattr(model, "target", model)(images))
        assert model.forward_intermediates(images)[1][0].shape[2:] == grid


@pytest.mark.parametrize(
    ("make", "family"),
    [case for case in BOTH if case[1] != "naflex"],
    ids=[name for name in IDS if "naflex" not in name],
)
def test_the_size_of_images_can_be_set_anew(make, family):
    model, name = make(family), FAMILIES[family]
    model.set_input_size(img_size=tuple(n * stride(name) for n in (3, 2)))
    images = images_for(name, (3, 2))
    options = {"coins": COINS} if make is make_stochca else {}
    assert joined(model.train()(images, **options)).isfinite().all()
    for vit in (model.target, model.source) if make is make_stochca else (model,):
        assert vit.patch_embed.grid_size == (3, 2)


@each
def test_half_of_the_bits_are_enough_for_inference_and_training(make, family):
    exact, images = make(family), images_for(FAMILIES[family])
    model = copy.deepcopy(exact).to(torch.bfloat16)
    options = {"coins": COINS} if make is make_stochca else {}
    for training in (False, True):
        out = joined(model.train(training)(images.bfloat16(), **(options if training else {})))
        wanted = joined(exact.train(training)(images, **(options if training else {})))
        assert out.dtype == torch.bfloat16
        assert (out.float() - wanted).norm() < 0.1 * wanted.norm()
    if make is make_stochca:
        assert {p.dtype for p in model.source.parameters()} == {torch.bfloat16}


@with_layer
def test_patches_may_be_dropped_with_the_attention_layer(family):
    ours, timms = make_with_layer(family, patch_drop_rate=0.5), make_timms(family, patch_drop_rate=0.5)
    outputs = []
    for model in (ours.train(), timms.train()):
        torch.manual_seed(0)
        outputs.append(joined(model(images_for(FAMILIES[family]))))
    assert torch.equal(*outputs)


@each
def test_a_model_is_moved_whole(make, family):
    model = make(family).to("meta")
    out = model.eval()(images_for(FAMILIES[family]).to("meta"))
    assert out.device.type == "meta"
    if make is make_stochca:
        assert {t.device.type for t in model.source.state_dict().values()} == {"meta"}


@with_layer
def test_the_attention_layer_is_traced_as_timms_is(family):
    model, images = make_with_layer(family).eval(), images_for(FAMILIES[family])
    with torch.no_grad():
        tokens = model.forward_features(images)
        nodes = create_feature_extractor(model, {"norm": "tokens"}).eval()
        assert torch.equal(nodes(images)["tokens"], tokens)


@pytest.mark.parametrize(
    ("make", "family"),
    [(make_stochca, "class-token"), (make_stochca, "rotary"), (make_with_layer, "registers")],
)
def test_a_model_is_exported_as_one_program(make, family):
    model, images = make(family).eval(), images_for(FAMILIES[family])
    with torch.no_grad():
        assert torch.equal(torch.export.export(model, (images,)).module()(images), model(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripts_are_made_of_the_target():
    """TorchScript knows no argument that may be one of several kinds, as a source's keys and values are."""
    with timm.layers.set_scriptable(True):
        target = small(FAMILIES["class-token"]).eval()
        layer = small(FAMILIES["class-token"], attn_layer=StochCAAttention).eval()
    images = images_for(FAMILIES["class-token"])
    with torch.no_grad():
        assert torch.equal(torch.jit.script(StochCA(target).target)(images), target(images))
    with pytest.raises(torch.jit.frontend.NotSupportedError, match=r"stochca.attention\.py"):
        torch.jit.script(layer)
