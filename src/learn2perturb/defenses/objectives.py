"""What is descended: the mixture of eq. 11, TRADES, and either of them at adversarially perturbed weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.attacks import PGD
from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import mean_logits
from learn2perturb.attacks.query import Query
from learn2perturb.checks import check_choice, check_count, check_step
from learn2perturb.defenses.awp import against_weights
from learn2perturb.defenses.settings import ATTACK_DRAWS, Settings
from learn2perturb.engine.answers import ask, plain_logits
from learn2perturb.errors import InputError

Model = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Clock:
    """Where a training stands: everything that schedules may depend on, all counted from 0.

    Attributes:
        epoch: of the whole training.
        batch: within the epoch.
        batches: batches in an epoch.
        stage: index of the stage.
        stage_epoch: epoch within the stage.
        examples: images in an epoch, the size of the training set; 0 where that is not known.
    """

    epoch: int
    batch: int
    batches: int
    stage: int = 0
    stage_epoch: int = 0
    examples: int = 0

    @property
    def step(self) -> int:
        """Number of the step since the start of the training."""
        return self.epoch * self.batches + self.batch


@final
@dataclass(frozen=True)
class Losses:
    """What one evaluation of the objective gave: the loss to descend, and its parts for the metrics (detached).

    Attributes:
        total: scalar with a graph.
        clean: clean cross-entropy, or None.
        adversarial: adversarial cross-entropy, or None.
        clean_correct: (N,) bool, or None.
        adversarial_correct: (N,) bool, or None.
        extra: further scalars for the metrics, by name.
    """

    total: Tensor
    clean: Tensor | None = None
    adversarial: Tensor | None = None
    clean_correct: Tensor | None = None
    adversarial_correct: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


def forward(model: Model, x: Tensor) -> Tensor:
    """Return logits of ``x`` in the current execution mode, float32 at least, finite where the model's are.

    Raises:
        InputError: the model gives no logits (N, classes), or works in place on the images.
    """
    before = 0 if x.is_inference() else x._version
    logits = ask(model, x)
    _check_answer(logits, x, before)
    return plain_logits(logits)


def _check_answer(logits: object, x: Tensor, before: int) -> None:
    """Check an answer to images ``x`` whose version was ``before``; nothing here waits for the device."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"the network gives {what} for {len(x)} images; it must give logits (N, classes), in train and in eval "
            "mode; wrap it"
        )
    if not x.is_inference() and x._version != before:
        raise InputError(
            "the network works in place on its images, which other passes of a step need as they are; begin its "
            "forward() with x = x.clone()"
        )


def prediction(model: Model, x: Tensor, settings: Settings) -> Tensor:
    """Return what the loss is taken of: the logits of one pass, or the log of the mean softmax of ``loss_draws``.

    The latter are logits too, those of the averaged predictor: their softmax is the mean.
    """
    if settings.loss == "single":
        return forward(model, x)
    # A pass for each draw, not copies in one: weight noise, and noise shared over a batch, is drawn once in a pass.
    draws = [torch.log_softmax(forward(model, x), dim=1) for _ in range(settings.loss_draws)]
    return torch.logsumexp(torch.stack(draws), dim=0) - math.log(len(draws))


def _draws_of_adversary(settings: Settings) -> dict[str, Any]:
    """Return what an attack is told about draws; one on the averaged predictor averages as that does."""
    if settings.loss == "single":
        return {"eot": settings.attack_eot, "eot_draws": settings.attack_draws}
    draws = max(settings.attack_eot, settings.loss_draws)
    return {"eot": draws, "eot_draws": settings.attack_draws, "eot_average": "probability"}


def training_adversary(settings: Settings) -> PGD:
    """Return the PGD attack that crafts training examples."""
    return PGD(
        eps=settings.eps,
        step_size=settings.attack_step_size,
        steps=settings.attack_steps,
        random_start=settings.attack_random_start,
        norm=settings.norm,
        **_draws_of_adversary(settings),
    )


def objective_loss(model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
    """Return the objective that ``settings`` name: :func:`trades_loss` or :func:`mixed_loss`."""
    return (trades_loss if settings.objective == "trades" else mixed_loss)(model, x, y, clock, settings)


def label_loss(logits: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """Return the cross-entropy with the labels, smoothed as ``settings`` say."""
    return F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)


def with_consistency(losses: Losses, model: Model, x_adv: Tensor, logits: Tensor, settings: Settings) -> Losses:
    """Return ``losses`` plus ``consistency`` times what two draws disagree by on ``x_adv``; ``logits`` are the first's.

    The mean over the batch of ``(KL(p || q) + KL(q || p)) / 2``, p and q the predictions of two draws; the gradient
    goes through both.
    """
    if not settings.consistency:
        return losses
    others = prediction(model, x_adv, settings)
    apart = 0.5 * (kl_divergence(logits, others) + kl_divergence(others, logits)).mean()
    extra = {**losses.extra, "disagreement": apart.detach()}
    return replace(losses, total=losses.total + settings.consistency * apart, extra=extra)


def clean_loss(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> Losses:
    """Return the cross-entropy of clean images alone: what every objective is before its adversary starts."""
    logits = prediction(model, x, settings)
    loss = label_loss(logits, y, settings)
    return Losses(loss, clean=loss.detach(), clean_correct=logits.detach().argmax(1) == y)


def mode_of_attack(settings: Settings) -> Literal["eval", "keep"]:
    """Return the mode that the training adversary runs in."""
    # The model is in train mode, but for what its owner has frozen, so train mode is the mode that it is in.
    return "keep" if settings.attack_mode == "train" else "eval"


def mixed_loss(model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
    """Return ``alpha CE(f(x), y) + beta CE(f(x'), y)``, x' by PGD (Learn2Perturb, eq. 11; eq. 10 when alpha is 0).

    Before ``adversarial_delay`` it is the clean loss alone. The clean pass comes first, in train mode, as in the
    released code, so the attack sees BatchNorm statistics that this batch has already moved. With ``awp`` both terms
    are taken at weights that were moved against ``CE(f(x'), y)``.
    """
    attacked = clock.epoch >= settings.adversarial_delay
    if not attacked or settings.beta == 0:
        return clean_loss(model, x, y, settings)
    guessing = settings.attack_labels == "predicted"
    logits = prediction(model, x, settings) if settings.alpha or guessing else None
    labels = logits.detach().argmax(1) if guessing and logits is not None else y
    x_adv = training_adversary(settings).craft(model, x, labels, mode=mode_of_attack(settings))
    network: Model = model
    if settings.awp:
        network = against_weights(
            model, settings.awp, lambda f: label_loss(prediction(f, x_adv, settings), y, settings)
        )
        logits = prediction(network, x, settings) if settings.alpha else logits
    adv_logits = prediction(network, x_adv, settings)
    adversarial = label_loss(adv_logits, y, settings)
    clean = None if logits is None else label_loss(logits, y, settings)
    total = settings.beta * adversarial
    losses = Losses(
        settings.alpha * clean + total if settings.alpha and clean is not None else total,
        clean=None if clean is None else clean.detach(),
        adversarial=adversarial.detach(),
        clean_correct=None if logits is None else logits.detach().argmax(1) == y,
        adversarial_correct=adv_logits.detach().argmax(1) == y,
    )
    return with_consistency(losses, network, x_adv, adv_logits, settings)


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return ``KL(softmax(r) || softmax(z))`` of each row, shape (N,), from logits z and r, both (N, K).

    From logits, since a probability underflows: its log is then -inf, and the gradient of 0 log 0 is NaN.
    """
    log_p, log_q = torch.log_softmax(reference, dim=1), torch.log_softmax(logits, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


@final
@dataclass(frozen=True)
class TradesAdversary(Attack):
    """PGD on ``KL(p(x) || p(x'))`` from ``x + 0.001 N(0, 1)``: the inner maximisation of TRADES. Labels play no part.

    For a model with noise p(x) is the mean over ``eot`` draws, taken once, and every step has fresh draws for x'.
    Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, 2019, algorithm 1,
    https://arxiv.org/abs/1901.08573.

    Attributes:
        step_size: length of a step, [0, 1] pixel scale.
        steps: at least 1.
        eot_draws: ``"fresh"`` in each step, or ``"held"`` through all of them.
    """

    step_size: float = 0.007
    steps: int = 10
    eot_draws: str = field(default="fresh", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step("step_size", self.step_size, self.eps, norm=self.norm)
        check_count("steps", self.steps)
        check_choice("eot_draws", self.eot_draws, ATTACK_DRAWS)

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the last iterate."""
        with torch.no_grad():
            reference = mean_logits(query.logits, x.clone(), self.eot, "probability")
        x_adv = x + 0.001 * torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_()
        with query.held() if self.eot_draws == "held" else contextlib.nullcontext():
            for _ in range(self.steps):
                gradient = query.gradient(x_adv, reference, loss=kl_divergence)
                moved = self.ball.step(gradient, self.step_size).add_(x_adv)
                x_adv = self.ball.project(moved, x, self.eps).clamp_(0.0, 1.0)
        return x_adv


def trades_adversary(settings: Settings) -> TradesAdversary:
    """Return TRADES' adversary with the radius, steps and step size of ``settings``."""
    return TradesAdversary(
        eps=settings.eps,
        step_size=settings.attack_step_size,
        steps=settings.attack_steps,
        norm=settings.norm,
        **_draws_of_adversary(settings),
    )


def losses_of_pair(total: Tensor, logits: Tensor, adv_logits: Tensor, y: Tensor) -> Losses:
    """Return an objective ``total`` with what the clean and the adversarial logits (N, K) of its batch say."""
    with torch.no_grad():
        clean, adversarial = F.cross_entropy(logits, y), F.cross_entropy(adv_logits, y)
    return Losses(
        total,
        clean=clean,
        adversarial=adversarial,
        clean_correct=logits.detach().argmax(1) == y,
        adversarial_correct=adv_logits.detach().argmax(1) == y,
    )


def trades_loss(model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
    """Return ``CE(f(x), y) + trades_beta * mean_i KL(p(x_i) || p(x'_i))`` (TRADES, eq. 5); gradients through both p.

    x' is :class:`TradesAdversary`'s with the radius, steps and step size of ``settings``; labels and the weights
    ``alpha`` and ``beta`` play no part. The attack comes first, as in the released code. With ``awp`` the whole
    objective is taken at weights that were moved against it. Before ``adversarial_delay`` it is the clean loss alone.
    """
    if clock.epoch < settings.adversarial_delay:
        return clean_loss(model, x, y, settings)
    x_adv = trades_adversary(settings).craft(model, x, y, mode=mode_of_attack(settings))

    def parts(network: Model) -> tuple[Tensor, Tensor, Tensor]:
        logits, adv_logits = prediction(network, x, settings), prediction(network, x_adv, settings)
        divergence = kl_divergence(adv_logits, logits).mean()
        return label_loss(logits, y, settings) + settings.trades_beta * divergence, logits, adv_logits

    network: Model = against_weights(model, settings.awp, lambda f: parts(f)[0]) if settings.awp else model
    total, logits, adv_logits = parts(network)
    return with_consistency(losses_of_pair(total, logits, adv_logits, y), network, x_adv, adv_logits, settings)
