"""What the Square attack proposes: stripes or bumps, then squares of a new colour (l_inf) or bumps that move (l2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from learn2perturb.attacks.balls import BALLS
from learn2perturb.engine.windows import Windowed


def stripes(x: Tensor, eps: float) -> Tensor:
    """Return ``x`` with vertical stripes of width 1, each ``+eps`` or ``-eps`` in every channel."""
    return (x + eps * _signs(x, x.shape[1], 1, x.shape[3])).clamp_(0.0, 1.0)


@final
class Recolouring(NamedTuple):
    """Squares of M proposals: each takes every channel of a square to one or the other end of the l_inf ball.

    Attributes:
        side: of the squares.
        rows, columns: (M, 1) where they start.
        signs: (M, C, 1, 1) which end.
    """

    side: int
    rows: Tensor
    columns: Tensor
    signs: Tensor

    @classmethod
    def drawn(cls, x: Tensor, side: int, times: int = 1) -> Recolouring:
        """Draw so many ``times`` proposals for each of N images: M = N times, those of an image in a row."""
        rows, columns = (_starts(x, length, side, times) for length in x.shape[2:])
        return cls(side, rows, columns, _signs(x, x.shape[1], 1, 1, times=times))

    def of(self, index: Tensor) -> Recolouring:
        """Return some of the proposals."""
        return Recolouring(self.side, *(part[index] for part in self[1:]))

    def shown(self, best: Tensor, x: Tensor, eps: float) -> Tensor:
        """Return ``best`` (M, C, H, W) with the squares, of images ``x`` (M, C, H, W)."""
        inside = _inside(self.rows, self.columns, self.side, x)
        return torch.where(inside, (x + eps * self.signs).clamp_(0.0, 1.0), best)

    def windowed(self, best: Tensor, x: Tensor, eps: float, owner: Tensor) -> Windowed:
        """Return the same as a batch in windows; ``best`` and ``x`` are (B, C, H, W), ``owner`` (M,) whose each is."""
        span = torch.arange(self.side, device=x.device)
        rows, columns = (self.rows + span)[:, :, None], (self.columns + span)[:, None]
        under = x[owner[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        colours = (under + eps * self.signs).clamp_(0.0, 1.0)
        return Windowed(best, owner, self.rows.squeeze(1), self.columns.squeeze(1), colours)


def bumps(x: Tensor, eps: float) -> Tensor:
    """Return ``x`` plus a grid of bumps, five a side, with a random sign in each channel: of l2 norm ``eps``."""
    height, width = x.shape[2:]
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    for top in range((height % side) // 2, height - side + 1, side):
        for left in range((width % side) // 2, width - side + 1, side):
            bump = _bump(side, x) * _signs(x, x.shape[1], 1, 1)
            delta[:, :, top : top + side, left : left + side] = bump
    return (x + _scaled(delta, eps)).clamp_(0.0, 1.0)


@final
class Redistribution(NamedTuple):
    """M proposals in the l2 ball: a new bump in one window, paid for with the norm of another.

    Attributes:
        side: of the windows.
        given: rows and columns, (M, 1) each, where the windows with the bumps start.
        taken: those of the windows that pay.
        bump: (M, 1, side, side) of norm 1.
        signs: (M, C, 1, 1) of the bump in each channel.
    """

    side: int
    given: tuple[Tensor, Tensor]
    taken: tuple[Tensor, Tensor]
    bump: Tensor
    signs: Tensor

    @classmethod
    def drawn(cls, x: Tensor, side: int, times: int = 1) -> Redistribution:
        """Draw so many ``times`` proposals for each of N images; the n-th bumps of all images lie alike."""
        height, width = x.shape[2:]
        starts = [_starts(x, length, side, times) for length in (height, width, height, width)]
        bump = _bump(side, x, times).repeat(len(x), 1, 1).unsqueeze(1)
        signs = _signs(x, x.shape[1], 1, 1, times=times)
        return cls(side, (starts[0], starts[1]), (starts[2], starts[3]), bump, signs)

    def of(self, index: Tensor) -> Redistribution:
        """Return some of the proposals."""
        given, taken = ((rows[index], columns[index]) for rows, columns in (self.given, self.taken))
        return Redistribution(self.side, given, taken, self.bump[index], self.signs[index])

    def shown(self, best: Tensor, x: Tensor, eps: float) -> Tensor:
        """Return what is proposed in place of ``best`` (M, C, H, W), of images ``x`` (M, C, H, W)."""
        delta = best - x
        given, taken = (_inside(*starts, self.side, x) for starts in (self.given, self.taken))
        total = delta.square().sum(dim=(1, 2, 3), keepdim=True)
        windows = (delta * (given | taken)).square().sum(dim=(1, 2, 3), keepdim=True)
        old = delta * given
        tiny = torch.finfo(x.dtype).tiny
        old = old / old.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(tiny)
        fresh = torch.zeros_like(x)
        span = torch.arange(self.side, device=x.device)
        batch = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        rows, columns = (self.given[0] + span).unsqueeze(2), (self.given[1] + span).unsqueeze(1)
        fresh[batch, :, rows, columns] = (self.bump * self.signs).permute(0, 2, 3, 1)
        mixed = fresh + old
        mixed = mixed / mixed.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(tiny)
        budget = ((eps**2 - total).clamp_min(0.0) / x.shape[1] + windows / x.shape[1]).sqrt()
        delta = torch.where(given, mixed * budget, torch.where(taken, 0.0, delta))
        return (x + _scaled(delta, eps)).clamp_(0.0, 1.0)


Moves = Recolouring | Redistribution
# By norm: the first point, and the proposals after it.
STARTS: dict[str, Callable[[Tensor, float], Tensor]] = {"linf": stripes, "l2": bumps}
MOVES: dict[str, type[Recolouring] | type[Redistribution]] = {"linf": Recolouring, "l2": Redistribution}


def _bump(side: int, like: Tensor, times: int = 1) -> Tensor:
    """Return pairs of pyramids of opposite sign, of norm 1: (times, side, side), each lying or standing at random."""
    half = side // 2
    parts = [_pyramid(half, side), -_pyramid(side - half, side)] if half else [_pyramid(side, side)]
    bump = torch.cat(parts).to(like)
    bump = bump / bump.norm()
    # As a value, not as a branch: nothing here may wait for the device.
    return torch.where(torch.rand(times, 1, 1, device=like.device) > 0.5, bump.T, bump)


def _pyramid(height: int, width: int) -> Tensor:
    """Return rings that rise towards the middle, the ring at distance k from it adding ``1 / (k + 1)^2``."""
    middle_row, middle_column = height // 2, width // 2
    away_rows = (torch.arange(height) - middle_row).abs().view(-1, 1)
    away_columns = (torch.arange(width) - middle_column).abs().view(1, -1)
    ring = torch.maximum(away_rows, away_columns)
    last = max(middle_row, middle_column)
    weights = torch.tensor([1.0 / (k + 1) ** 2 for k in range(last + 1)])
    rising: Tensor = weights.flip(0).cumsum(0).flip(0)[ring]  # the sum of all rings that reach this far
    return rising / rising.norm()


def _signs(x: Tensor, *shape: int, times: int = 1) -> Tensor:
    """Return +1 or -1 at random, (N times, *shape)."""
    return torch.randint(0, 2, (len(x) * times, *shape), device=x.device).to(x.dtype).mul_(2).sub_(1)


def _starts(x: Tensor, length: int, side: int, times: int) -> Tensor:
    """Return where windows of ``side`` start along an axis of ``length``, (N times, 1), uniform."""
    return torch.randint(0, length - side + 1, (len(x) * times, 1), device=x.device)


def _span(starts: Tensor, length: int, side: int) -> Tensor:
    """Return which of ``length`` places are in the window, (N, length)."""
    places = torch.arange(length, device=starts.device)
    return (places >= starts) & (places < starts + side)


def _inside(rows: Tensor, columns: Tensor, side: int, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    return _span(rows, height, side).view(-1, 1, height, 1) & _span(columns, width, side).view(-1, 1, 1, width)


def _scaled(delta: Tensor, eps: float) -> Tensor:
    """Return ``delta`` at l2 norm ``eps``."""
    return BALLS["l2"].step(delta, eps)
