"""One iteration of alternating back-propagation: who steps when, and from which gradient (algorithm 1, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.defenses import Alternation, Clock, Defense, Losses
from learn2perturb.noise import noise_parameters

Optimizers = dict[str, torch.optim.Optimizer]


@final
@dataclass(frozen=True)
class Iteration:
    """What one iteration did.

    Attributes:
        losses: of its first evaluation of the objective.
        loss_slope: mean |dL/dtheta| over all elements of the noise parameters, or None.
        regulariser_slope: mean |dR/dtheta|, or None.
    """

    losses: Losses
    loss_slope: Tensor | None = None
    regulariser_slope: Tensor | None = None


def _mean_size(tensors: list[Tensor]) -> Tensor:
    return torch.stack(list(torch._foreach_norm(tensors, 1))).sum() / sum(t.numel() for t in tensors)


def _descend(
    noise: list[nn.Parameter], slopes: list[Tensor] | None, plan: Alternation, optimizer: torch.optim.Optimizer
) -> None:
    """Step theta on the loss gradient it holds, or against it, and on the regulariser's ``slopes``."""
    for parameter in noise:
        if not plan.noise_from_loss:
            parameter.grad = torch.zeros_like(parameter)
        elif plan.noise_ascends and parameter.grad is not None:
            parameter.grad.neg_()
    if slopes is not None and plan.regulariser_through_optimizer:
        for parameter, slope in zip(noise, slopes, strict=True):
            parameter.grad = slope.clone() if parameter.grad is None else parameter.grad.add_(slope)
    optimizer.step()
    if slopes is not None and not plan.regulariser_through_optimizer:
        _subtract(noise, slopes)


@torch.no_grad()
def _subtract(noise: list[nn.Parameter], slopes: list[Tensor]) -> None:
    for parameter, slope in zip(noise, slopes, strict=True):
        parameter.sub_(slope)


def _joined(found: list[tuple[Losses, float]]) -> Losses:
    """Return the losses of a batch from those of its parts, each with its share of the images."""

    def mean(values: list[Tensor | None]) -> Tensor | None:
        known = [value.detach() * share for value, (_, share) in zip(values, found, strict=True) if value is not None]
        return torch.stack(known).sum() if len(known) == len(found) else None

    def rows(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.cat(known) if len(known) == len(found) else None

    each = [losses for losses, _ in found]
    extra = {key: mean([losses.extra.get(key) for losses in each]) for key in each[0].extra}
    total = mean([losses.total for losses in each])
    assert total is not None
    return replace(
        each[0], total=total, clean=mean([losses.clean for losses in each]),
        adversarial=mean([losses.adversarial for losses in each]),
        clean_correct=rows([losses.clean_correct for losses in each]),
        adversarial_correct=rows([losses.adversarial_correct for losses in each]),
        extra={key: value for key, value in extra.items() if value is not None},
    )  # fmt: skip


def iterate(
    defense: Defense,
    model: nn.Module,
    clock: Clock,
    optimizers: Optimizers,
    objective: Callable[[], Losses] | Sequence[tuple[Callable[[], Losses], float]],
    check: Callable[[Losses], None],
    weight: Tensor | float | None = None,
    complete: Callable[[Iterable[nn.Parameter]], None] | None = None,
    clip_norm: float = 0.0,
) -> Iteration:
    """Run one iteration of training on one batch.

    Args:
        defense: gives the order of steps, the regulariser and the projection.
        model: in train mode.
        clock: where the training stands.
        optimizers: ``weights`` and, with learned noise, ``noise``; those of other names step with ``weights``.
        objective: evaluates the loss on the batch, anew at each call (fresh noise, fresh adversarial examples); of a
            batch in parts, that of each with its share of the images.
        check: called with the losses before anything is updated; raises to stop.
        weight: of the regulariser; by default what the defense says, and in a recorded step the tensor that has it.
        complete: makes the gradients of a part of the batch those of all of it, where other processes have the rest.
        clip_norm: largest norm of the gradient of all weights, noise left out; 0 is without.
    """
    parts = [(objective, 1.0)] if callable(objective) else list(objective)
    plan = defense.alternation()
    weight = defense.regulariser_weight(clock) if weight is None else weight
    noise = [parameter for parameter in noise_parameters(model) if parameter.requires_grad]
    noise = noise if "noise" in optimizers else []
    trained = [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]

    def regulariser_slopes() -> list[Tensor] | None:
        penalty = defense.regulariser(model, clock) if noise else None
        return None if penalty is None else list(torch.autograd.grad(weight * penalty, noise))

    def backward() -> Losses:
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        found = []
        for part, share in parts:
            losses = part()
            check(losses)
            (losses.total if len(parts) == 1 else losses.total * share).backward()
            found.append((losses, share))
        if complete is not None:
            complete(trained)
        if clip_norm:
            own = [p for group in optimizers["weights"].param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(own, clip_norm)
        return found[0][0] if len(found) == 1 else _joined(found)

    def step_weights() -> None:
        for name, optimizer in optimizers.items():
            if name != "noise":
                optimizer.step()

    if noise and plan.kind == "released":
        # The released code first steps theta on the regulariser alone; its momentum then decays a second time below.
        slopes = regulariser_slopes()
        if slopes is not None:
            if plan.regulariser_through_optimizer:
                for parameter, slope in zip(noise, slopes, strict=True):
                    parameter.grad = slope
                optimizers["noise"].step()
            else:
                _subtract(noise, slopes)
            defense.after_step(model, clock)
    losses = backward()
    if not noise:
        step_weights()
        defense.after_step(model, clock)
        return Iteration(losses)

    held = [parameter.grad for parameter in noise if parameter.grad is not None]
    loss_slope = _mean_size(held) if held else None
    slopes = regulariser_slopes()
    regulariser_slope = None if slopes is None else _mean_size(slopes)
    if plan.kind == "sequential":
        step_weights()
        for _ in range(plan.weight_steps - 1):
            backward()
            step_weights()
        for _ in range(plan.noise_steps):
            backward()
            _descend(noise, regulariser_slopes(), plan, optimizers["noise"])
            defense.after_step(model, clock)
    else:
        step_weights()
        _descend(noise, None if plan.kind == "released" else slopes, plan, optimizers["noise"])
        defense.after_step(model, clock)
    return Iteration(losses, loss_slope, regulariser_slope)
