"""The protocol of a defense: prepare the network, stages, loss, regulariser, what follows a step, how to predict.

A defense is a frozen dataclass whose fields are its options. It knows no network's class and no data set; a custom
defense is one file (see ``examples/own_defense.py``).
"""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, final

from torch import Tensor, nn

from learn2perturb.checks import check_choice
from learn2perturb.defenses.objectives import (
    Clock,
    Losses,
    forward,
    mixed_loss,
    objective_loss,
    prediction,
    trades_loss,
    training_adversary,
)
from learn2perturb.defenses.optimizers import Optimizers, learning_rate_factor, sgd_optimizers, warmed
from learn2perturb.defenses.settings import OBJECTIVES, Settings
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.registry import DEFENSES

# A custom defense imports all that it needs from this module.
__all__ = [
    "ALTERNATIONS", "Alternation", "Clock", "Defense", "Losses", "Optimizers", "Stage", "build_defense", "check_choice",
    "check_without_adversary", "of_clean_images",
    "forward", "learning_rate_factor", "list_defenses", "mixed_loss", "objective_loss", "prediction",
    "restarted_stages", "sgd_optimizers", "trades_loss", "training_adversary",
]  # fmt: skip

ALTERNATIONS = ("combined", "sequential", "released")


@final
@dataclass(frozen=True)
class Stage:
    """Epochs that share optimisers: fresh ones are built when the stage begins.

    Attributes:
        epochs: length of the stage.
        optimizers: builds them for the model; ``weights`` is required, ``noise`` holds the noise parameters, those of
            other names step with ``weights``.
        factor: what the base learning rate of every group is multiplied by at a clock.
    """

    epochs: int
    optimizers: Callable[[nn.Module], Optimizers]
    factor: Callable[[Clock], float]


@final
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
        noise_ascends: whether theta climbs the loss in place of descending it.
        regulariser_through_optimizer: whether the regulariser's gradient is scaled by the learning rate and joins
            the momentum, or is subtracted as it is (algorithm 1 read literally).
    """

    kind: str = "combined"
    weight_steps: int = 1
    noise_steps: int = 1
    noise_from_loss: bool = True
    noise_ascends: bool = field(default=False, kw_only=True)
    regulariser_through_optimizer: bool = True


def of_clean_images(settings: Settings) -> Settings:
    """Return ``settings`` without an adversary: the clean loss alone."""
    return replace(settings, alpha=1.0, beta=0.0)


def check_without_adversary(name: str, settings: Settings, other: str) -> None:
    """Refuse an objective that needs an adversary, for a defense ``name`` that has none; ``other`` is one that has.

    Raises:
        ConfigError: ``objective``, ``awp`` or ``consistency`` needs one.
    """
    if settings.objective != "mixed" or settings.awp or settings.consistency:
        raise ConfigError(
            f"objective is {settings.objective!r}, awp {settings.awp!r} and consistency {settings.consistency!r}, but "
            f"{name} trains on clean images; leave them out, or take {other!r}"
        )


def check_adversary(name: str, settings: Settings) -> None:
    """Refuse an adversary that does not move, for a defense ``name`` that is nothing without one.

    Raises:
        ConfigError: ``eps`` is 0.
    """
    if settings.eps == 0:
        raise ConfigError(f"eps is 0, so {name} has no adversary; set eps such as 8/255, or take 'none'")


def restarted_stages(settings: Settings, optimizers: Callable[[nn.Module], Optimizers]) -> tuple[Stage, ...]:
    """Return a stage for each learning rate of a ``step`` schedule, each with fresh optimisers from ``optimizers``.

    RSE and Adv-BNN are trained so: what differs from one stage is that momenta and moments start anew. Another
    schedule has no steps, so it is one stage.
    """
    epochs = settings.epochs
    if settings.schedule != "step":
        return (Stage(epochs, optimizers, learning_rate_factor(settings, epochs)),)
    edges = [0, *sorted({m for m in settings.milestones if 0 < m < epochs}), epochs]
    decay = settings.decay

    def constant(value: float) -> Callable[[Clock], float]:
        return warmed(settings, lambda clock: value)

    lengths = [end - start for start, end in itertools.pairwise(edges)]
    return tuple(Stage(length, optimizers, constant(decay**passed)) for passed, length in enumerate(lengths))


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A defense; subclasses add their options as fields and override what they need.

    Attributes:
        predictor: how the defense's own paper predicts: ``single``, ``vote``, ``mean_probability``, ``mean_logits``.
        members: passes that make one prediction of a predictor other than ``single``.
        objectives: the values of the setting ``objective`` that :meth:`loss` follows. Empty, or not declared by a class
            that overrides :meth:`loss`: a loss of the defense's own, which takes neither that setting nor ``awp``.
        own_optimizer: whether :meth:`stages` builds an optimiser of the defense's own, whatever the settings name.
    """

    predictor: ClassVar[str] = "single"
    members: ClassVar[int] = 10
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    own_optimizer: ClassVar[bool] = False

    def check(self, settings: Settings) -> None:
        """Refuse settings that make no sense with this defense, before any work.

        Raises:
            ConfigError: they do not.
        """
        kind = type(self).__name__
        # A subclass that overrides loss() without declaring objectives has its own loss: refuse what it would ignore.
        speaker = next(one for one in type(self).__mro__ if "loss" in vars(one) or "objectives" in vars(one))
        known = self.objectives if "objectives" in vars(speaker) else ()
        if settings.objective not in (known or OBJECTIVES[:1]):
            raise ConfigError(
                f"objective is {settings.objective!r}, but {kind} trains on "
                f"{' or '.join(map(repr, known)) or 'a loss of its own'}; leave it out, or take another defense"
            )
        for name in ("awp", "consistency"):
            if getattr(settings, name) and not known:
                raise ConfigError(
                    f"{name} is {getattr(settings, name)!r}, but {kind} has a loss of its own that takes none; leave "
                    "it out"
                )
            if getattr(settings, name) and settings.objective == "mixed" and not settings.beta:
                raise ConfigError(
                    f"{name} is {getattr(settings, name)!r}, but beta is 0: there is no adversarial loss; set beta or "
                    f"drop {name}"
                )
        if settings.loss != "single" and not known:
            raise ConfigError(
                f"loss is {settings.loss!r}, but {kind} has a loss of its own, of a single draw; leave it out"
            )
        if self.own_optimizer and (settings.optimizer != "sgd" or settings.optimizer_options):
            raise ConfigError(
                f"optimizer is {settings.optimizer!r}, but {kind} has its own, as its paper says; leave it and its "
                "options out"
            )

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert what the defense needs into ``network``, in place, and return it."""
        return network

    @property
    def measures(self) -> bool:
        """Whether :meth:`measure` has anything to set."""
        return False

    def measure(self, model: nn.Module, x: Tensor) -> None:
        """Set what follows from images (N, C, H, W), once, before the first step; the model is in train mode."""
        return

    def beside(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return networks that a training of ``model`` needs beside it, by name: saved to resume, no part of it."""
        return {}

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return the stages of a training; by default one, with SGD and the schedule of ``settings``."""
        epochs = settings.epochs
        return (Stage(epochs, sgd_optimizers(settings), learning_rate_factor(settings, epochs)),)

    def alternation(self) -> Alternation:
        """Return how weights and noise take turns."""
        return Alternation()

    def begin_step(self, model: nn.Module, clock: Clock) -> None:
        """Do what precedes a step: switch noise on at its epoch, follow a ramp. A function of the clock alone."""
        return

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the objective on one batch; the model is in train mode."""
        return objective_loss(model, x, y, clock, settings)

    def regulariser(self, model: nn.Module, clock: Clock) -> Tensor | None:
        """Return the term that only the noise parameters descend, less its weight, or None."""
        return None

    def regulariser_weight(self, clock: Clock) -> float:
        """Return what the regulariser is multiplied by at a clock: what a schedule changes belongs here."""
        return 1.0

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
