"""The settings of ``evaluate``, one source for Python, the command line and the record. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from learn2perturb.checks import check_choice, check_count, check_flag
from learn2perturb.configs import ENGINES, Config
from learn2perturb.errors import ConfigError, UnknownNameError

PREDICTORS = ("single", "vote", "mean_probability", "mean_logits")


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """How a network is attacked and scored: everything but the network, the images and the attacks themselves.

    A seed gives one number only with one batch size, one engine and one number of draws.

    Args:
        draws: scorings of the same images, each with fresh draws of the noise.
        predictor: ``single`` (one draw decides; the headline), ``vote`` (majority of ``members`` fresh draws, ties to
            the smallest class index), ``mean_probability`` or ``mean_logits`` of ``members`` draws, or several of them.
            An attack on an ensemble averages at least ``members`` draws of its probability or logits.
        members: passes that make one scoring of a predictor other than ``single``.
        eps: replaces the eps of every attack, [0, 1] pixel scale: 8/255; of several each gives a row. Numbers of pixels
            and infinite eps (minimum-norm attacks) stay. Steps that would exceed it shrink in proportion.
        noise_off: also give the rows of the same network with its noise switched off.
        clean: also give the rows of the images as they are.
        seed: of attacks and scoring; the same seed gives the same evaluation (and, for a model without noise and an
            attack without a random start, for every batch size).
        batch_size: images in one pass (a DataLoader keeps its own).
        limit: evaluate so many images only, balanced over the classes (the first ones of a loader of yours).
        engine: attacks are crafted in ``plain`` or ``fast32`` (float32), ``fast`` (bfloat16) or ``auto`` (the best
            of these where the work is long enough). Scoring is in float32, always.
    """

    draws: int = 10
    predictor: str | list[str] = "single"
    members: int = 10
    eps: float | list[float] | None = None
    noise_off: bool = True
    clean: bool = True
    seed: int = 0
    batch_size: int = 256
    limit: int | None = None
    engine: str = "plain"

    def __post_init__(self) -> None:
        for name in ("draws", "members", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("limit", self.limit, optional=True)
        check_seed(self.seed)
        check_flag("noise_off", self.noise_off)
        check_flag("clean", self.clean)
        check_choice("engine", self.engine, ENGINES)
        _ = self.predictors

    @property
    def predictors(self) -> tuple[str, ...]:
        """The predictors, each once."""
        if not isinstance(self.predictor, Iterable):
            raise ConfigError(f"predictor is {self.predictor!r}, must be one or more of {', '.join(PREDICTORS)}")
        asked = [self.predictor] if isinstance(self.predictor, str) else list(self.predictor)
        if not asked:
            raise ConfigError(f"predictor is an empty list, must be one or more of {', '.join(PREDICTORS)}")
        return tuple(dict.fromkeys(map(check_predictor, asked)))


def check_predictor(rule: str) -> str:
    """Return ``rule`` if it is known.

    Raises:
        UnknownNameError: it is not.
    """
    if rule not in PREDICTORS:
        raise UnknownNameError.of("predictor", rule, PREDICTORS)
    return rule


def check_seed(seed: object) -> None:
    """Raise ConfigError unless ``seed`` is a whole number of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}, must be a whole number >= 0; 0 is the default")
