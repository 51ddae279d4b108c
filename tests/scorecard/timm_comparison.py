"""Small instances of timm's architectures in evaluation and at p = 0, beside timm's own models."""

import copy
import importlib
from unittest import mock

import timm
import torch
from timm.models import model_entrypoint
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer

from stochca import StochCA, StochCAAttention
from tests.architectures import REFUSED, driven, images_for, small
from tests.models import perturb

FAMILIES = (VisionTransformer, NaFlexVit, Eva)


def compare(names):
    """Compare architectures with timm's own, and tell all that differ.

    Returns:
        How many they are, how far class rows in training are from timm's in float64 at most, in shares of the
        largest logit, and for how many `attn_layer=StochCAAttention` was compared as well.
    """
    off, error, replaced = {}, 0.0, 0
    for name in names:
        try:
            rounding, is_replaced = compare_one(name)
        except Exception as raised:
            off[name] = f"{type(raised).__name__}: {raised}"
        else:
            error, replaced = max(error, rounding), replaced + is_replaced
    if off:
        raise AssertionError("; ".join(f"{name}: {text}" for name, text in off.items()))
    return {"cases": len(names), "class_rows_error": error, "attention_layers_in_a_case": replaced}


def compare_one(name):
    """Compare one architecture: how far class rows are, and whether timm takes an attention layer for it."""
    torch.manual_seed(0)
    timms, images = small(name), images_for(name)
    perturb(timms)
    source = copy.deepcopy(timms)
    perturb(source, seed=1)

    def logits(model, training, dtype=torch.float32, **arguments):
        torch.manual_seed(1)  # some architectures move positions at random in training
        out = copy.deepcopy(model).to(dtype).train(training)(images.to(dtype), **arguments)
        return torch.stack(out) if isinstance(out, tuple) else out  # two heads answer in training

    whole = StochCA(copy.deepcopy(timms), source, p=0.0, class_rows=False)
    model = StochCA(copy.deepcopy(timms), source, p=0.0)
    with torch.no_grad():
        in_eval, in_training = logits(timms, False), logits(timms, True)
        assert 0 < in_eval.std() < torch.inf, "timm's own logits say nothing"
        assert model.target.state_dict().keys() == timms.state_dict().keys(), "other keys"
        assert torch.equal(logits(model, False), in_eval), "other bits in evaluation"
        assert torch.equal(logits(whole, True), in_training), "other bits in training at p = 0"
        crossed = logits(whole, True, coins=[True] * len(timms.blocks))
        assert not torch.equal(crossed, in_training), "the source cannot be told from the target"
        in_training = logits(timms, True, torch.float64)
        difference = logits(model, True, torch.float64) - in_training
        error = (difference.abs().max() / in_training.abs().max()).item()
        assert error <= 1e-12, f"class rows in training at p = 0 are {error:.1e} off in float64"
    return error, compare_attention_layer(name, timms, images, in_eval)


def compare_attention_layer(name, timms, images, in_eval):
    """Compare timm's own with `attn_layer=StochCAAttention`, where timm takes one for the architecture."""
    if isinstance(timms, Eva):
        return False
    model = small(name, attn_layer=StochCAAttention)
    assert {type(block.attn) for block in model.blocks} == {StochCAAttention}, "timm kept its attention"
    model.load_state_dict(timms.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), in_eval), "other bits with attn_layer=StochCAAttention"
    return True


def refuse_others():
    """Have StochCA refuse a model of each class that it does not drive, and each exception among the others.

    Returns:
        How many architectures of timm these are; none of them counts as one that was compared.
    """
    others = sorted(set(timm.list_models()) - set(driven()))
    first_of, wrong = {}, {}
    for name in others:
        cls = class_of(name)
        first_of.setdefault(name if issubclass(cls, FAMILIES) else cls, name)
    for name in first_of.values():
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            StochCA(model)
        except (TypeError, ValueError) as error:
            if type(model).__name__ not in str(error) or REFUSED.get(name, "got ") not in str(error):
                wrong[name] = f"refused by {error}"
        else:
            wrong[name] = f"a {type(model).__name__} is driven"
    if wrong:
        raise AssertionError("; ".join(f"{name}: {text}" for name, text in wrong.items()))
    return {"cases": 0, "refused_architectures": len(others), "refused_classes": len(first_of)}


def class_of(name):
    """The class that an architecture is an instance of, which is not made."""
    entrypoint = model_entrypoint(name)
    module = importlib.import_module(entrypoint.__module__)
    with (
        mock.patch.object(module, "build_model_with_cfg", lambda cls, *args, **kwargs: cls),
        torch.device("meta"),
    ):
        return entrypoint()
