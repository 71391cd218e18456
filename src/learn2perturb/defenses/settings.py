"""The numbers of a training that every defense shares. Knows no torch, so that the command line starts fast."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, final

from learn2perturb.checks import check_choice, check_count, check_flag, check_step
from learn2perturb.errors import ConfigError

SCHEDULES = ("step", "one_cycle", "cosine", "constant")
LABELS = ("predicted", "true")
MODES = ("eval", "train")
OBJECTIVES = ("mixed", "trades")
ATTACK_DRAWS = ("fresh", "held")
PREDICTIONS = ("single", "averaged")
NORMS = ("linf", "l2")
# name -> class of torch.optim
OPTIMIZERS = {
    "sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam", "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Epochs, optimiser, learning-rate schedule and training adversary: what a defense trains by, with nothing open.

    Args:
        epochs: passes over the training set.
        batch_size: images in a step; the last, smaller batch of an epoch is trained on too.
        lr: learning rate of weights and of theta, at its highest; 0.001 where another optimizer than sgd is named.
        momentum: of both optimisers (sgd, rmsprop).
        nesterov: whether that momentum is Nesterov's.
        weight_decay: on the weights; theta has none.
        schedule: ``step`` (times ``decay`` at each of ``milestones``), ``one_cycle``, ``cosine`` or ``constant``.
        milestones: epochs at which ``step`` lowers the learning rate.
        decay: what it is multiplied by there.
        objective: ``mixed``, the clean and the adversarial loss with weights ``alpha`` and ``beta``; or ``trades``, the
            clean loss and ``trades_beta`` times KL(p(x) || p(x')), whose adversary maximises that KL.
        trades_beta: weight of that KL; ``mixed`` does not read it, and ``trades`` no ``alpha``, ``beta``, labels.
        alpha: weight of the clean loss (eq. 11); 0 trains on adversarial examples only (eq. 10).
        beta: weight of the adversarial loss (eq. 11).
        loss: what each term is the loss of: the answer of a ``single`` draw, or the ``averaged`` predictor, the mean
            softmax over ``loss_draws`` passes, which the adversary then attacks too (SmoothAdv).
        loss_draws: passes of the averaged predictor.
        eps: radius of the training adversary, in [0, 1] pixel scale (8/255 is 0.0314); in l2 it has to be given.
        attack_steps: PGD steps of the training adversary.
        attack_step_size: its step, in [0, 1] pixel scale.
        attack_random_start: whether it starts at a random point of the ball, or at the image.
        attack_eot: draws averaged in each of its gradients.
        attack_draws: ``fresh`` in each of its steps, or ``held`` through all of them, as randomised defenses are
            released; what the loss is taken of is drawn anew in either case.
        attack_labels: ``predicted`` (against label leaking, as the released code) or ``true``.
        attack_mode: BatchNorm while it attacks: ``eval`` or ``train``.
        adversarial_delay: epochs of clean training before the adversary starts.
        awp: adversarial weight perturbation: the loss is taken at weights moved against it by this share of each
            tensor's norm (0.01 in its paper, 0.005 with ``trades``); 0 is without.
        weight_average: decay of the average of weights and theta over steps, which is monitored, saved and returned in
            place of the last ones; 0 is without, 0.999 remembers about 1,000 steps.
        norm: of the training adversary's ball: ``linf`` or ``l2``.
        optimizer: ``sgd``, ``adam``, ``adamw``, ``nadam``, ``radam``, ``rmsprop`` or ``adagrad``, of weights and theta.
        optimizer_options: options of that class of torch.optim, such as ``{"betas": [0.9, 0.95]}``.
        warmup_epochs: epochs over which the learning rate rises from 0 to what the schedule says.
        clip_norm: largest norm of the gradient of all weights together; 0 is without. Theta's is left as it is.
        accumulate: parts that a batch is split into, one after the other, for memory; their gradients add up to that of
            the whole, BatchNorm sees a part.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).
        consistency: weight of the KL between the predictions of two draws for the adversarial images, the mean of both
            directions; of a network without noise it is 0.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: str
    milestones: list[int]
    decay: float
    objective: str
    trades_beta: float
    alpha: float
    beta: float
    loss: str
    loss_draws: int
    eps: float
    attack_steps: int
    attack_step_size: float
    attack_random_start: bool
    attack_eot: int
    attack_draws: str
    attack_labels: str
    attack_mode: str
    adversarial_delay: int
    awp: float
    weight_average: float
    # What came later, each with the value at which a training is what it was before there was such a setting.
    norm: str = "linf"
    optimizer: str = "sgd"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: float = 0.0
    clip_norm: float = 0.0
    accumulate: int = 1
    label_smoothing: float = 0.0
    consistency: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OpenSettings(ABC):
    """The fields of :class:`Settings`, each of which may be None: as the recipe says."""

    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    milestones: list[int] | None = None
    decay: float | None = None
    objective: str | None = None
    trades_beta: float | None = None
    alpha: float | None = None
    beta: float | None = None
    loss: str | None = None
    loss_draws: int | None = None
    eps: float | None = None
    attack_steps: int | None = None
    attack_step_size: float | None = None
    attack_random_start: bool | None = None
    attack_eot: int | None = None
    attack_draws: str | None = None
    attack_labels: str | None = None
    attack_mode: str | None = None
    adversarial_delay: int | None = None
    awp: float | None = None
    weight_average: float | None = None
    norm: str | None = None
    optimizer: str | None = None
    optimizer_options: dict[str, Any] | None = None
    warmup_epochs: float | None = None
    clip_norm: float | None = None
    accumulate: int | None = None
    label_smoothing: float | None = None
    consistency: float | None = None

    def check(self) -> None:
        """Check every value that is set.

        Raises:
            ConfigError: a value is not allowed; the message names it and what is.
        """
        for name, least in (
            ("epochs", 0), ("batch_size", 1), ("attack_steps", 1), ("attack_eot", 1), ("adversarial_delay", 0),
            ("loss_draws", 1), ("accumulate", 1),
        ):  # fmt: skip
            check_count(name, getattr(self, name), least, optional=True)
        largest = math.inf if self.norm == "l2" else 1.0
        for name, low, high in (
            ("lr", 0.0, math.inf), ("momentum", 0.0, 1.0), ("weight_decay", 0.0, math.inf), ("decay", 0.0, 1.0),
            ("alpha", 0.0, math.inf), ("beta", 0.0, math.inf), ("eps", 0.0, largest),
            ("attack_step_size", 0.0, largest), ("trades_beta", 0.0, math.inf), ("awp", 0.0, 1.0),
            ("weight_average", 0.0, 1.0), ("warmup_epochs", 0.0, math.inf), ("clip_norm", 0.0, math.inf),
            ("label_smoothing", 0.0, 1.0), ("consistency", 0.0, math.inf),
        ):  # fmt: skip
            number(name, getattr(self, name), low, high, optional=True)
        for name in ("nesterov", "attack_random_start"):
            check_flag(name, getattr(self, name), optional=True)
        if self.milestones is not None and not isinstance(self.milestones, (list, tuple)):
            raise ConfigError(f"milestones is {self.milestones!r}; it must be a list of epochs, such as [150, 250]")
        for milestone in self.milestones or ():
            check_count("an epoch of milestones", milestone, 0)
        check_choice("objective", self.objective, OBJECTIVES, optional=True)
        check_choice("schedule", self.schedule, SCHEDULES, optional=True)
        check_choice("loss", self.loss, PREDICTIONS, optional=True)
        check_choice("attack_draws", self.attack_draws, ATTACK_DRAWS, optional=True)
        check_choice("attack_labels", self.attack_labels, LABELS, optional=True)
        check_choice("attack_mode", self.attack_mode, MODES, optional=True)
        check_choice("norm", self.norm, NORMS, optional=True)
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS), optional=True)
        if not (self.optimizer_options is None or isinstance(self.optimizer_options, dict)):
            raise ConfigError(
                f"optimizer_options is {self.optimizer_options!r}; it must be a mapping such as {{'eps': 1e-8}}"
            )
        if self.label_smoothing == 1:
            raise ConfigError("label_smoothing is 1, so no label is left; it must be below 1, such as 0.1")
        if self.alpha == 0 and self.beta == 0:
            raise ConfigError("alpha and beta are both 0, so there is no loss; eq. 11 of the paper has 0.5 and 0.5")
        if self.objective == "trades" and self.trades_beta == 0:
            raise ConfigError(
                "trades_beta is 0, so objective 'trades' has no adversary; its paper has 6, or take 'none'"
            )
        if self.weight_average == 1:
            raise ConfigError("weight_average is 1, so the average never moves; it must be below 1, such as 0.999")
        if self.attack_step_size == 0 and self.eps != 0:
            raise ConfigError("attack_step_size is 0, so the adversary stands still; the paper has 0.01 (or set eps 0)")
        if self.attack_step_size and self.eps:
            check_step("attack_step_size", self.attack_step_size, self.eps, norm=self.norm or "linf")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs momentum above 0; set momentum 0.9 or nesterov false")

    def missing(self) -> list[str]:
        """Return the names of the settings that are still open; a recipe closes them all."""
        return [item.name for item in fields(Settings) if getattr(self, item.name) is None]

    def closed(self) -> Settings:
        """Return the settings, all of which are set.

        Raises:
            ConfigError: some are open.
        """
        if self.missing():
            raise ConfigError(f"{', '.join(self.missing())} are open; set them, or resolve() the config by a recipe")
        return Settings(**{item.name: getattr(self, item.name) for item in fields(Settings)})


def later_settings() -> dict[str, Any]:
    """Return the settings that came later, each with the value at which a training is what it was before."""
    found = {}
    for item in fields(Settings):
        if item.default is not MISSING:
            found[item.name] = item.default
        elif item.default_factory is not MISSING:
            found[item.name] = item.default_factory()
    return found


def number(name: str, value: Any, low: float, high: float, *, optional: bool = False) -> None:
    """Check a number.

    Raises:
        ConfigError: ``value`` is no number from ``low`` to ``high``, nor None where it is ``optional``.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value != value:
        in_pixels = name in ("eps", "attack_step_size")
        hint = "; it is in [0, 1] pixel scale: write 8/255 for eight grey levels" if in_pixels else ""
        bound = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a number {bound}{hint}")
