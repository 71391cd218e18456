"""Noise on weights, through ``torch.nn.utils.parametrize``: any network, no layer classes of our own.

``PNI``: ``w~ = w + alpha * eta``, ``eta ~ N(0, std(w)^2)``. ``Adv-BNN``: ``w~ = mu + exp(s) * eps``, ``eps ~ N(0, 1)``.

A weight is drawn when its layer reads it: once for each call of the layer, as in the code of both papers, so once in a
forward pass unless the pass calls the layer again (``parametrize.cached()`` then holds one draw). All images of a batch
share a draw.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from learn2perturb.checks import check_choice
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.distributions import draw, draw_seeded, is_channels_last
from learn2perturb.noise.feature import GRANULARITIES, map_shape, spread


def _positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not (0 <= value < math.inf) or (value == 0 and not or_zero):
        raise ConfigError(
            f"{name} is {value!r}; it must be a number {'at least' if or_zero else 'above'} 0, such as 0.1"
        )
    return float(value)


# --- copies of a parametrised layer ---------------------------------------------------------------------------------
#
# PyTorch gives a parametrised layer a class of its own, refuses to pickle it, and lets deep copies share that class, so
# that removing a parametrisation from the copy breaks the original. A copy made here gets a class of its own.


def _rebuilt(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    return _parametrized(kind.__new__(kind), state)


def _parametrized(layer: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Fill a blank layer of the plain class from the ``__dict__`` of a parametrised one, and parametrise it too."""
    state = {**state, "_modules": dict(state["_modules"]), "_parameters": dict(state["_parameters"])}
    lists = state["_modules"].pop("parametrizations")
    layer.__dict__.update(state)
    for tensor, chain in lists.items():
        layer.register_parameter(tensor, chain.original)
        for noise in chain:
            parametrize.register_parametrization(layer, tensor, noise, unsafe=True)
    return _made_copyable(layer)


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    return _rebuilt, (parametrize.type_before_parametrizations(self), self.__dict__)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kind: type[nn.Module] = parametrize.type_before_parametrizations(self)
    twin = memo[id(self)] = kind.__new__(kind)
    return _parametrized(twin, copy.deepcopy(self.__dict__, memo))


def _made_copyable(layer: nn.Module) -> nn.Module:
    for name, method in (("__reduce_ex__", _reduce), ("__deepcopy__", _deepcopy)):
        setattr(type(layer), name, method)
    return layer


# --- the noise ------------------------------------------------------------------------------------------------------


class WeightNoise(NoiseModule):
    """What noise on one tensor of one layer has in common: a parametrisation whose ``original`` is the plain weight.

    Args:
        shape: of the tensor.
        site: name of the layer.
        tensor: its parameter, ``weight`` or ``bias``.
    """

    def __init__(self, shape: Iterable[int], *, site: str, tensor: str) -> None:
        super().__init__(site)
        self.shape = tuple(shape)
        self.tensor = tensor
        self._order: list[str] = []
        self._kept: tuple[int, Tensor] | None = None

    @abstractmethod
    def noisy(self, weight: Tensor) -> Tensor:
        """Return the perturbed weight, from a fresh (or replayed) draw."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the perturbed weight, or ``weight`` itself when switched off."""
        return self.noisy(weight) if self.enabled else weight

    @torch.no_grad()
    def draw(self, weight: Tensor) -> Tensor:
        """Draw from N(0, 1) in the type and memory layout of ``weight``; replayed, a function of seed and tensor."""
        if self.replay is None:
            layout = is_channels_last(weight)
            return draw("gaussian", weight.shape, weight.device, channels_last=layout).to(weight.dtype)
        if self._kept is None or self._kept[0] != self.replay:
            seed = derive_seed(self.replay, "noise", self.site, self.tensor)
            self._kept = (self.replay, draw_seeded("gaussian", self.shape, seed))
        return self._kept[1].to(weight)

    def forget(self) -> None:
        """Drop the replayed draw that is kept."""
        self._kept = None

    @property
    def path(self) -> str:
        """Its name below its layer: where PyTorch keeps a parametrisation."""
        return f"parametrizations.{self.tensor}.0"

    @property
    def moved(self) -> dict[str, str]:
        """The plain weight, which PyTorch keeps under another name while it is parametrised."""
        return {self.tensor: f"parametrizations.{self.tensor}.original"}

    def refusal(self, parent: nn.Module) -> str | None:
        """Refuse a layer whose tensor is not there, is made by something else, or has another shape."""
        if parametrize.is_parametrized(parent, self.tensor):
            return f"has a parametrised {self.tensor} already; call remove_noise(network), or remove_parametrizations"
        own = parent._parameters.get(self.tensor)
        if own is None:
            return f"({type(parent).__name__}) has no parameter {self.tensor!r} of its own; choose a layer that has"
        if tuple(own.shape) != self.shape:
            return (
                f"has a {self.tensor} of shape {tuple(own.shape)}, the noise was made for {self.shape}; mend the spec"
            )
        return None

    def attach(self, parent: nn.Module) -> None:
        """Parametrise the tensor of ``parent``."""
        self._order = list(parent._parameters)
        self.to(parent._parameters[self.tensor].dtype)  # type: ignore[union-attr]
        # unsafe: without PyTorch's check, which would draw.
        parametrize.register_parametrization(parent, self.tensor, self, unsafe=True)
        _made_copyable(parent)

    def detach(self, parent: nn.Module) -> None:
        """Give ``parent`` its plain tensor back, at its place among the parameters."""
        parametrize.remove_parametrizations(parent, self.tensor, leave_parametrized=False)
        own = parent._parameters
        for name in [name for name in self._order if name in own]:
            own[name] = own.pop(name)

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the noise; the plain weight is none of them."""
        return list(self.parameters())

    def spec(self) -> dict[str, Any]:
        """Return the arguments that build this module again."""
        place = {"kind": self.kind, "shape": list(self.shape), "site": self.site, "tensor": self.tensor}
        return place | {name: getattr(self, name) for name in self._spec} | {"enabled": self.enabled}

    _spec: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_spec(cls, arguments: dict[str, Any]) -> WeightNoise:
        """Return a module of this description."""
        return cls(**arguments)


class WeightPerturbation(WeightNoise):
    """PNI (He, Rakin, Fan 2019): ``w + alpha * eta``, ``eta ~ N(0, std(w)^2)``.

    The standard deviation is that of the whole tensor (unbiased) and a constant to autograd: the gradient of w passes
    unchanged, that of alpha is ``sum(grad * eta)``. Alpha is not constrained in sign.

    Args:
        shape: of the tensor.
        site: name of the layer.
        tensor: its parameter.
        granularity: alpha per ``layer`` (one number), ``channel`` (output channel) or ``element``.
        init: first value of alpha.
        channel_dim: index of the output channels: 0, or 1 in transposed convolutions.

    Raises:
        ConfigError: a choice is unknown, or init is below 0.
    """

    kind: ClassVar[str] = "weight"
    _spec = ("granularity", "init", "channel_dim")

    def __init__(
        self,
        shape: Iterable[int],
        *,
        site: str,
        tensor: str = "weight",
        granularity: str = "layer",
        init: float = 0.25,
        channel_dim: int = 0,
    ) -> None:
        super().__init__(shape, site=site, tensor=tensor)
        check_choice("granularity", granularity, GRANULARITIES)
        self.granularity = granularity
        self.init = _positive("alpha's init", init, or_zero=True)
        self.channel_dim = channel_dim
        self.alpha = nn.Parameter(torch.full(map_shape(self.shape, granularity, channel_dim), self.init))

    def noisy(self, weight: Tensor) -> Tensor:
        """Return ``w + alpha * eta``."""
        return torch.addcmul(weight, self.alpha, self.draw(weight) * spread(weight))

    def scale(self) -> tuple[str, Tensor]:
        """Return |alpha|."""
        return "alpha", self.alpha.abs()

    def extra_repr(self) -> str:
        """Show what alpha is for."""
        return f"{self.tensor}, alpha {tuple(self.alpha.shape)}"


class VariationalWeight(WeightNoise):
    """A Gaussian posterior over a tensor (Adv-BNN, Liu, Li, Wu, Hsieh 2018): ``mu + exp(s) * eps``, eps ~ N(0, 1).

    mu is the plain weight, so with the noise off, or removed, the network computes with the posterior's mean.

    Args:
        shape: of the tensor.
        site: name of the layer.
        tensor: its parameter.
        init: first standard deviation, exp(s).
        prior: standard deviation sigma_0 of the prior N(0, sigma_0^2).

    Raises:
        ConfigError: a standard deviation is not above 0.
    """

    kind: ClassVar[str] = "variational"
    _spec = ("init", "prior")

    def __init__(
        self, shape: Iterable[int], *, site: str, tensor: str = "weight", init: float = 0.1, prior: float = 0.1
    ) -> None:
        super().__init__(shape, site=site, tensor=tensor)
        self.init, self.prior = _positive("init", init), _positive("prior", prior)
        self.log_std = nn.Parameter(torch.full(self.shape, math.log(self.init)))

    def noisy(self, weight: Tensor) -> Tensor:
        """Return ``mu + exp(s) * eps``: the reparametrisation, through which both learn."""
        return torch.addcmul(weight, self.log_std.exp(), self.draw(weight))

    def kl(self, mean: Tensor) -> Tensor:
        """Return KL(N(mean, exp(s)^2) || N(0, sigma_0^2)), summed over the tensor.

        Per weight ``log sigma_0 - s + (exp(2s) + mu^2) / (2 sigma_0^2) - 1/2``.
        """
        squares = ((2 * self.log_std).exp() + mean.square()).sum()
        nats = math.log(self.prior) - 0.5
        return nats * mean.numel() - self.log_std.sum() + squares / (2 * self.prior**2)

    def scale(self) -> tuple[str, Tensor]:
        """Return exp(s), the posterior's standard deviation."""
        return "sigma", self.log_std.exp()

    def extra_repr(self) -> str:
        """Show which tensor it is, and its prior."""
        return f"{self.tensor} {self.shape}, prior={self.prior:g}"


def posteriors(network: nn.Module) -> list[tuple[VariationalWeight, Tensor]]:
    """Return every variational tensor of ``network`` with its mean, a parameter."""
    chains = [module for module in network.modules() if isinstance(module, parametrize.ParametrizationList)]
    return [(noise, chain.original) for chain in chains for noise in chain if isinstance(noise, VariationalWeight)]


def kl_divergence(network: nn.Module) -> Tensor:
    """Return the KL divergence of all variational tensors of ``network`` from their priors, summed, in nats.

    Raises:
        ConfigError: it has none.
    """
    terms = [noise.kl(mean) for noise, mean in posteriors(network)]
    if not terms:
        raise ConfigError("the network has no variational weights; call vary_weights(network) first")
    return torch.stack(terms).sum()
