"""Adv-BNN (Liu, Li, Wu, Hsieh 2018): a Bayesian network by variational inference, trained on adversarial examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_choice, check_count
from learn2perturb.defenses.base import (
    Clock,
    Defense,
    Losses,
    Optimizers,
    Stage,
    learning_rate_factor,
    objective_loss,
    restarted_stages,
)
from learn2perturb.defenses.settings import OBJECTIVES, Settings, number
from learn2perturb.errors import ConfigError
from learn2perturb.noise import VariationalWeight, kl_divergence, named_noise, noise_parameters, vary_weights
from learn2perturb.noise.sites import NORMS

MEAN_INITS = ("network", "released")


@final
@dataclass(frozen=True, kw_only=True)
class AdvBNN(Defense):
    """Weights ``w = mu + exp(s) * eps``; loss ``CE(f(x'), y) + (kl_weight / N) * sum KL``, N the training set's size.

    Variational are weights and biases of every convolution, linear layer and norm, and the KL from the prior
    N(0, prior^2) is that of all of them. A draw serves a batch in one forward pass; the adversary has a fresh one at
    every step. Adam, whose learning rate is the setting ``lr``; it has no weight decay, which is the prior's work.

    Args:
        prior: standard deviation sigma_0 of the prior.
        init: first standard deviation exp(s) of every weight.
        kl_weight: what the KL is multiplied by, beside 1/N; 1 is the evidence lower bound.
        mean_init: what mu starts from: the ``network`` as it is, or as the ``released`` code,
            U(+-1/sqrt(fan_in)) and in norms U(0, 1) with bias 0.
        stage_lengths: lengths of stages, in proportion: they are scaled to the epochs of the training. Each has a fresh
            Adam at ``decay`` times the learning rate of the one before. Empty: one stage, the recipe's schedule.

    Raises:
        ConfigError: a value is not allowed.
    """

    predictor: ClassVar[str] = "mean_probability"
    members: ClassVar[int] = 50
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    own_optimizer: ClassVar[bool] = True

    prior: float = 0.1
    init: float = 0.1
    kl_weight: float = 0.02
    mean_init: str = "network"
    stage_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prior", "init", "kl_weight"):
            number(name, getattr(self, name), 0.0, math.inf)
            if getattr(self, name) == 0 and name != "kl_weight":
                raise ConfigError(
                    f"{name} is 0; it is a standard deviation and must be above 0 (the released code: 0.1)"
                )
        check_choice("mean_init", self.mean_init, MEAN_INITS)
        if not isinstance(self.stage_lengths, (list, tuple)):
            raise ConfigError(f"stage_lengths is {self.stage_lengths!r}; it must be a list such as [80, 60, 40, 20]")
        for length in self.stage_lengths:
            check_count("a length of stage_lengths", length)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Make the network's weights posteriors, in place."""
        vary_weights(network, init=self.init, prior=self.prior)
        if self.mean_init == "released":
            _reset_means(network)
        return network

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return stages in the proportions of ``stage_lengths``, or one with the schedule of ``settings``."""
        epochs = settings.epochs
        if not self.stage_lengths:
            return (Stage(epochs, _adam(settings), learning_rate_factor(settings, epochs)),)
        total = sum(self.stage_lengths)
        # Rounded up: of very few epochs, the first and longest stage keeps its share, and the last ones vanish.
        edges = [-(-epochs * done // total) for done in itertools.accumulate(self.stage_lengths)]
        return restarted_stages(replace(settings, schedule="step", milestones=edges), _adam(settings))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the recipe's loss (adversarial only, as published) plus the KL's share of one example."""
        losses = objective_loss(model, x, y, clock, settings)
        kl = kl_divergence(model)
        examples = clock.examples or clock.batches * len(y)
        total = losses.total + self.kl_weight / examples * kl
        return replace(losses, total=total, extra={**losses.extra, "kl": kl.detach()})


def _adam(settings: Settings) -> Callable[[nn.Module], Optimizers]:
    """Return a builder of Adam for means and standard deviations; Adam is element-wise, so two are as one."""

    def build(model: nn.Module) -> Optimizers:
        noise = noise_parameters(model)
        known = {id(parameter) for parameter in noise}
        means = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        if not means:
            raise ConfigError("the network has no parameter that requires a gradient; there is nothing to train")
        groups = {"weights": means, "noise": noise}
        lr, decay = settings.lr, settings.weight_decay
        return {
            name: torch.optim.Adam(group, lr=lr, weight_decay=decay if name == "weights" else 0.0)
            for name, group in groups.items()
        }

    return build


@torch.no_grad()
def _reset_means(network: nn.Module) -> None:
    """Start the means as the released code does; fan_in is the number of weights that make one output."""
    for site, noise in named_noise(network):
        if not isinstance(noise, VariationalWeight):
            continue
        layer = network.get_submodule(site)
        means = {tensor: chain.original for tensor, chain in layer.parametrizations.items()}  # type: ignore[union-attr, operator]
        if not means[noise.place].requires_grad:
            continue  # frozen by its owner
        if not isinstance(layer, NORMS):
            bound = 1 / math.sqrt(means["weight"][0].numel())
            means[noise.place].uniform_(-bound, bound)
        elif noise.place == "weight":
            means[noise.place].uniform_(0, 1)
        else:
            means[noise.place].zero_()
