"""Each term and its gradients are those of its formula, written out by hand in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from stochca import StochCA
from stochca.losses import BSS, L2SP, MIRO, Distillation, FeatureDistillation, Step
from tests.losses.steps import assert_same_term, gradients, make_labels, make_outputs, make_pair
from tests.models import make_images, make_model, make_target, perturb


def term_of(loss, outputs, model, labels=None):
    return loss(Step(model, outputs, make_labels() if labels is None else labels))


def with_features(model, features):
    return make_outputs(model)._replace(features=features)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("batch", [4, 1, 60], ids=["B4", "B1", "B60-above-C48"])
def test_bss_is_the_sum_of_the_smallest_squared_singular_values(batch, k):
    model = make_pair()
    outputs = make_outputs(model, batch=batch)
    values = torch.linalg.svdvals(outputs.features)
    count = min(k, batch, 48)
    expected = 0.3 * sum(values[-i] ** 2 for i in range(1, count + 1))
    term = term_of(BSS(model, weight=0.3, k=k), outputs, model)
    assert_same_term(term, expected, outputs.features)


def test_bss_finds_the_small_beside_the_large():
    """Features of one batch have much in common. A square in float32 would be off by more than the value."""
    model = make_pair()
    features = torch.randn(8, 48, generator=torch.Generator().manual_seed(0)) * 1e-3 + 10
    expected = torch.linalg.svdvals(features.double())[-1] ** 2
    naive = torch.linalg.eigvalsh(features @ features.T)[0]
    assert abs(naive - expected) > expected
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            term = term_of(BSS(model, weight=1.0), with_features(model, features), model)
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["zero", "same rows", "equal values"])
def test_bss_has_a_finite_gradient_where_singular_values_are_zero_or_coincide(case, dtype):
    features = {
        "zero": torch.zeros(4, 48),
        "same rows": torch.ones(4, 48),
        "equal values": 3 * torch.eye(4, 48),
    }[case]
    model = make_pair()
    features = features.to(dtype).requires_grad_()
    term = term_of(BSS(model, weight=1.0, k=2), with_features(model, features), model)
    (grad,) = gradients(term, features)
    assert grad.isfinite().all()
    # 2 sigma u v' for two orthonormal pairs: its norm is that of the two values.
    sigma = 3.0 if case == "equal values" else 0.0
    torch.testing.assert_close(term.item(), 2 * sigma**2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.norm().item(), math.sqrt(2) * 2 * sigma, rtol=1e-5, atol=1e-5)


def l2_sp_by_hand(model, source, weight, head_weight):
    backbone = head = 0.0
    for name, p in model.target.named_parameters():
        if name in ("head.weight", "head.bias"):
            head = head + (p**2).sum()
        else:
            backbone = backbone + ((p - source[name]) ** 2).sum()
    return weight / 2 * backbone + head_weight / 2 * head


@pytest.mark.parametrize("options", [{}, {"weight": 0.5, "head_weight": 0.02}, {"weight": 0.0}])
def test_l2_sp_sums_squares_of_the_distance_to_the_source_and_of_the_head(options):
    model = make_pair()
    expected = l2_sp_by_hand(
        model, model.source.state_dict(), options.get("weight", 0.01), options.get("head_weight", 0.01)
    )
    loss = L2SP(model, **options)
    assert_same_term(
        term_of(loss, make_outputs(model), model), expected, *model.target.parameters(), tolerance=1e-12
    )
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_l2_sp_keeps_no_difference_for_the_backward():
    model = make_pair(dtype=torch.float32)
    known = {p.data_ptr() for p in (*model.target.parameters(), *model.source.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        term_of(L2SP(model), make_outputs(model), model)
    assert {t.data_ptr() for t in kept if t.numel() > 1} <= known


@pytest.mark.parametrize("source_dtype", ["bfloat16", "float8"])
def test_l2_sp_remembers_the_weights_that_the_source_rounds(source_dtype):
    if source_dtype == "float8":
        pytest.importorskip("torchao")
    model = StochCA(make_target(dtype=torch.float32, depth=2), source_dtype=source_dtype).train()
    perturb(model.target, seed=1, scale=1e-4)  # by less than the rounding of the weights
    pretrained = {name: p.detach().clone() for name, p in model.source.named_parameters()}
    loss = L2SP(model, weight=1e4, head_weight=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.forward_step(make_images(dtype=torch.float32), (True, True))
        term = term_of(loss, outputs, model)
    assert model.source.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert not torch.equal(
        model.source.blocks[0].attn.qkv.weight.float(), pretrained["blocks.0.attn.qkv.weight"]
    )
    assert_same_term(
        term, l2_sp_by_hand(model, pretrained, 1e4, 0.0), *model.target.parameters(), tolerance=1e-5
    )
    with pytest.raises(
        ValueError, match=r"whose patch_embed.proj.weight is .* in torch.float32, got .*bfloat16"
    ):
        L2SP(model)


def test_l2_sp_takes_its_copies_along():
    model = make_model(dtype=torch.float32, depth=2, stochca={"source_dtype": "bfloat16"})
    loss = L2SP(model)
    again = copy.deepcopy(loss).double()
    assert {t.dtype for t in loss._copies.values()} == {torch.float32}
    assert {t.dtype for t in again._copies.values()} == {torch.float64}
    assert {t.device.type for t in loss.to("meta")._copies.values()} == {"meta"}


def test_l2_sp_at_the_pretrained_weights_is_the_norm_of_the_head():
    model = StochCA(make_target(depth=2))
    term = term_of(L2SP(model, head_weight=2.0), make_outputs(model), model)
    head = model.target.head
    torch.testing.assert_close(term, (head.weight**2).sum() + (head.bias**2).sum(), rtol=1e-12, atol=0)


def miro_by_hand(outputs, biases, weight):
    total = 0.0
    for b, f, f0 in zip(biases, outputs.taps.values(), outputs.source_taps.values(), strict=True):
        batch, tokens, width = f.shape
        terms = 0.0
        for c in range(width):
            variance = torch.log1p(torch.exp(b[c])) + 1e-5
            for i in range(batch):
                for j in range(tokens):
                    terms = terms + (f[i, j, c] - f0[i, j, c]) ** 2 / variance + torch.log(variance)
        total = total + terms / (batch * tokens * width) / 2
    return weight * total


def test_miro_is_its_bound():
    model = make_pair(embed_dim=16, num_heads=1)
    loss = MIRO(model, weight=0.7, taps=[0, 2])
    initial = [b.detach().clone() for b in loss.b]
    for b in initial:
        torch.testing.assert_close(F.softplus(b) + 1e-5, torch.full_like(b, 0.1), rtol=1e-12, atol=0)
    perturb(loss)
    outputs = make_outputs(model, loss.taps, batch=2, tokens=3)
    expected = miro_by_hand(outputs, list(loss.b), 0.7)
    assert_same_term(term_of(loss, outputs, model), expected, *outputs.taps.values(), *loss.b)


@pytest.mark.parametrize(
    ("depth", "taps"),
    [(12, (0, 3, 6, 9, 12)), (24, (0, 6, 12, 18, 24)), (4, (0, 1, 2, 3, 4)), (2, (0, 1, 2)), (1, (0, 1))],
)
@pytest.mark.parametrize("loss", [MIRO, FeatureDistillation])
def test_taps_are_the_stem_and_four_evenly_spaced_blocks(loss, depth, taps):
    model = make_model(depth=depth, embed_dim=16, num_heads=1)
    assert loss(model).taps == taps
    assert loss(model, taps=[depth, 0]).taps == (0, depth)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("head", ["source", "target"])
def test_distillation_is_the_divergence_of_softened_shares(head, temperature):
    model = make_pair(source_classes=7 if head == "source" else 5)
    outputs = make_outputs(model)
    loss = Distillation(model, weight=0.5, temperature=temperature, head=head)
    z = outputs.logits
    if head == "source":
        z = outputs.features @ model.source.head.weight.T + model.source.head.bias
    expected = 0.0
    for row, row0 in zip(z, outputs.source_logits, strict=True):
        q = torch.exp(row / temperature) / torch.exp(row / temperature).sum()
        q0 = torch.exp(row0 / temperature) / torch.exp(row0 / temperature).sum()
        expected = expected + 0.5 * temperature**2 * (q0 * torch.log(q0 / q)).sum() / len(z)
    torchs = F.kl_div(
        (z / temperature).log_softmax(1), (outputs.source_logits / temperature).softmax(1), reduction="sum"
    )
    torch.testing.assert_close(expected, 0.5 * temperature**2 * torchs / len(z), rtol=1e-10, atol=0)
    assert_same_term(term_of(loss, outputs, model), expected, outputs.logits, outputs.features)
    assert not list(loss.parameters())


def test_distillation_of_the_source_itself_is_zero():
    model = StochCA(make_target(depth=2)).train()
    for head in ("source", "target"):
        loss = Distillation(model, head=head)
        outputs = model.forward_step(make_images(), (False, True), source_logits=True)
        term = term_of(loss, outputs, model, make_labels(2))
        torch.testing.assert_close(term, torch.zeros_like(term), rtol=0, atol=1e-12)


def test_feature_distillation_is_the_mean_squared_error_at_its_taps():
    model = make_pair()
    loss = FeatureDistillation(model, weight=0.5, taps=[1, 3])
    outputs = make_outputs(model, loss.taps)
    squares = [((outputs.taps[t] - outputs.source_taps[t]) ** 2).flatten() for t in (1, 3)]
    expected = 0.5 * torch.cat(squares).sum() / sum(len(s) for s in squares)
    assert_same_term(term_of(loss, outputs, model), expected, *outputs.taps.values())


def test_terms_of_lower_precision_are_computed_in_float32():
    """Outputs in bfloat16 are taken as they are: the term is the one of their values, not a rounded one."""
    model = make_pair()
    for loss in (
        MIRO(model),
        FeatureDistillation(model),
        Distillation(make_pair(source_classes=5), head="target"),
    ):
        if isinstance(loss, MIRO):
            loss.float()
        serving = make_pair(source_classes=5) if isinstance(loss, Distillation) else model
        rounded = make_outputs(serving, loss.taps, dtype=torch.bfloat16)
        expected = term_of(copy.deepcopy(loss).double(), _as_float64(rounded), serving)
        term = term_of(loss, rounded, serving)
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)


def _as_float64(outputs):
    return type(outputs)(
        outputs.logits.double(),
        outputs.features.double(),
        {tap: t.double() for tap, t in outputs.taps.items()},
        {tap: t.double() for tap, t in outputs.source_taps.items()},
        outputs.source_logits.double(),
    )
