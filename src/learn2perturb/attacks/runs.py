"""Several runs of one attack, of which each image keeps the best point; broken images may leave."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learn2perturb.attacks.query import Query
from learn2perturb.engine import execution

# From the numbers (n,) of the images still attacked and those of k runs: run by run, their points (k n, C, H, W) and
# which of these break the image (k n, bool).
Run = Callable[[Tensor, range], tuple[Tensor, Tensor]]


def best_of(
    query: Query, x: Tensor, y: Tensor, run: Run, count: int, *, drop: bool, draws: int, side_by_side: bool = False
) -> Tensor:
    """Return of each image the point that fools the model in most of ``draws`` fresh passes, then by mean margin.

    With ``drop``, images that are broken as they are stay as they are, and one that a run breaks keeps that point. Then
    runs may be made ``side_by_side``, as many as fill a pass.
    """
    best, left = x.clone(), torch.arange(len(x), device=x.device)
    if drop:
        left = left[~query.broken(x, y, query.score(x, y, 1))]
        query.left = len(left)
    shares, margins = (torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device) for _ in range(2))
    number = 0
    while number < count and len(left):
        some = range(number, min(number + (runs_at_once(x, len(left)) if side_by_side and drop else 1), count))
        candidates, broken = run(left, some)
        if count == 1:
            best[left] = candidates
            break
        judged = query.success(candidates, y[left.repeat(len(some))], draws)
        standing = torch.ones_like(left, dtype=torch.bool)
        each = (values.split(len(left)) for values in (candidates, broken, *(value.to(x.dtype) for value in judged)))
        for candidate, gone, share, margin in zip(*each, strict=True):
            before = shares[left]
            better = (torch.where(share == before, margin > margins[left], share > before) | gone) & standing
            best[left] = torch.where(per_image(better), candidate, best[left])
            shares[left] = torch.where(better, share, before)
            margins[left] = torch.where(better, margin, margins[left])
            standing = standing & ~gone
        number = some.stop
        if drop:  # else the device would be waited for
            left = left[standing]
            query.left = len(left)
    return best


def runs_at_once(x: Tensor, images: int) -> int:
    """Return how many runs on so many of the images ``x`` (N, C, H, W) to make in one: those that fill a pass."""
    if not execution.current().full_passes:
        return 1
    # N rows were a pass before.
    return max(1, max(execution.rows_of_a_full_pass(x), len(x)) // images)


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
