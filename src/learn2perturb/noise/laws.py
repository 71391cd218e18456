"""How a draw perturbs a value: additive, relative to the value's spread, a Gaussian posterior, multiplicative.

A law is a :class:`NoiseModule` that is registered by name; it works at every place, is saved, loaded, replayed, listed
and switched like the ones here (see ``examples/own_noise.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from learn2perturb.engine import by_row, execution, fused, rows
from learn2perturb.engine.shapes import Features
from learn2perturb.errors import ConfigError, NoiseError
from learn2perturb.noise.base import NoiseModule
from learn2perturb.registry import NOISES

_Law = TypeVar("_Law", bound=NoiseModule)
# Laws that were registered as classes; those of the package are imported when they are asked for.
_registered: dict[str, type[NoiseModule]] = {}


def register_noise(kind: str, *, paper: str = "", year: int | None = None) -> Callable[[type[_Law]], type[_Law]]:
    """Return a class decorator that makes a noise law known by the name ``kind``, in checkpoints as in calls.

    A run trained with the law loads wherever the module that registers it has been imported.

    Raises:
        NoiseError: the name is taken, or the class is no concrete :class:`NoiseModule`.
    """

    def register(law: type[_Law]) -> type[_Law]:
        if not (isinstance(law, type) and issubclass(law, NoiseModule)):
            raise NoiseError(f"{law!r} is no NoiseModule; derive the law from learn2perturb.noise.NoiseModule")
        if missing := sorted(getattr(law, "__abstractmethods__", ())):
            raise NoiseError(f"{law.__name__} lacks {' and '.join(missing)}; a law defines both noisy and scale")
        target = f"{law.__module__}:{law.__qualname__}"
        if kind not in NOISES:
            summary = (law.__doc__ or law.__name__).strip().splitlines()[0].rstrip(".")
            NOISES.register(kind, target, summary, paper=paper, year=year)
        elif not NOISES.entry(kind).is_from(target):  # the same class, defined anew, is a cell that was run twice
            raise NoiseError(f"noise {kind!r} is known already; register the law under another name")
        law.kind = kind
        _registered[kind] = law
        return law

    return register


def noise_law(kind: str) -> type[NoiseModule]:
    """Return the noise law that is registered as ``kind``.

    Raises:
        UnknownNameError: there is none of that name.
    """
    law: type[NoiseModule] = _registered.get(kind) or NOISES.entry(kind).load()
    if NOISES.entry(kind).package and kind not in _registered:  # declared, and not decorated
        register_noise(kind)(law)
    return law


def spread(tensor: Tensor, *, of_rows: bool = False) -> Tensor:
    """Return the standard deviation over the whole of ``tensor``: unbiased, float32, a constant to autograd.

    ``of_rows``: of the whole batch, where these are rows of one that several processes share.
    """
    values = tensor.detach()
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    if values.numel() <= 1:
        return values.new_zeros(())  # of one number there is none
    return rows.deviation(values) if of_rows else values.std()


def _positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not (0 <= value < math.inf) or (value == 0 and not or_zero):
        raise ConfigError(
            f"{name} is {value!r}; it must be a number {'at least' if or_zero else 'above'} 0, such as 0.1"
        )
    return float(value)


@final
@by_row.draws_by_row
class Perturbation(NoiseModule):
    """The perturbation-injection module of Learn2Perturb: ``h + theta * eps``, ``eps ~ N(0, 1)`` (eqs. 3 to 5).

    Args:
        shape: of one example's features, e.g. (C, H, W).
        site: name of the perturbed submodule.
        place: ``output`` of the submodule, its first ``input``, or a parameter of it.
        granularity: ``element`` (theta of ``shape``), ``channel`` or ``layer`` (one number).
        sharing: ``per_example`` draws one eps for each row, ``per_batch`` one for all rows.
        distribution: ``gaussian``, ``laplace`` or ``uniform``, of unit variance.
        init: first value of theta, a standard deviation.
        minimum: theta is projected to at least this after each step.
        learned: whether theta is trained; a fixed scale (RSE, PixelDP) is not.
        channel_dim: index of the channel dimension in ``shape``.
        relative: theta is in units of the features' own standard deviation, taken over the whole tensor (rows of the
            batch included, unbiased, without gradient): PNI on activations, whose papers call theta alpha.

    Raises:
        ConfigError: a choice is unknown, or not 0 <= minimum <= init.
    """

    kind: ClassVar[str] = "feature"
    settings = (
        "granularity", "sharing", "distribution", "init", "minimum", "learned", "channel_dim", "relative",
    )  # fmt: skip

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        init: float = 0.25,
        minimum: float = 0.01,
        learned: bool = True,
        relative: bool = False,
        **place: Any,
    ) -> None:
        super().__init__(shape, **place)
        for name, value in (("init", init), ("minimum", minimum)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"theta {name} is {value!r}; it must be a number, such as 0.25")
        if not 0 <= minimum <= init < float("inf"):
            raise ConfigError(f"theta init is {init} and minimum is {minimum}; allowed: 0 <= minimum <= init")
        self.init, self.minimum, self.learned, self.relative = init, minimum, learned, relative
        self.theta = nn.Parameter(torch.full(self.scale_shape, float(init)), requires_grad=learned)

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return theta where it is learned."""
        return [self.theta] if self.learned else []

    def scale(self) -> tuple[str, Tensor]:
        """Return theta, or |alpha| where it is relative and free in sign."""
        return ("alpha", self.theta.abs()) if self.relative else ("theta", self.theta)

    @torch.no_grad()
    def project(self) -> None:
        """Put theta at its minimum at least, where it is learned (algorithm 1)."""
        if self.learned:
            self.theta.clamp_(min=self.minimum)

    @property
    def draws_by_row(self) -> bool:
        """Whether every row has a draw of its own; relative noise is scaled by the whole batch."""
        return super().draws_by_row and not self.relative

    def extra_repr(self) -> str:
        """Show what is drawn and how it is scaled."""
        return f"{tuple(self.theta.shape)}, {self.distribution}, {self.sharing}, place={self.place}"

    def perturb(self, value: Features) -> Features:
        """Return ``h + theta * eps`` with a fresh (or replayed) eps, or ``h`` itself when switched off.

        Args:
            value: features h (N, *shape), or a weight of ``shape``.

        Raises:
            SiteError: the features do not have the shape that this module was made for.
        """
        if not self.enabled:
            return value
        self.where.check(self, value)
        if self.where.of_features and self.replay is None:
            noisy = self._in_one_kernel(value)
            if noisy is not None:
                return noisy
        return self.noisy(value, self.draw(value))

    def _in_one_kernel(self, h: Tensor) -> Tensor | None:
        """Draw and add in one kernel, where the execution mode has one."""
        shared = self.sharing == "per_batch"
        if fused.can_inline(h):
            return fused.add_noise_inlined(h, self._size(h), self.distribution, shared=shared)
        # Asked in this order: a compiler that looks into the pass cannot look into the current execution mode.
        if fused.can_fuse(h) and not shared and execution.current().fused_noise:
            return fused.add_noise(h, self._size(h), self.distribution)
        return None

    def _size(self, value: Tensor) -> Tensor:
        return self.theta * spread(value, of_rows=self.where.of_features) if self.relative else self.theta

    def noisy(self, value: Features, eps: Tensor) -> Features:
        """Return ``h + theta * eps``."""
        size = self._size(value)
        shared = self.where.of_features and self.sharing == "per_batch"
        if shared and value.device.type == "cpu" and value.is_floating_point() and execution.current().fused_noise:
            return fused.add_shared_noise(value, size, eps)
        return torch.addcmul(value, size.to(value.dtype), eps.to(value.dtype))


@final
class WeightPerturbation(NoiseModule):
    """PNI (He, Rakin, Fan 2019): ``w + alpha * eta``, ``eta ~ N(0, std(w)^2)``.

    The standard deviation is that of the whole tensor (unbiased) and a constant to autograd: the gradient of w passes
    unchanged, that of alpha is ``sum(grad * eta)``. Alpha is not constrained in sign.

    Args:
        shape: of the tensor.
        site: name of the layer.
        place: its parameter.
        granularity: alpha per ``layer`` (one number), ``channel`` (output channel) or ``element``.
        init: first value of alpha.
        channel_dim: index of the output channels: 0, or 1 in transposed convolutions.

    Raises:
        ConfigError: a choice is unknown, or init is below 0.
    """

    kind: ClassVar[str] = "weight"
    settings = ("granularity", "init", "channel_dim")
    granularity_of_law: ClassVar[str] = "layer"

    def __init__(self, shape: tuple[int, ...], *, init: float = 0.25, place: str = "weight", **others: Any) -> None:
        super().__init__(shape, place=place, **others)
        self.init = _positive("alpha's init", init, or_zero=True)
        self.alpha = nn.Parameter(torch.full(self.scale_shape, self.init))

    def noisy(self, value: Features, eps: Tensor) -> Features:
        """Return ``w + alpha * eta``."""
        return torch.addcmul(value, self.alpha.to(value.dtype), (eps * spread(value)).to(value.dtype))

    def scale(self) -> tuple[str, Tensor]:
        """Return |alpha|."""
        return "alpha", self.alpha.abs()

    def extra_repr(self) -> str:
        """Show what alpha is for."""
        return f"{self.place}, alpha {tuple(self.alpha.shape)}"


@final
class VariationalWeight(NoiseModule):
    """A Gaussian posterior over a tensor (Adv-BNN, Liu, Li, Wu, Hsieh 2018): ``mu + exp(s) * eps``, eps ~ N(0, 1).

    mu is the plain weight, so with the noise off, or removed, the network computes with the posterior's mean.

    Args:
        shape: of the tensor.
        site: name of the layer.
        place: its parameter.
        init: first standard deviation, exp(s).
        prior: standard deviation sigma_0 of the prior N(0, sigma_0^2).

    Raises:
        ConfigError: a standard deviation is not above 0.
    """

    kind: ClassVar[str] = "variational"
    settings = ("init", "prior")

    def __init__(
        self, shape: tuple[int, ...], *, init: float = 0.1, prior: float = 0.1, place: str = "weight", **others: Any
    ) -> None:
        super().__init__(shape, place=place, **others)
        self.init, self.prior = _positive("init", init), _positive("prior", prior)
        self.log_std = nn.Parameter(torch.full(self.scale_shape, math.log(self.init)))

    def noisy(self, value: Features, eps: Tensor) -> Features:
        """Return ``mu + exp(s) * eps``: the reparametrisation, through which both learn."""
        return torch.addcmul(value, self.log_std.exp().to(value.dtype), eps.to(value.dtype))

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
        return f"{self.place} {self.shape}, prior={self.prior:g}"


@final
@by_row.draws_by_row
class Multiplicative(NoiseModule):
    """Noise in proportion to each value: ``v (1 + sigma * eps)``, ``eps ~ N(0, 1)``.

    With sigma^2 = p / (1 - p) it is Gaussian dropout of rate p (Srivastava et al. 2014, section 10); a learned sigma is
    variational dropout's (Kingma, Salimans, Welling 2015).

    Args:
        shape: of one example's features, or of the weight.
        init: first value of sigma.

    Raises:
        ConfigError: a choice is unknown, or init is below 0.
    """

    kind: ClassVar[str] = "multiplicative"
    settings = ("init",)

    def __init__(self, shape: tuple[int, ...], *, init: float = 0.25, **place: Any) -> None:
        super().__init__(shape, **place)
        self.init = _positive("sigma's init", init, or_zero=True)
        self.sigma = nn.Parameter(torch.full(self.scale_shape, self.init))

    def noisy(self, value: Features, eps: Tensor) -> Features:
        """Return ``v (1 + sigma * eps)``."""
        return value * (1 + self.sigma * eps).to(value.dtype)

    def scale(self) -> tuple[str, Tensor]:
        """Return |sigma|."""
        return "sigma", self.sigma.abs()


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
