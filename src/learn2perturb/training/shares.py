"""What a step is where several processes share its batch: each has its rows, the losses are those of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from learn2perturb.defenses import Losses
from learn2perturb.engine import rows
from learn2perturb.engine.ranks import Share, valued
from learn2perturb.errors import TrainingError


def mark(x: Tensor, y: Tensor) -> Tensor:
    """Return two numbers that tell batches apart: weighted sums of labels and of pixels, exact in any order."""
    places = torch.arange(1, len(y) + 1, device=y.device, dtype=torch.float64)
    pixels = (x.flatten(1).double() * 255).round_().sum(1)
    return torch.stack([(y * places).sum(), (pixels * places).sum()])


def objective(loss: Callable[[], Losses], share: Share, marked: Tensor) -> Losses:
    """Return the losses of a whole batch, evaluated on one share of it.

    All numbers are those of the batch. The gradient of ``total`` is what these rows give to that of the batch: the sum
    over the processes is the gradient of the mean loss over all rows.

    Raises:
        TrainingError: the processes have read different batches.
    """
    with rows.sharded(share):
        losses = loss()
    parts: dict[str, Tensor | None] = {
        "total": losses.total,
        "clean": losses.clean,
        "adversarial": losses.adversarial,
        "clean_correct": losses.clean_correct,
        "adversarial_correct": losses.adversarial_correct,
    }
    parts |= {f"extra.{key}": value for key, value in losses.extra.items()}
    there = {key: value.detach().double().mean() for key, value in parts.items() if value is not None}
    own = torch.stack([value.to(losses.total.device) for value in there.values()]) * share.weight
    sums = share.ranks.sum(torch.cat([own, marked]))
    if not torch.equal(sums[-2:], share.ranks.world * marked):
        raise TrainingError(
            f"process {share.ranks.rank} of {share.ranks.world} has read another batch than the others; the order of "
            "the data must follow from the seed alone, on every process"
        )
    found = dict(zip(there, sums, strict=False))
    total = found.pop("total").to(losses.total.dtype)
    extra = {key.removeprefix("extra."): found.pop(key) for key in list(found) if key.startswith("extra.")}
    return replace(losses, total=valued(losses.total * share.weight, total), extra=extra, **found)
