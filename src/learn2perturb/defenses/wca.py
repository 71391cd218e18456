"""WCA-Net (Eustratiadis et al. 2021): correlated noise on the last features, aligned with the classifier's weights.

Weight-Covariance Alignment for Adversarially Robust Neural Networks, https://arxiv.org/abs/2010.08852.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_choice, check_flag
from learn2perturb.defenses.base import (
    Clock,
    Defense,
    Losses,
    Optimizers,
    Stage,
    check_without_adversary,
    learning_rate_factor,
    objective_loss,
    of_clean_images,
)
from learn2perturb.defenses.settings import OBJECTIVES, Settings
from learn2perturb.errors import SiteError
from learn2perturb.noise import CorrelatedNoise, insert, named_noise, noise_parameters
from learn2perturb.noise.base import SHARINGS
from learn2perturb.noise.correlated import VARIANCES
from learn2perturb.noise.sites import Probe, probe


@final
@dataclass(frozen=True, kw_only=True)
class WCA(Defense):
    """``h + L eps`` on the input of the classifier W; loss ``CE - log tr(W L L^T W^T)``, so that the noise cannot fade.

    The classifier is the network's last linear layer. Adam, whose learning rate is the setting ``lr``; the setting
    ``weight_decay`` is on L and the classifier only.

    Args:
        variance: ``anisotropic`` (L lower triangular) or ``isotropic`` (a diagonal).
        adversarial: train on the recipe's adversary (``wca_at``, the paper's variant with adversarial training).
        sharing: ``per_example`` draws, or ``per_batch`` as the released code.

    Raises:
        ConfigError: a value is not allowed.
    """

    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    own_optimizer: ClassVar[bool] = True

    variance: str = "anisotropic"
    adversarial: bool = False
    sharing: str = "per_example"

    def __post_init__(self) -> None:
        check_choice("variance", self.variance, VARIANCES)
        check_choice("sharing", self.sharing, SHARINGS)
        check_flag("adversarial", self.adversarial)

    def check(self, settings: Settings) -> None:
        """Refuse an objective with an adversary where there is none.

        Raises:
            ConfigError: ``objective`` or ``awp`` needs one.
        """
        super().check(settings)
        if not self.adversarial:
            check_without_adversary("WCA", settings, "wca_at")

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert the noise on what the last linear layer takes, in place.

        Raises:
            SiteError: the network has no linear layer, calls the last one more than once, or does not end in it.
        """
        seen = probe(network, input_shape)
        site = _classifier(seen)
        spec = {
            "kind": CorrelatedNoise.kind, "site": site, "place": "input", "sharing": self.sharing,
            "feature_shape": tuple(seen.calls[site].input.shape[1:]), "variance": self.variance,
        }  # fmt: skip
        return insert(network, [spec])

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return one stage of Adam, with the schedule of ``settings``."""
        return (Stage(settings.epochs, _adam(settings), learning_rate_factor(settings, settings.epochs)),)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the recipe's loss, or without ``adversarial`` the clean one, less ``log tr(W L L^T W^T)``."""
        settings = settings if self.adversarial else of_clean_images(settings)
        losses = objective_loss(model, x, y, clock, settings)
        classifier, noise = _aligned(model)
        weight = classifier.weight.to(noise.factor.dtype)
        alignment = torch.trace(weight @ noise.covariance() @ weight.T)
        total = losses.total - alignment.clamp_min(torch.finfo(weight.dtype).tiny).log()
        return replace(losses, total=total, extra={**losses.extra, "alignment": alignment.detach()})

    def after_step(self, model: nn.Module, clock: Clock) -> None:
        """Keep L lower triangular."""
        _aligned(model)[1].project()


def _classifier(seen: Probe) -> str:
    """Return the name of the linear layer that gives the logits, from what a pass was seen to do.

    Raises:
        SiteError: there is none that is called once and last.
    """
    linear = [name for name, call in seen.calls.items() if isinstance(call.module, nn.Linear)]
    if not linear:
        raise SiteError("the network has no linear layer, and WCA's noise goes before the last; use learn2perturb")
    last = linear[-1]
    if seen.calls[last].times > 1:
        raise SiteError(f"the last linear layer, {last!r}, is called more than once in a pass; WCA needs a classifier")
    return last


def _aligned(model: nn.Module) -> tuple[nn.Linear, CorrelatedNoise]:
    """Return the classifier and its noise.

    Raises:
        SiteError: the network is not as :meth:`WCA.prepare` left it.
    """
    found = [(site, noise) for site, noise in named_noise(model) if isinstance(noise, CorrelatedNoise)]
    if len(found) != 1:
        raise SiteError(f"the network has {len(found)} sites of correlated noise and WCA one; prepare a plain network")
    site, noise = found[0]
    layer = model.get_submodule(site)
    if not isinstance(layer, nn.Linear):
        raise SiteError(f"the noise of {site!r} is not before a linear layer; prepare a plain network")
    return layer, noise


def _adam(settings: Settings) -> Callable[[nn.Module], Optimizers]:
    """Return a builder of Adam: no weight decay but on the classifier and the noise."""

    def build(model: nn.Module) -> Optimizers:
        classifier, _ = _aligned(model)
        noise = noise_parameters(model)
        own = {id(parameter) for parameter in noise}
        last = [p for p in classifier.parameters() if p.requires_grad and id(p) not in own]
        own |= {id(parameter) for parameter in last}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        decay = settings.weight_decay
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": last, "weight_decay": decay}]
        weights = torch.optim.Adam([group for group in groups if group["params"]], lr=settings.lr)
        return {"weights": weights, "noise": torch.optim.Adam(noise, lr=settings.lr, weight_decay=decay)}

    return build
