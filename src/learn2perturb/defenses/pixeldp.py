"""PixelDP (Lecuyer et al. 2018): one noise layer whose size follows from a bound on what comes before it.

Noise of standard deviation ``sigma = D L sqrt(2 ln(1.25 / delta)) / epsilon`` after the first convolution makes the
network's expected answer (epsilon, delta) differentially private in the image, for changes of l2 norm up to L; D is the
sensitivity of what comes before the noise. Such an answer cannot change much, which gives a certificate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_count, check_flag
from learn2perturb.defenses.base import (
    Clock,
    Defense,
    Losses,
    Optimizers,
    Stage,
    check_choice,
    mixed_loss,
    of_clean_images,
    sgd_optimizers,
)
from learn2perturb.defenses.settings import Settings, number
from learn2perturb.engine.weights import advice, maker
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise import Perturbation, noise_modules, noise_sites, perturb
from learn2perturb.noise.sensitivity import checked_convolution, overlap, sensitivity
from learn2perturb.noise.sites import convolutions, probe

MECHANISMS = ("gaussian", "laplace")
SENSITIVITIES = ("measured", "assumed")


def noise_deviation(
    sensitivity: float = 1.0,
    *,
    bound: float = 0.1,
    epsilon: float = 1.0,
    delta: float = 0.05,
    mechanism: str = "gaussian",
) -> float:
    """Return the standard deviation of PixelDP's noise.

    ``gaussian``: ``D L sqrt(2 ln(1.25 / delta)) / epsilon``. ``laplace``: ``sqrt(2) D L / epsilon``, the deviation of
    Laplace noise of scale ``D L / epsilon``; D and L are then in the l1 norm, and delta is 0.
    """
    factor = math.sqrt(2 * math.log(1.25 / delta)) if mechanism == "gaussian" else math.sqrt(2)
    return sensitivity * bound * factor / epsilon


def noise_ramp(step: int) -> float:
    """Return the share of the noise at a training step: ``s = 1 - min(0.99975^step, 0.9)``, and 1 once s > 0.9."""
    share = 1 - min(0.99975**step, 0.9)
    return 1.0 if share > 0.9 else share


@torch.no_grad()
def parseval(weight: Tensor, loops: int, step: float) -> Tensor:
    """Return W (outputs, ...) after ``loops`` times ``W <- (1 + b) W - b W W^T W``: singular values move towards 1.

    Cisse et al., Parseval networks, 2017; W is the kernel reshaped to a matrix, b is ``step``.
    """
    matrix = weight.flatten(1)
    for _ in range(loops):
        matrix = (1 + step) * matrix - step * (matrix @ matrix.T @ matrix)
    return matrix.view_as(weight)


@final
@dataclass(frozen=True, kw_only=True)
class PixelDP(Defense):
    """One noise layer on the output of the first convolution, before norm and activation; trained on clean images.

    Of the stored kernel K, ``W = ceil(k / stride) K`` is what the paper calls the kernel, and the network divides it:
    then D is the largest singular value of W, times the scale of the normalisation inside the network. Parseval steps
    after each step of the optimiser hold it near 1. The optimiser steps W: for K that is a learning rate divided, and
    a weight decay multiplied, by ``ceil(k / stride)^2``. The answer is the mean softmax over draws.

    Args:
        bound: L, the norm of the changes that the noise is made for, in [0, 1] pixel scale; l2 (``laplace``: l1).
        epsilon: of the differential privacy.
        delta: of the differential privacy (``gaussian``).
        mechanism: ``gaussian`` noise for l2, or ``laplace`` noise for l1 changes.
        sensitivity: sigma follows the ``measured`` D after each step, or D is ``assumed`` to be 1, as in the released
            code, where the measured one enters the certificate alone.
        parseval_loops: Parseval steps after each step of the optimiser (``gaussian``).
        parseval_step: b of a Parseval step.
        ramp: let the noise grow from a tenth to all of it in the first steps of the training, about 9,200.

    Raises:
        ConfigError: a value is not allowed.
    """

    predictor: ClassVar[str] = "mean_probability"
    members: ClassVar[int] = 50
    objectives: ClassVar[tuple[str, ...]] = ()

    bound: float = 0.1
    epsilon: float = 1.0
    delta: float = 0.05
    mechanism: str = "gaussian"
    sensitivity: str = "measured"
    parseval_loops: int = 10
    parseval_step: float = 3e-4
    ramp: bool = True

    def __post_init__(self) -> None:
        check_choice("mechanism", self.mechanism, MECHANISMS)
        check_choice("sensitivity", self.sensitivity, SENSITIVITIES)
        for name, high in (("bound", math.inf), ("epsilon", math.inf), ("delta", 1.0), ("parseval_step", 1.0)):
            number(name, getattr(self, name), 0.0, high)
        if self.epsilon <= 0 or not 0 < self.delta < 1:
            raise ConfigError(
                f"epsilon is {self.epsilon!r} and delta {self.delta!r}; epsilon must be above 0, delta between 0 and 1"
            )
        check_count("parseval_loops", self.parseval_loops, 0)
        check_flag("ramp", self.ramp)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Divide the first convolution's kernel and insert the noise after it, in place.

        Raises:
            SiteError: there is no convolution, or the sensitivity of the first one is not known.
        """
        names = convolutions(probe(network, input_shape))
        if not names:
            raise SiteError(
                "the network has no convolution, and PixelDP's noise goes after the first; use learn2perturb"
            )
        first = checked_convolution(network.get_submodule(names[0]), names[0])
        if made := maker(first, "weight"):
            raise SiteError(
                f"the first convolution, {names[0]!r}, gets its weight from {made}, and PixelDP must set it; make it a "
                f"parameter first: {advice(first, 'weight')}"
            )
        if not first.weight.requires_grad:
            raise SiteError(
                f"the first convolution, {names[0]!r}, is frozen, and PixelDP must hold its sensitivity near 1; let it "
                "train: layer.requires_grad_(True), or take another defense"
            )
        with torch.no_grad():
            first.weight.div_(self._divisor(first))
        perturb(
            network, input_shape=input_shape, sites=names[:1], granularity="layer", distribution=self.mechanism,
            init=self._deviation(network, first, check=True), minimum=0.0, learned=False,
        )  # fmt: skip
        return network

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return one stage of SGD in which the first kernel steps as if it were W."""
        plain = sgd_optimizers(settings)

        def build(model: nn.Module) -> Optimizers:
            optimizers = plain(model)
            first, _ = self._layer(model)
            square = self._divisor(first) ** 2
            (group,) = optimizers["weights"].param_groups
            group["params"] = [parameter for parameter in group["params"] if parameter is not first.weight]
            optimizers["weights"].add_param_group(
                {"params": [first.weight], "lr": group["lr"] / square, "weight_decay": group["weight_decay"] * square}
            )
            return optimizers

        return tuple(replace(stage, optimizers=build) for stage in super().stages(settings))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the cross-entropy under the noise of this step of the ramp.

        The ramp lasts for the passes of the loss only, so that scores and checkpoints always have the whole noise.
        """
        _, noise = self._layer(model)
        deviation = noise.theta.item()
        with torch.no_grad():
            noise.theta.mul_(noise_ramp(clock.step) if self.ramp else 1.0)
        try:
            losses = mixed_loss(model, x, y, clock, of_clean_images(settings))
        finally:
            noise.theta.data.fill_(deviation)
        return replace(losses, extra={"noise_deviation": torch.tensor(deviation)})

    @torch.no_grad()
    def after_step(self, model: nn.Module, clock: Clock) -> None:
        """Hold the sensitivity near 1 by Parseval steps, and fit the noise to what it is now."""
        first, noise = self._layer(model)
        if self.mechanism == "gaussian":
            divisor = self._divisor(first)
            first.weight.copy_(parseval(divisor * first.weight, self.parseval_loops, self.parseval_step) / divisor)
        noise.theta.fill_(self._deviation(model, first, check=False))

    def _divisor(self, convolution: nn.Conv2d) -> float:
        """What the kernel is divided by: the l1 sensitivity needs no such thing."""
        return overlap(convolution) if self.mechanism == "gaussian" else 1.0

    def _deviation(self, model: nn.Module, convolution: nn.Conv2d, *, check: bool) -> float:
        """Return the standard deviation of the noise for the kernel as it is."""
        norm = "l2" if self.mechanism == "gaussian" else "l1"
        measured = sensitivity(model, convolution, norm, check=check)
        return noise_deviation(
            float(measured) if self.sensitivity == "measured" else 1.0,
            bound=self.bound, epsilon=self.epsilon, delta=self.delta, mechanism=self.mechanism,
        )  # fmt: skip

    def _layer(self, model: nn.Module) -> tuple[nn.Conv2d, Perturbation]:
        """Return the convolution that is perturbed, and its noise."""
        (site, *_), (noise, *_) = noise_sites(model), noise_modules(model)
        if not isinstance(noise, Perturbation):
            raise SiteError(
                f"the noise of {site!r} is a {type(noise).__name__}, not PixelDP's; prepare a plain network"
            )
        return checked_convolution(model.get_submodule(site), site), noise
