"""Co-Tuning: train the pretrained head on, with what the target's classes say about the source's."""

import copy
import warnings
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stochca.losses.base import Companion, Step, exact
from stochca.losses.checks import check_choice, check_number, classifier_of
from stochca.model import StochCA

Relationship = Literal["learned", "direct"]

# Inverse strengths of the regression's penalty, as in the authors' code.
STRENGTHS = (*(digit * 10.0**power for power in range(-4, 4) for digit in (1, 3)), 1e4)

# The share of the images of each class on which the strength and the temperature are chosen.
HELD_OUT = 0.2


class CoTuning(Companion):
    r"""Supervise a trainable copy of the source's head with the source's classes of each label.

    :math:`\lambda\,\mathrm{mean}\!\left(-\sum_s R_{y,s} \log \mathrm{softmax}(g_s(F))_s\right)`, where
    :math:`g_s` starts as the source's pretrained head, F are the target's pooled features and
    :math:`R_{t,s} = p(\text{source class } s \mid \text{target class } t)` is fitted to the training images.
    Mixed labels `[B, T]` mix the rows of R.

    Args:
        model: Target, and a source that has kept its pretrained head.
        weight: :math:`\lambda`.
        relationship: "learned", by `learned_relationship`, needs scikit-learn; "direct", by
            `direct_relationship`.
        tau: Inverse temperature of the source's probabilities softmax(tau z). The authors calibrate it on the
            source's own validation images (0.88 for their ResNet-50); 1 takes them as they are.
        lr_mult: Factor on the learning rate of :math:`g_s`.

    Attributes:
        head: :math:`g_s`.
        relationship: R `[T, S]`, a buffer; zeros before `fit`, or before a state dict that has it is loaded.

    Raises:
        ValueError: An option is out of range, the target has not one classifier, or the source none of at
            least two classes.
        ImportError: scikit-learn is missing.

    Source: You, Kou, Long and Wang, NeurIPS 2020.
    """

    name = "co_tuning"
    fits_source_logits = True
    relationship: Tensor

    def __init__(
        self,
        model: StochCA,
        weight: float = 2.3,
        relationship: Relationship = "learned",
        tau: float = 1.0,
        lr_mult: float = 1.0,
    ) -> None:
        super().__init__()
        check_number(self.name, "weight", weight)
        check_choice(self.name, "relationship", relationship, get_args(Relationship))
        check_number(self.name, "tau", tau, positive=True)
        check_number(self.name, "lr_mult", lr_mult)
        classifier_of(self.name, model, "target", at_least=2)
        if relationship == "learned":
            _logistic_regression()
        self.weight, self.tau, self.lr_mult = weight, tau, float(lr_mult)
        self.kind = relationship
        head = copy.deepcopy(classifier_of(self.name, model, "source", at_least=2))
        for p in head.parameters():
            p.data = exact(p.data)
        self.head = head.requires_grad_(True)
        shape = model.target.num_classes, model.source.num_classes
        self.register_buffer("relationship", next(head.parameters()).new_zeros(shape))
        self._is_fitted = False

    def fit(self, source_logits: Tensor, labels: Tensor) -> None:
        """Find R, see `Companion.fit`.

        Args:
            source_logits: `[n, S]`, S classes of the source.
            labels: `[n]`, of the T classes of the target.

        Raises:
            ValueError: Shapes or labels do not fit, logits are not finite, or "learned" has too few images.
        """
        num_classes, num_source_classes = self.relationship.shape
        if source_logits.ndim != 2 or source_logits.shape[1] != num_source_classes or not len(source_logits):
            raise ValueError(
                f"{self.name}: source_logits must have shape (n, {num_source_classes}) with n of at least 1, "
                f"got {tuple(source_logits.shape)}"
            )
        if labels.shape != source_logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"{self.name}: labels must be whole numbers of shape ({len(source_logits)},), "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"{self.name}: labels must be from 0 to {num_classes - 1}, "
                f"got {labels.min().item()} to {labels.max().item()}"
            )
        if not source_logits.isfinite().all():
            raise ValueError(f"{self.name}: source_logits must be finite")
        probabilities = F.softmax(self.tau * source_logits.detach().double().cpu(), dim=1)
        find = learned_relationship if self.kind == "learned" else direct_relationship
        self.relationship.copy_(find(probabilities, labels.cpu(), num_classes))

    def forward(self, step: Step) -> Tensor:
        """The term, see `Companion.forward`.

        Raises:
            RuntimeError: Nothing has been fitted or loaded.
        """
        if not self._is_fitted:  # asked until it is, as asking waits for the device
            self._is_fitted = bool(self.relationship.any())
            if not self._is_fitted:
                raise RuntimeError(f"{self.name} needs fit(), or a loaded state dict, before its first step")
        logits = exact(self.head(step.outputs.features))
        return self.weight * F.cross_entropy(logits, self._shares(step.labels).to(logits.dtype))

    def extra_repr(self) -> str:
        """The options."""
        return f"weight={self.weight}, relationship={self.kind!r}, tau={self.tau}, lr_mult={self.lr_mult}"

    def _shares(self, labels: Tensor) -> Tensor:
        """The source's classes of each sample, `[B, S]`."""
        if labels.ndim == 1:
            return self.relationship[labels]
        with torch.autocast(labels.device.type, enabled=False):
            return labels.to(self.relationship.dtype) @ self.relationship


def direct_relationship(probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean of the source's probabilities over the images of each class.

    Args:
        probabilities: `[n, S]` float64, what the source says of each training image.
        labels: Their classes `[n]`.
        num_classes: T.

    Returns:
        R `[T, S]`; in rows of classes without images the mean over all images.
    """
    relationship = probabilities.mean(0).repeat(num_classes, 1)
    for label in labels.unique().tolist():
        relationship[label] = probabilities[labels == label].mean(0)
    return relationship


def learned_relationship(probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Learn p(t | s) by logistic regression, and turn it around by Bayes' rule.

    A regression without intercept, of weights W `[T, S]`, predicts the label from the source's probabilities.
    It is fitted to all but the last fifth of each class's images (at least one of two or more), on which the
    strength of its penalty is chosen by accuracy, the weaker of equals, and then a factor c on its logits by
    likelihood. Of a source class taken for certain it says :math:`p(t | s) = \mathrm{softmax}_t(c W_{t,s})`,
    and :math:`R_{t,s} = p(t | s)\,p(s) / \sum_{s'} p(t | s')\,p(s')` with p(s) the mean over all images.

    Args:
        probabilities: `[n, S]` float64, what the source says of each training image.
        labels: Their classes `[n]`.
        num_classes: T.

    Returns:
        R `[T, S]`; in rows of classes without images p(s).

    Raises:
        ValueError: Fewer than two classes have images, or none has two of them.
        ImportError: scikit-learn is missing.
    """
    held_out = _held_out(labels)
    present = labels.unique()
    if len(present) < 2 or not held_out.any():
        raise ValueError(
            'co_tuning: relationship="learned" needs images of two classes and two images of one, '
            f'got {len(labels)} images of {len(present)} classes: use relationship="direct"'
        )
    weights = _regression(probabilities, labels, held_out)
    classes = torch.searchsorted(present, labels[held_out])
    factor = _fit_factor(probabilities[held_out] @ weights.T, classes)
    # In logarithms: a class that no source class speaks for has a row nevertheless.
    prior = probabilities.mean(0)
    joint = F.log_softmax(factor * weights, dim=0) + prior.log()
    relationship = prior.repeat(num_classes, 1)
    relationship[present] = F.softmax(joint, dim=1)
    return relationship


def _held_out(labels: Tensor) -> Tensor:
    """Which images are held out, bool `[n]`: the last of each class, and never all of them."""
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique().tolist():
        (images,) = torch.where(labels == label)
        if len(images) > 1:
            held_out[images[-max(1, int(len(images) * HELD_OUT)) :]] = True
    return held_out


def _regression(probabilities: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
    """Weights `[classes that have images, S]` of the regression with the best strength."""
    fitted = probabilities[~held_out].numpy(), labels[~held_out].numpy()
    judged = probabilities[held_out].numpy(), labels[held_out].numpy()
    regression = _logistic_regression()(fit_intercept=False, warm_start=True)
    best, best_accuracy = STRENGTHS[0], -1.0
    with warnings.catch_warnings():
        # A fit that stops early is a candidate like others.
        warnings.simplefilter("ignore", category=_convergence_warning())
        for strength in STRENGTHS:
            accuracy = regression.set_params(C=strength).fit(*fitted).score(*judged)
            if accuracy >= best_accuracy:
                best, best_accuracy = strength, accuracy
        regression.set_params(C=best, max_iter=1000, tol=1e-6).fit(*fitted)
    weights = torch.from_numpy(regression.coef_)
    if len(weights) == 1:  # two classes: the logit of the second
        weights = torch.cat([torch.zeros_like(weights), weights])
    return weights


def _fit_factor(logits: Tensor, labels: Tensor) -> Tensor:
    """The factor c > 0 under which softmax(c logits) makes the labels most likely."""
    log_factor = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_factor], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(log_factor.exp() * logits, labels)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return log_factor.detach().exp()


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            'co_tuning with relationship="learned" needs scikit-learn: pip install "stochca[cotuning]"'
        ) from error
    return LogisticRegression


def _convergence_warning() -> type[Warning]:
    from sklearn.exceptions import ConvergenceWarning

    return ConvergenceWarning
