"""Learn2Perturb (Jeddi et al. 2020): learned feature noise, trained by alternating back-propagation.

``h <- h + theta * eps`` in training and inference (eqs. 3 to 5); the loss of eq. 11; the regulariser
``R = -(gamma / tau) sum sqrt(theta)`` (eqs. 7 and 8) keeps theta from shrinking to zero; theta is projected to at
least ``minimum`` (algorithm 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_count, check_flag
from learn2perturb.defenses.base import (
    ALTERNATIONS,
    Alternation,
    Clock,
    Defense,
    Stage,
    check_choice,
    learning_rate_factor,
    sgd_optimizers,
)
from learn2perturb.defenses.settings import Settings, number
from learn2perturb.errors import ConfigError
from learn2perturb.noise import Perturbation, feature_deviations, noise_modules, noise_parameters, perturb, set_noise

PLACEMENTS = ("block_ends", "every_convolution")
TAUS = ("harmonic", "released")
RELATIVE = "relative"


@final
@dataclass(frozen=True, kw_only=True)
class Learn2Perturb(Defense):
    """Learned noise with alternating back-propagation. Each field is one choice that paper and code leave open.

    Args:
        gamma: weight of the regulariser.
        noise_from_loss: whether theta sees the gradient of the loss; False is Learn2Perturb-R (section 4.1), whose
            noise follows the regulariser alone: a schedule, not learned.
        noise_ascends: whether theta climbs the loss in place of descending it: noise as an adversary, for which the
            weights are trained. With ``noise_target``, which says how much there is, the loss then puts it where it
            hurts most.
        noise_delay: epoch s at which the noise starts; before it, noise is off and theta frozen.
        theta_step: ``combined`` (algorithm 1), ``sequential`` (section 3.2), ``released`` (the released code's order).
        weight_steps: weight steps in a sequential iteration.
        noise_steps: theta steps in a sequential iteration.
        theta_lr: what theta's learning rate is, in units of the weights'; a large one lets the loss shape theta in a
            short training.
        noise_target: mean of theta, over all elements of all sites, that the regulariser holds it to, in place of
            pushing it up: ``R = (gamma / 2) n (mean(theta) - noise_target)^2``, n elements, no tau. The loss then
            decides where the noise is, and this how much there is. None is the paper's regulariser.
        gamma_through_optimizer: scale the regulariser's gradient by the learning rate and let it join the momentum;
            False subtracts it as it is (algorithm 1 read literally).
        tau: ``harmonic`` is H_{e-s+1}; ``released`` is H_{e-s}, and 1 where that is 0 (the released code divides by
            it).
        init: first value of every theta; ``relative`` is ``init_share`` of the standard deviation that the features of
            a site have on the first batch, for networks whose features are of other sizes than the paper's.
        init_share: that share.
        minimum: lower bound of theta.
        sharing: ``per_example`` draws, or ``per_batch`` as the released code.
        granularity: theta per ``element``, ``channel`` or ``layer``.
        distribution: ``gaussian``, ``laplace`` or ``uniform``.
        placement: ``block_ends`` (appendix A.1 and the code) or ``every_convolution`` (section 3.3).
        sites: glob or list of names in place of ``placement``.

    Raises:
        ConfigError: a value is not allowed.
    """

    gamma: float = 1e-4
    noise_from_loss: bool = True
    noise_ascends: bool = False
    noise_delay: int = 20
    theta_step: str = "combined"
    weight_steps: int = 1
    noise_steps: int = 1
    theta_lr: float = 1.0
    noise_target: float | None = None
    gamma_through_optimizer: bool = True
    tau: str = "harmonic"
    init: float | str = 0.25
    init_share: float = 0.25
    minimum: float = 0.01
    sharing: str = "per_example"
    granularity: str = "element"
    distribution: str = "gaussian"
    placement: str = "block_ends"
    sites: list[str] | str | None = None

    def __post_init__(self) -> None:
        check_choice("theta_step", self.theta_step, ALTERNATIONS)
        check_choice("tau", self.tau, TAUS)
        check_choice("placement", self.placement, PLACEMENTS)
        check_flag("noise_ascends", self.noise_ascends)
        if self.noise_ascends and not self.noise_from_loss:
            raise ConfigError("noise_ascends is true, but noise_from_loss false: theta sees no loss; leave one out")
        number("gamma", self.gamma, 0.0, math.inf)
        number("theta_lr", self.theta_lr, 0.0, math.inf)
        number("noise_target", self.noise_target, 0.0, math.inf, optional=True)
        for name, low in (("noise_delay", 0), ("weight_steps", 1), ("noise_steps", 1)):
            check_count(name, getattr(self, name), low)
        number("init_share", self.init_share, 0.0, math.inf)
        if isinstance(self.init, str) and self.init != RELATIVE:
            raise ConfigError(f"init is {self.init!r}; give a number such as 0.25, or {RELATIVE!r}")
        # The noise module knows which of its own values are allowed; ask it before any work is done.
        Perturbation(
            (1,), site="", granularity=self.granularity, sharing=self.sharing, distribution=self.distribution,
            init=self._first, minimum=self.minimum,
        )  # fmt: skip
        if self.gamma > 0 and not self.minimum > 0:
            raise ConfigError(
                f"minimum is {self.minimum!r}; with gamma above 0 it must be above 0, since the regulariser's slope, "
                "gamma / (2 tau sqrt(theta)), is infinite at 0 (the released code has 0.01)"
            )
        if self.theta_step != "sequential" and (self.weight_steps, self.noise_steps) != (1, 1):
            raise ConfigError(
                f"weight_steps : noise_steps is {self.weight_steps} : {self.noise_steps}, but theta_step "
                f"{self.theta_step!r} makes one step of each; set theta_step='sequential'"
            )
        self._check_target()

    def _check_target(self) -> None:
        if self.noise_target is None:
            return
        told = f"noise_target is {self.noise_target!r}, but"
        if self.noise_target < self.minimum:
            raise ConfigError(f"{told} theta is projected to at least minimum, {self.minimum!r}; raise the target")
        if self.gamma == 0:
            raise ConfigError(f"{told} gamma is 0, so nothing holds theta to it; set gamma, such as 1e-2")
        if self.tau != "harmonic":
            raise ConfigError(f"{told} tau is {self.tau!r}, which only the paper's regulariser has; leave tau out")

    @property
    def _first(self) -> float:
        """First value of theta, until the features are measured."""
        return max(0.25, self.minimum) if isinstance(self.init, str) else self.init

    @property
    def measures(self) -> bool:
        """Whether theta's first value follows from the features."""
        return self.init == RELATIVE

    def measure(self, model: nn.Module, x: Tensor) -> None:
        """Set theta's first value by the features of a batch, where ``init`` is ``relative``."""
        for noise, deviation in feature_deviations(model, x).items():
            with torch.no_grad():
                noise.theta.fill_(max(self.init_share * deviation, self.minimum))  # type: ignore[operator]

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert the noise, in place."""
        sites = self.sites
        if sites is None and self.placement == "every_convolution":
            sites = "@convolutions"
        return perturb(
            network, input_shape=input_shape, sites=sites, granularity=self.granularity,
            distribution=self.distribution, sharing=self.sharing, init=self._first, minimum=self.minimum,
        )  # fmt: skip

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return the one stage of the settings, with a learning rate of its own for theta."""
        epochs = settings.epochs
        optimizers = sgd_optimizers(settings, noise_lr=self.theta_lr)
        return (Stage(epochs, optimizers, learning_rate_factor(settings, epochs)),)

    def alternation(self) -> Alternation:
        """Return the chosen order of steps."""
        return Alternation(
            self.theta_step, self.weight_steps, self.noise_steps, self.noise_from_loss,
            noise_ascends=self.noise_ascends, regulariser_through_optimizer=self.gamma_through_optimizer,
        )  # fmt: skip

    def begin_step(self, model: nn.Module, clock: Clock) -> None:
        """Keep the noise off and theta frozen before ``noise_delay``."""
        on = clock.epoch >= self.noise_delay
        set_noise(model, on)
        for parameter in noise_parameters(model):
            parameter.requires_grad_(on)

    def regulariser(self, model: nn.Module, clock: Clock) -> Tensor | None:
        """Return ``-sum sqrt(theta)``, a sum over all elements of all sites; its weight is gamma / tau (eqs. 7 and 8).

        With ``noise_target`` it is ``(gamma / 2) n (mean(theta) - noise_target)^2``, whose slope is
        ``gamma (mean(theta) - noise_target)`` for every theta, and its weight 1.
        """
        if clock.epoch < self.noise_delay or self.gamma == 0:
            return None
        if self.noise_target is not None:
            total = torch.stack([parameter.sum() for parameter in noise_parameters(model)]).sum()
            count = sum(parameter.numel() for parameter in noise_parameters(model))
            return 0.5 * self.gamma * count * (total / count - self.noise_target) ** 2
        # All in one vector: on a GPU each operation on each site would be a launch of its own.
        theta = torch.cat([parameter.reshape(-1) for parameter in noise_parameters(model)])
        return -theta.sqrt().sum()

    def regulariser_weight(self, clock: Clock) -> float:
        """Return gamma / tau, which fades with the epochs."""
        return 1.0 if self.noise_target is not None else self.gamma / self.tau_at(clock.epoch)

    def tau_at(self, epoch: int) -> float:
        """Return tau at an epoch: a harmonic number, so that the regulariser fades (eq. 9, corrected).

        As printed, eq. 9 sums 1 / (i - s - 1) from i = 1: terms are negative before s and infinite at i = s + 1.
        """
        terms = epoch - self.noise_delay + (1 if self.tau == "harmonic" else 0)
        return math.fsum(1 / i for i in range(1, max(terms, 1) + 1))

    def after_step(self, model: nn.Module, clock: Clock) -> None:
        """Project theta to at least its minimum (algorithm 1)."""
        for module in noise_modules(model):
            module.project()

    def schedule_only(self, settings: Settings, batches: int) -> Iterator[float] | None:
        """Yield theta after each step if the regulariser alone moved it: Learn2Perturb-R.

        None where theta does not begin as one number, or its optimiser is not SGD.

        All thetas start equal and see equal gradients, so they stay one number; to first order
        ``theta^{3/2} = init^{3/2} + (3/4) sum lr gamma / ((1 - mu) tau)``, and with ``noise_target`` theta approaches
        that exponentially. Here the optimiser's own recurrence is run.
        """
        if self.measures or settings.optimizer != "sgd" or settings.optimizer_options:
            return None
        return self._scheduled(settings, batches, float(self.init))

    def _scheduled(self, settings: Settings, batches: int, theta: float) -> Iterator[float]:
        factor = self.stages(settings)[0].factor
        velocity, started = 0.0, False
        base, mu = self.theta_lr * settings.lr, settings.momentum
        target = self.noise_target
        # The share of the regulariser's gradient in each step of theta's optimiser within one iteration.
        shares = {"combined": [1.0], "sequential": [1.0] * self.noise_steps, "released": [1.0, 0.0]}[self.theta_step]
        for epoch in itertools.count():
            tau = self.tau_at(epoch)
            for batch in range(batches):
                lr = base * factor(Clock(epoch, batch, batches, stage_epoch=epoch))
                for share in shares if epoch >= self.noise_delay else ():
                    push = -1 / (2 * tau * math.sqrt(theta)) if target is None else theta - target
                    gradient = share * self.gamma * push
                    if self.gamma_through_optimizer:
                        velocity = mu * velocity + gradient if started else gradient
                        started = True
                        theta -= lr * (gradient + mu * velocity if settings.nesterov else velocity)
                    else:
                        theta -= gradient
                    theta = max(theta, self.minimum)
                yield theta
