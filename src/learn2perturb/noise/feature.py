"""Additive noise on features, with a learned or fixed scale: ``h <- h + theta * eps``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_choice
from learn2perturb.engine import folding, fused, gears
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.distributions import check_distribution, draw, draw_seeded, is_channels_last

GRANULARITIES = ("element", "channel", "layer")
SHARINGS = ("per_example", "per_batch")
PLACES = ("output", "input")
CHILD = "perturbation"
_SPEC = (
    "site", "place", "granularity", "sharing", "distribution", "init", "minimum", "learned", "channel_dim", "relative",
)  # fmt: skip


# Module-level functions, not closures: a network with noise can be pickled, deep-copied and compiled.
def _perturb_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.perturbation.perturb(output)  # type: ignore[operator, union-attr]


@folding.input_only
def _perturb_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.perturbation.perturb(args[0]), *args[1:])  # type: ignore[operator, union-attr]


def drop_hook(hooks: dict[int, Any], function: Any) -> None:
    """Remove ``function`` from a hook table. By identity, because handles do not survive a deep copy."""
    for key, hook in list(hooks.items()):
        if hook is function or getattr(hook, "hook", None) is function:
            del hooks[key]


def map_shape(feature_shape: tuple[int, ...], granularity: str, channel_dim: int) -> tuple[int, ...]:
    """Return the shape of theta for features of ``feature_shape`` (no batch dimension)."""
    if granularity == "element":
        return feature_shape
    shape = [1] * len(feature_shape)
    if granularity == "channel":
        shape[channel_dim] = feature_shape[channel_dim]
    return tuple(shape)


def spread(tensor: Tensor) -> Tensor:
    """Return the standard deviation over the whole of ``tensor``: unbiased, float32, a constant to autograd."""
    values = tensor.detach()
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return values.std() if values.numel() > 1 else values.new_zeros(())  # of one number there is none


class Perturbation(NoiseModule):
    """The perturbation-injection module of Learn2Perturb: ``h + theta * eps``, ``eps ~ N(0, 1)`` (eqs. 3 to 5).

    It is a child of the module it perturbs and is applied by a forward hook through :meth:`perturb`. Called as a layer
    it is the identity, because a container that runs its children in order (``nn.Sequential``) runs this one too.

    Args:
        feature_shape: shape of one example's features, e.g. (C, H, W).
        site: name of the perturbed submodule.
        place: ``output`` of the submodule, or its first ``input``.
        granularity: ``element`` (theta of ``feature_shape``), ``channel`` or ``layer`` (one number).
        sharing: ``per_example`` draws one eps for each row, ``per_batch`` one for all rows.
        distribution: ``gaussian``, ``laplace`` or ``uniform``, of unit variance.
        init: first value of theta, a standard deviation.
        minimum: theta is projected to at least this after each step.
        learned: whether theta is trained; a fixed scale (RSE, PixelDP) is not.
        channel_dim: index of the channel dimension in ``feature_shape``.
        relative: theta is in units of the features' own standard deviation, taken over the whole tensor (rows of the
            batch included, unbiased, without gradient): PNI on activations, whose papers call theta alpha.

    Raises:
        ConfigError: a choice is unknown, or not 0 <= minimum <= init.
    """

    kind: ClassVar[str] = "feature"

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        *,
        site: str,
        place: str = "output",
        granularity: str = "element",
        sharing: str = "per_example",
        distribution: str = "gaussian",
        init: float = 0.25,
        minimum: float = 0.01,
        learned: bool = True,
        channel_dim: int = 0,
        relative: bool = False,
    ) -> None:
        super().__init__(site)
        for name, value in (("init", init), ("minimum", minimum)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"theta {name} is {value!r}; it must be a number, such as 0.25")
        if not 0 <= minimum <= init < float("inf"):
            raise ConfigError(f"theta init is {init} and minimum is {minimum}; allowed: 0 <= minimum <= init")
        self.feature_shape = tuple(feature_shape)
        check_choice("place", place, PLACES)
        check_choice("granularity", granularity, GRANULARITIES)
        check_choice("sharing", sharing, SHARINGS)
        self.place, self.granularity, self.sharing = place, granularity, sharing
        self.distribution = check_distribution(distribution)
        self.init, self.minimum, self.learned, self.channel_dim = init, minimum, learned, channel_dim
        self.relative = relative
        self.theta = nn.Parameter(
            torch.full(map_shape(self.feature_shape, granularity, channel_dim), float(init)), requires_grad=learned
        )
        self._rows: tuple[int, Tensor] | None = None

    @property
    def path(self) -> str:
        """Its name below the submodule it perturbs."""
        return CHILD

    def refusal(self, parent: nn.Module) -> str | None:
        """Refuse a submodule that has noise on its features."""
        return "is perturbed already; call remove_noise(network) first" if hasattr(parent, CHILD) else None

    def attach(self, parent: nn.Module) -> None:
        """Become a child of ``parent``, applied by a hook on its output or input."""
        parent.add_module(CHILD, self)
        if self.place == "output":
            parent.register_forward_hook(_perturb_output)
        else:
            parent.register_forward_pre_hook(_perturb_input)

    def detach(self, parent: nn.Module) -> None:
        """Remove child and hook."""
        delattr(parent, CHILD)
        drop_hook(parent._forward_hooks, _perturb_output)
        drop_hook(parent._forward_pre_hooks, _perturb_input)

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return theta where it is learned."""
        return [self.theta] if self.learned else []

    def scale(self) -> tuple[str, Tensor]:
        """Return theta, or |alpha| where it is relative and free in sign."""
        return ("alpha", self.theta.abs()) if self.relative else ("theta", self.theta)

    @classmethod
    def from_spec(cls, arguments: dict[str, Any]) -> Perturbation:
        """Return a module of this description."""
        arguments = dict(arguments)
        return cls(tuple(arguments.pop("feature_shape")), **arguments)

    def spec(self) -> dict[str, Any]:
        """Return the arguments that build this module again."""
        shape = {"kind": self.kind, "feature_shape": list(self.feature_shape)}
        return shape | {name: getattr(self, name) for name in _SPEC} | {"enabled": self.enabled}

    def extra_repr(self) -> str:
        """Show what is drawn and how it is scaled."""
        return f"{tuple(self.theta.shape)}, {self.distribution}, {self.sharing}, place={self.place}"

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h`` unchanged: noise is applied by the hook of the parent, once."""
        return h

    def perturb(self, h: Tensor) -> Tensor:
        """Return ``h + theta * eps`` with a fresh (or replayed) eps, or ``h`` itself when switched off.

        Args:
            h: features, (N, *feature_shape).

        Raises:
            SiteError: the features do not have the shape that this module was made for.
        """
        if not self.enabled:
            return h
        self._check(h)
        scale = self.theta * spread(h) if self.relative else self.theta
        shared = self.sharing == "per_batch"
        if fused.can_inline(h) and self.replay is None:
            return fused.add_noise_inlined(h, scale, self.distribution, shared=shared)
        # Asked in this order: a compiler that looks into the pass cannot look into the current gear.
        if fused.can_fuse(h) and not shared and self.replay is None and gears.current().fused_noise:
            noisy = fused.add_noise(h, scale, self.distribution)
            if noisy is not None:
                return noisy
        eps = self.draw(h)
        if shared and h.device.type == "cpu" and h.is_floating_point() and gears.current().fused_noise:
            return fused.add_shared_noise(h, scale, eps)
        return torch.addcmul(h, scale.to(h.dtype), eps.to(h.dtype))

    @torch.no_grad()
    def draw(self, h: Tensor) -> Tensor:
        """Draw eps for features ``h``: one row for each example, or a single row for all of them."""
        rows = 1 if self.sharing == "per_batch" else h.shape[0]
        if self.replay is not None:
            return self._replayed(self.replay, rows, tuple(h.shape[1:])).to(h.device)
        return draw(self.distribution, (rows, *h.shape[1:]), h.device, channels_last=is_channels_last(h))

    def _replayed(self, seed: int, rows: int, shape: tuple[int, ...]) -> Tensor:
        """Return draws that are a function of seed, site and row alone; kept while the same seed is replayed."""
        known = self._rows[1] if self._rows is not None and self._rows[0] == seed else torch.empty(0, *shape)
        if known.shape[1:] != shape:
            known = torch.empty(0, *shape)
        if known.shape[0] < rows:
            new = [
                draw_seeded(self.distribution, shape, derive_seed(seed, "noise", self.site, row))
                for row in range(known.shape[0], rows)
            ]
            known = torch.cat([known, torch.stack(new)])
            self._rows = (seed, known)
        return known[:rows]

    def forget(self) -> None:
        """Drop the replayed draws that are kept."""
        self._rows = None

    def _check(self, h: Tensor) -> None:
        shape = tuple(h.shape[1:])
        expected = self.feature_shape
        if self.granularity == "element":
            fits = shape == expected
        else:
            fits = len(shape) == len(expected) and (
                self.granularity == "layer" or shape[self.channel_dim] == expected[self.channel_dim]
            )
        if not fits:
            raise SiteError(
                f"site {self.site!r} has features of shape {shape} but its {self.granularity}-wise noise was made for "
                f"{expected}; feed images of the size that perturb() was given, or perturb with that input_shape, "
                "or use granularity='channel'"
            )
