"""A norm that is one of several, picked anew in every pass (RNA)."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.engine import folding
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.places import CHILD, drop_hook


# A module-level function, as in places: a network with it can be pickled, deep-copied and compiled.
@folding.reads_input
def _pick_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.perturbation.picked(args[0], output)  # type: ignore[operator, union-attr]


@final
class RandomNorm(NoiseModule):
    """In each pass a BatchNorm, or one of several GroupNorms of the same input, with weights of their own.

    Dong, Chen, Wang, Xu, Random Normalization Aggregation for Adversarial Defense, NeurIPS 2022. Each layer picks for
    itself, one for all images of the pass, every norm with equal chance. With the noise off it is the BatchNorm.

    Args:
        shape: of one example's features, (C, H, W); the site is the BatchNorm.
        channels: for each GroupNorm, how many channels make a group; 1 normalises each channel of each image by itself.

    Raises:
        ConfigError: a number of channels does not divide C, or there is none.
    """

    kind: ClassVar[str] = "norms"
    settings = ("channels",)

    def __init__(self, shape: tuple[int, ...], *, channels: tuple[int, ...] | list[int] = (1,), **place: Any) -> None:
        super().__init__(shape, **place)
        self.channels = list(channels)
        width = self.shape[0]
        for size in self.channels:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1 or width % size:
                raise ConfigError(
                    f"channels has {size!r}; a group must have a number of channels that divides {width}, those of "
                    f"{self.site!r}; 1 always does"
                )
        if not self.channels:
            raise ConfigError("channels is empty, so there is nothing to pick from; the paper's code has [1]")
        self.norms = nn.ModuleList(nn.GroupNorm(width // size, width) for size in self.channels)

    def picked(self, value: Tensor, normed: Tensor) -> Tensor:
        """Return ``normed``, what BatchNorm makes of ``value``, or what one of the GroupNorms makes of it."""
        if not self.enabled:
            return normed
        self.where.check(self, value)
        # All of them, and no look at the number on the host: a compiled or recorded pass picks anew as well.
        return self.noisy(torch.stack([normed, *(self._group(norm, value) for norm in self.norms)]), self._pick(value))

    @staticmethod
    def _group(norm: nn.Module, value: Tensor) -> Tensor:
        assert isinstance(norm, nn.GroupNorm)
        # Not norm(value), which in train mode refuses one image of one pixel, whose norm is its bias.
        return torch.group_norm(value, norm.num_groups, norm.weight, norm.bias, norm.eps)

    @torch.no_grad()
    def _pick(self, value: Tensor) -> Tensor:
        """Return the number of the norm that is picked, (1,)."""
        count = 1 + len(self.norms)
        if self.replay is None:
            return torch.randint(count, (1,), device=value.device)
        generator = torch.Generator().manual_seed(derive_seed(self.replay, "noise", self.site, 0))
        return torch.randint(count, (1,), generator=generator).to(value.device)

    def noisy(self, value: Tensor, eps: Tensor) -> Tensor:
        """Return the one of the answers ``value`` (norms, N, C, H, W) whose number is ``eps``."""
        return value.index_select(0, eps)[0]

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return nothing: scale and shift of a norm are weights of the network."""
        return []

    def scale(self) -> tuple[str, Tensor]:
        """Return how many norms there are to pick from."""
        return "norms", torch.tensor(1.0 + len(self.norms))

    def attach(self, parent: nn.Module) -> None:
        """Make it a child of the BatchNorm ``parent``, with a hook that sees what goes in as well."""
        parent.add_module(CHILD, self)
        parent.register_forward_hook(_pick_norm)

    def detach(self, parent: nn.Module) -> None:
        """Remove child and hook."""
        delattr(parent, CHILD)
        drop_hook(parent._forward_hooks, _pick_norm)
