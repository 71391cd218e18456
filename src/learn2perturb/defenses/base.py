"""The protocol of a defense: prepare the network, stages, loss, regulariser, what follows a step, how to predict.

A defense is a frozen dataclass whose fields are its options. It knows no network's class and no data set; a defense of
one's own is one file (see ``examples/own_defense.py``).
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.attacks import PGD
from learn2perturb.defenses.settings import Settings, one_of
from learn2perturb.engine import gears
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.noise import noise_parameters
from learn2perturb.registry import DEFENSES

ALTERNATIONS = ("combined", "sequential", "released")
Optimizers = dict[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class Clock:
    """Where a training stands: everything that schedules may depend on, all counted from 0.

    Attributes:
        epoch: of the whole training.
        batch: within the epoch.
        batches: batches in an epoch.
        stage: index of the stage.
        stage_epoch: epoch within the stage.
    """

    epoch: int
    batch: int
    batches: int
    stage: int = 0
    stage_epoch: int = 0

    @property
    def step(self) -> int:
        """Number of the step since the start of the training."""
        return self.epoch * self.batches + self.batch


@dataclass(frozen=True)
class Stage:
    """Epochs that share optimisers: fresh ones are built when the stage begins.

    Attributes:
        epochs: length of the stage.
        optimizers: builds them for the model; ``weights`` is required, ``noise`` holds the noise parameters.
        factor: what the base learning rate of every group is multiplied by at a clock.
    """

    epochs: int
    optimizers: Callable[[nn.Module], Optimizers]
    factor: Callable[[Clock], float]


@dataclass(frozen=True)
class Alternation:
    """How weights and noise take turns in an iteration (Learn2Perturb, section 3.2 and algorithm 1).

    Attributes:
        kind: ``combined`` steps both from gradients at the same point (algorithm 1); ``sequential`` makes
            ``weight_steps`` steps of the weights, then ``noise_steps`` of theta at the updated weights (the text of
            3.2); ``released`` steps theta on the regulariser first, then both on the loss, as the released code.
        weight_steps: steps of the weights in a ``sequential`` iteration.
        noise_steps: steps of theta in a ``sequential`` iteration.
        noise_from_loss: whether theta sees the gradient of the loss (not in Learn2Perturb-R).
        regulariser_through_optimizer: whether the regulariser's gradient is scaled by the learning rate and joins
            the momentum, or is subtracted as it is (algorithm 1 read literally).
    """

    kind: str = "combined"
    weight_steps: int = 1
    noise_steps: int = 1
    noise_from_loss: bool = True
    regulariser_through_optimizer: bool = True


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


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Return float32 logits of ``x`` in the current gear."""
    with gears.autocast(x.device.type):
        logits: Tensor = model(x)
    return logits.float()


def training_adversary(settings: Settings) -> PGD:
    """Return the PGD attack that crafts training examples."""
    return PGD(
        eps=settings.eps or 0.0,
        step_size=settings.attack_step_size or 0.01,
        steps=settings.attack_steps or 1,
        eot=settings.attack_eot or 1,
    )


def mixed_loss(model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
    """Return ``alpha CE(f(x), y) + beta CE(f(x'), y)``, x' by PGD (Learn2Perturb, eq. 11; eq. 10 when alpha is 0).

    Before ``adversarial_delay`` it is the clean loss alone. The clean pass comes first, in train mode, as in the
    released code, so the attack sees BatchNorm statistics that this batch has already moved.
    """
    attacked = clock.epoch >= (settings.adversarial_delay or 0)
    if not attacked or settings.beta == 0:
        logits = forward(model, x)
        loss = F.cross_entropy(logits, y)
        return Losses(loss, clean=loss.detach(), clean_correct=logits.detach().argmax(1) == y)
    clean = correct = None
    labels = y
    total = torch.zeros((), device=x.device)
    if settings.alpha or settings.attack_labels == "predicted":
        logits = forward(model, x)
        clean = F.cross_entropy(logits, y)
        guessed = logits.detach().argmax(1)
        correct = guessed == y
        labels = guessed if settings.attack_labels == "predicted" else y
        if settings.alpha:
            total = settings.alpha * clean
        clean = clean.detach()
    mode: Literal["eval", "train"] = "train" if settings.attack_mode == "train" else "eval"
    x_adv = training_adversary(settings).craft(model, x, labels, mode=mode)
    adv_logits = forward(model, x_adv)
    adversarial = F.cross_entropy(adv_logits, y)
    return Losses(
        total + (settings.beta or 0.0) * adversarial,
        clean=clean,
        adversarial=adversarial.detach(),
        clean_correct=correct,
        adversarial_correct=adv_logits.detach().argmax(1) == y,
    )


def learning_rate_factor(settings: Settings, total_epochs: int) -> Callable[[Clock], float]:
    """Return the schedule of ``settings`` over ``total_epochs``: a function of the clock alone, without state."""

    def factor(clock: Clock) -> float:
        if settings.schedule == "step":
            passed = sum(clock.stage_epoch >= milestone for milestone in settings.milestones or ())
            return float((0.1 if settings.decay is None else settings.decay) ** passed)
        done = (clock.stage_epoch + (clock.batch + 1) / clock.batches) / max(total_epochs, 1)
        if settings.schedule == "one_cycle":
            rise = 0.3
            return max(min(done / rise, (1 - done) / (1 - rise)), 1e-3)
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1.0

    return factor


def sgd_optimizers(settings: Settings) -> Callable[[nn.Module], Optimizers]:
    """Return a builder of SGD for the weights and, where there is learned noise, for it: no weight decay on theta."""

    def build(model: nn.Module) -> Optimizers:
        noise = noise_parameters(model)
        known = {id(parameter) for parameter in noise}
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        if not weights:
            raise ConfigError("the network has no parameter that requires a gradient; there is nothing to train")
        common: dict[str, Any] = {
            "lr": settings.lr or 0.0, "momentum": settings.momentum or 0.0, "nesterov": bool(settings.nesterov),
        }  # fmt: skip
        optimizers: Optimizers = {
            "weights": torch.optim.SGD(weights, weight_decay=settings.weight_decay or 0.0, **common)
        }
        if noise:
            optimizers["noise"] = torch.optim.SGD(noise, weight_decay=0.0, **common)
        return optimizers

    return build


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A defense; subclasses add their options as fields and override what they need.

    Attributes:
        predictor: how the defense's own paper predicts: ``single``, ``vote``, ``mean_probability``, ``mean_logits``.
    """

    predictor: ClassVar[str] = "single"

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert what the defense needs into ``network``, in place, and return it."""
        return network

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return the stages of a training; by default one, with SGD and the schedule of ``settings``."""
        epochs = settings.epochs or 0
        return (Stage(epochs, sgd_optimizers(settings), learning_rate_factor(settings, epochs)),)

    def alternation(self) -> Alternation:
        """Return how weights and noise take turns."""
        return Alternation()

    def begin_step(self, model: nn.Module, clock: Clock) -> None:
        """Do what precedes a step: switch noise on at its epoch, follow a ramp. A function of the clock alone."""
        return

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the objective on one batch; the model is in train mode."""
        return mixed_loss(model, x, y, clock, settings)

    def regulariser(self, model: nn.Module, clock: Clock) -> Tensor | None:
        """Return the term that only the noise parameters descend, or None."""
        return None

    def after_step(self, model: nn.Module, clock: Clock) -> None:
        """Do what follows a step of the optimisers: projections, sensitivity control."""
        return

    def schedule_only(self, settings: Settings, batches: int) -> Iterator[float] | None:
        """Yield, step by step, the noise scale that the regulariser alone would give; None where there is none."""
        return None


def build_defense(name: str, options: Mapping[str, Any] | None = None) -> Defense:
    """Build the registered defense ``name`` with its ``options``.

    Raises:
        UnknownNameError: no defense, or no option of it, has that name.
        ConfigError: an option has a value that is not allowed.
    """
    entry = DEFENSES.entry(name)
    kind = entry.load()
    known = {item.name for item in fields(kind)}
    for option in options or {}:
        if option not in known:
            raise UnknownNameError.of(f"option of defense {entry.name!r}:", option, known or {"(it has none)"})
    defense: Defense = kind(**{**entry.arguments, **(options or {})})
    return defense


def list_defenses(pattern: str = "*") -> list[str]:
    """Return the names of the registered defenses that match the glob ``pattern``."""
    return DEFENSES.names(pattern)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check an option of a defense.

    Raises:
        ConfigError: ``value`` is not among ``allowed``.
    """
    one_of(name, str(value), allowed)
