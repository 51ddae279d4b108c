"""Tokens of the blocks, by timm's ways to ask for them."""

import copy

import pytest
import torch
from timm.models._features import FeatureGetterNet

from stochca import StochCAAttention
from tests.architectures import images_for, small, stride
from tests.method.timm_families import BOTH, COINS, FAMILIES, IDS, ROTARY, make_stochca, make_timms

each = pytest.mark.parametrize(("make", "family"), BOTH, ids=IDS)
in_each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


@each
@in_each_mode
def test_tokens_have_the_shape_that_is_asked_for(make, family, training):
    model, images = make(family).train(training), images_for(FAMILIES[family])
    vit = getattr(model, "target", model)
    coins = {"coins": COINS} if training and vit is not model else {}
    with torch.no_grad():
        final, every = model.forward_intermediates(images, **coins)
        two = model.forward_intermediates(images, 2, intermediates_only=True, **coins)
        [last] = model.forward_intermediates(
            images,
            [-1],
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
            **coins,
        )
        whole = model.forward_features(images, **coins)
    assert [t.shape for t in every] == [(2, vit.embed_dim, 2, 3)] * len(COINS)
    assert all(torch.equal(t, expected) for t, expected in zip(two, every[1:], strict=True))
    assert torch.equal(final, whole)
    patches, prefix = last if vit.num_prefix_tokens else (last, last[:, :0])
    assert prefix.shape[1] == vit.num_prefix_tokens
    assert torch.equal(torch.cat((prefix, patches), dim=1), whole)
    assert whole.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_net_of_features_prunes_both_models_and_draws_the_same_coins(family):
    whole, images = make_stochca(family), images_for(FAMILIES[family])
    net = FeatureGetterNet(copy.deepcopy(whole), out_indices=(0, 1))
    assert net.feature_info.channels() == [whole.num_features] * 2
    assert net.feature_info.reduction() == [stride(FAMILIES[family])] * 2
    assert len(net.model.target.blocks) == len(net.model.source.blocks) == 2

    with torch.no_grad():
        timms = FeatureGetterNet(make_timms(family), out_indices=(0, 1)).eval()(images)
        assert all(torch.equal(t, expected) for t, expected in zip(net.eval()(images), timms, strict=True))
        assert torch.equal(net.model.source_logits(images), net.model.source(images))

    outputs = net.train()(images)
    expected = whole.train().forward_intermediates(images, [0, 1], stop_early=True, intermediates_only=True)
    assert net.model.plan.coins == whole.plan.coins == (False, True)
    assert all(torch.equal(t, e) for t, e in zip(outputs, expected, strict=True))
    sum(t.square().mean() for t in outputs).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ROTARY])
def test_features_alone_are_timms_with_the_attention_layer(family):
    options = {"depth": 3, "features_only": True, "out_indices": 2}
    timms = small(FAMILIES[family], **options).eval()
    ours = small(FAMILIES[family], attn_layer=StochCAAttention, **options).eval()
    ours.load_state_dict(timms.state_dict(), strict=True)
    assert type(ours.model.blocks[0].attn) is StochCAAttention
    assert ours.feature_info.channels() == timms.feature_info.channels()
    with torch.no_grad():
        pairs = zip(ours(images_for(FAMILIES[family])), timms(images_for(FAMILIES[family])), strict=True)
        assert all(torch.equal(t, expected) for t, expected in pairs)
