"""Co-Tuning: the relationship of classes against one that is fitted independently, and the term."""

import math
import sys

import pytest
import torch
from scipy.optimize import minimize_scalar

from stochca.losses import CoTuning, Step, cotuning
from stochca.losses.cotuning import direct_relationship, learned_relationship
from tests.losses.steps import CLASSES, SOURCE_CLASSES, assert_same_term, make_labels, make_outputs, make_pair

# Of the authors, from strong to weak.
GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4]


def make_logits(per_class=12, classes=CLASSES, source_classes=SOURCE_CLASSES, noise=1.5, flips=0.3, seed=0):
    """Source logits that prefer a class or two for each label, and labels of which some are wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    order = torch.randperm(len(labels), generator=generator)
    labels = labels[order]
    means = 2 * torch.randn(classes, source_classes, generator=generator, dtype=torch.float64)
    logits = means[labels] + noise * torch.randn(
        len(labels), source_classes, generator=generator, dtype=torch.float64
    )
    wrong = torch.rand(len(labels), generator=generator) < flips
    labels[wrong] = torch.randint(classes, (int(wrong.sum()),), generator=generator)
    return logits, labels


def regress(x, y, classes, strength):
    """Multinomial weights [T, S] that minimise C sum(-log p) + |W|^2 / 2, by LBFGS to convergence."""
    weights = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=2000,
        max_eval=4000,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        scores = x @ weights.T
        likelihood = (scores.gather(1, y[:, None])[:, 0] - scores.logsumexp(1)).sum()
        value = -likelihood + (weights**2).sum() / 2 / strength
        value.backward()
        return value

    optimizer.step(objective)
    return weights.detach()


def relationship_by_hand(logits, labels, classes, tau, grid):
    """The strength that it chose, and R by plain loops."""
    x = torch.stack([torch.exp(tau * z) / torch.exp(tau * z).sum() for z in logits])
    fitted, held = [], []
    for label in range(classes):
        images = [i for i in range(len(labels)) if labels[i] == label]
        count = max(1, len(images) // 5) if len(images) > 1 else 0
        fitted += images[: len(images) - count]
        held += images[len(images) - count :]
    fitted, held = sorted(fitted), sorted(held)
    best = (-1.0, None, None)
    for strength in grid:
        weights = regress(x[fitted], labels[fitted], classes, strength)
        right = ((x[held] @ weights.T).argmax(1) == labels[held]).sum().item()
        if right >= best[0]:
            best = (right, strength, weights)
    _, strength, weights = best

    def loss_of(log_factor):
        scores = math.exp(log_factor) * (x[held] @ weights.T)
        return -(scores.gather(1, labels[held][:, None])[:, 0] - scores.logsumexp(1)).mean().item()

    factor = math.exp(minimize_scalar(loss_of, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9}).x)
    source_classes = x.shape[1]
    forwards = [[0.0] * classes for _ in range(source_classes)]
    for s in range(source_classes):
        exponentials = [math.exp(factor * weights[t, s].item()) for t in range(classes)]
        for t in range(classes):
            forwards[s][t] = exponentials[t] / sum(exponentials)
    prior = [sum(row[s].item() for row in x) / len(x) for s in range(source_classes)]
    relationship = torch.zeros(classes, source_classes, dtype=torch.float64)
    for t in range(classes):
        evidence = sum(forwards[s][t] * prior[s] for s in range(source_classes))
        for s in range(source_classes):
            relationship[t, s] = forwards[s][t] * prior[s] / evidence
    return strength, relationship


FEW = [0.1, 3.0, 100.0]


@pytest.fixture
def few_strengths(monkeypatch):
    monkeypatch.setattr(cotuning, "STRENGTHS", FEW)


def test_strengths_are_the_authors():
    assert list(cotuning.STRENGTHS) == pytest.approx(GRID)


@pytest.mark.usefixtures("few_strengths")
@pytest.mark.parametrize(("seed", "tau"), [(1, 1.0), (3, 1.0), (1, 0.5)])
def test_learned_relationship_is_bayes_rule_on_a_regression(seed, tau):
    logits, labels = make_logits(seed=seed)
    strength, expected = relationship_by_hand(logits, labels, CLASSES, tau, FEW)
    assert strength < FEW[-1]  # which training images would choose
    loss = CoTuning(make_pair(), tau=tau)
    loss.fit(logits, labels)
    torch.testing.assert_close(loss.relationship, expected, rtol=0, atol=5e-5)


@pytest.mark.usefixtures("few_strengths")
def test_two_classes_are_learned_as_more_are():
    """One vector of weights stands for two that are opposite, at half the penalty."""
    logits, labels = make_logits(per_class=20, classes=2)
    halves = [strength / 2 for strength in FEW]
    _, expected = relationship_by_hand(logits, labels, 2, 1.0, halves)
    relationship = learned_relationship(logits.softmax(1), labels, 2)
    torch.testing.assert_close(relationship, expected, rtol=0, atol=5e-5)


@pytest.mark.usefixtures("few_strengths")
@pytest.mark.parametrize("factor", [None, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_certain_and_impossible_classes_leave_rows_of_shares(scale, factor, monkeypatch):
    if factor is not None:
        monkeypatch.setattr(cotuning, "_fit_factor", lambda *_: factor)
    logits, labels = (t[:-13] for t in make_logits(noise=0.1, flips=0.0))  # classes of different sizes
    for probabilities in ((scale * logits).softmax(1), torch.ones(len(labels), 7, dtype=torch.float64) / 7):
        relationship = learned_relationship(probabilities, labels, CLASSES)
        assert relationship.isfinite().all()
        assert (relationship >= 0).all()
        torch.testing.assert_close(
            relationship.sum(1), torch.ones(CLASSES, dtype=torch.float64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_direct_relationship_is_the_mean_of_the_sources_shares(tau):
    logits, labels = make_logits()
    loss = CoTuning(make_pair(), relationship="direct", tau=tau)
    loss.fit(logits, labels)
    for t in range(CLASSES):
        rows = [
            torch.exp(tau * z) / torch.exp(tau * z).sum()
            for z, y in zip(logits, labels, strict=True)
            if y == t
        ]
        torch.testing.assert_close(loss.relationship[t], sum(rows) / len(rows), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("few_strengths")
@pytest.mark.parametrize("find", [learned_relationship, direct_relationship])
def test_a_class_without_images_has_the_mean_of_all(find):
    logits, labels = make_logits()
    probabilities = logits.softmax(1)
    kept = labels != 2
    relationship = find(probabilities[kept], labels[kept], CLASSES + 1)
    for t in (2, CLASSES):
        torch.testing.assert_close(relationship[t], probabilities[kept].mean(0), rtol=1e-12, atol=0)
    others = find(probabilities[kept], torch.where(labels > 2, labels - 1, labels)[kept], CLASSES - 1)
    torch.testing.assert_close(relationship[[0, 1, 3, 4]], others, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("few_strengths")
def test_a_class_of_one_image_is_learned_and_not_held_out():
    logits, labels = make_logits()
    (images,) = torch.where(labels == 3)
    kept = torch.ones_like(labels, dtype=torch.bool)
    kept[images[1:]] = False
    relationship = learned_relationship(logits[kept].softmax(1), labels[kept], CLASSES)
    assert not torch.allclose(relationship[3], logits[kept].softmax(1).mean(0), atol=1e-3)


def test_learning_refuses_what_nothing_can_be_chosen_on():
    probabilities = make_logits()[0].softmax(1)[:5]
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r'5 images of \d classes: use relationship="direct"'):
            learned_relationship(probabilities, labels, CLASSES)


def fitted(model, **options):
    loss = CoTuning(model, relationship="direct", **options)
    loss.fit(*make_logits())
    return loss


def test_the_term_is_the_cross_entropy_of_the_sources_classes():
    model = make_pair()
    loss, outputs, labels = fitted(model), make_outputs(model), torch.tensor([3, 0, 0, 4])
    logits = outputs.features @ loss.head.weight.T + loss.head.bias
    expected = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        for s in range(SOURCE_CLASSES):
            share = torch.exp(row[s]) / torch.exp(row).sum()
            expected = expected - 2.3 / 4 * loss.relationship[label, s] * torch.log(share)
    term = loss(Step(model, outputs, labels))
    assert_same_term(term, expected, outputs.features, *loss.head.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_labels_mix_the_terms(autocast):
    model = make_pair(dtype=torch.float32)
    loss, outputs = fitted(model), make_outputs(model, dtype=torch.float32)
    shares = torch.tensor([0.7, 0.3])
    soft = torch.zeros(4, CLASSES)
    soft[:, 1], soft[:, 4] = shares
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = loss(Step(model, outputs, soft))
        parts = [loss(Step(model, outputs, torch.full((4,), label))) for label in (1, 4)]
        one_hot = loss(Step(model, outputs, torch.eye(CLASSES)[make_labels()]))
        indexed = loss(Step(model, outputs, make_labels()))
    torch.testing.assert_close(mixed, 0.7 * parts[0] + 0.3 * parts[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(one_hot, indexed, rtol=1e-6, atol=0)


def test_the_head_starts_as_the_sources_and_is_its_own():
    model = make_pair()
    loss = CoTuning(model, relationship="direct")
    assert all(p.requires_grad for p in loss.head.parameters())
    assert set(loss.state_dict()) == {"relationship", "head.weight", "head.bias"}
    before = model.source.head.weight.clone()
    assert torch.equal(loss.head.weight, before)
    with torch.no_grad():
        loss.head.weight.zero_()
    assert torch.equal(model.source.head.weight, before)
    assert not any(p.requires_grad for p in model.source.parameters())


def test_the_head_trains_in_float32_whatever_the_source_holds():
    model = make_pair(dtype=torch.float32)
    model.source.bfloat16()
    loss = CoTuning(model, relationship="direct")
    assert {t.dtype for t in loss.state_dict().values()} == {torch.float32}
    assert model.source.head.weight.dtype == torch.bfloat16


def test_a_state_dict_spares_the_fit():
    model = make_pair()
    loss, again = fitted(model), CoTuning(model, relationship="direct")
    step = Step(model, make_outputs(model), make_labels())
    with pytest.raises(RuntimeError, match=r"co_tuning needs fit\(\), or a loaded state dict"):
        again(step)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(step), loss(step))


def test_a_missing_package_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'pip install "stochca\[cotuning\]"'):
        CoTuning(make_pair())
    assert CoTuning(make_pair(), relationship="direct").kind == "direct"


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.arange(4), r"source_logits must have shape \(n, 7\) .* got \(4, 3\)"),
        (torch.zeros(0, 7), torch.arange(0), r"n of at least 1, got \(0, 7\)"),
        (torch.zeros(4, 7), torch.arange(3), r"labels must be whole numbers of shape \(4,\), got .*\(3,\)"),
        (torch.zeros(4, 7), torch.zeros(4), "got torch.float32"),
        (torch.zeros(4, 7), torch.arange(4) + 2, "labels must be from 0 to 4, got 2 to 5"),
        (torch.full((4, 7), torch.nan), torch.arange(4), "source_logits must be finite"),
    ],
)
def test_fit_refuses_what_does_not_fit(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        CoTuning(make_pair(), relationship="direct").fit(logits, labels)
