"""Several runs of one attack, of which each image keeps the best point; broken images may leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learn2perturb.attacks.base import Query

# From the numbers (n,) of the images still attacked: their points (n, C, H, W), and which are broken (n, bool).
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def best_of(query: Query, x: Tensor, y: Tensor, runs: Sequence[Run], *, drop: bool, draws: int) -> Tensor:
    """Return of each image the point that fools the model in most of ``draws`` fresh passes, then by mean margin.

    With ``drop``, images that are broken as they are stay as they are, and one that a run breaks keeps that point.
    """
    best, left = x.clone(), torch.arange(len(x), device=x.device)
    if drop:
        left = left[~query.broken(x, y, query.score(x, y, 1))]
        query.left = len(left)
    shares, margins = (torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device) for _ in range(2))
    for run in runs:
        if not len(left):
            break
        candidate, broken = run(left)
        if len(runs) == 1:
            best[left] = candidate
            break
        share, margin = (value.to(x.dtype) for value in query.success(candidate, y[left], draws))
        before = shares[left]
        better = torch.where(share == before, margin > margins[left], share > before) | broken
        best[left] = torch.where(per_image(better), candidate, best[left])
        shares[left], margins[left] = torch.where(better, share, before), torch.where(better, margin, margins[left])
        if drop:  # else the device would be waited for
            left = left[~broken]
            query.left = len(left)
    return best


def likely_targets(query: Query, x: Tensor, y: Tensor, count: int) -> list[Tensor]:
    """Return the ``count`` most likely wrong classes of each image, most likely first, each (N,): by one EOT average.

    Fewer where there are fewer classes.
    """
    logits = query.value(x, y).logits
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return list(others.topk(min(count, logits.shape[1] - 1), dim=1).indices.unbind(dim=1))


def per_image(values: Tensor) -> Tensor:
    """Return ``values`` (N,) shaped to go with images, (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
