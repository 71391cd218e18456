"""Models that draw one of finitely many networks: what an image meets on average is a sum, no estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.engine.answers import logits_of
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import InputError

Network = Callable[[Tensor], Tensor]

_TOLERANCE = 1e-6  # of the sum of probabilities
_PASSES = 4  # over the images that tell whether members are what the model draws from


@final
@dataclass(frozen=True, eq=False)
class Members:
    """The networks of a finite ensemble and how likely each is to answer."""

    networks: tuple[Network, ...]
    probabilities: tuple[float, ...]

    def led_by(self, lead: int) -> Members:
        """Return the members likeliest first, but for the one of rank ``lead``, which comes before all."""
        order = sorted(range(len(self.networks)), key=lambda number: -self.probabilities[number])
        order.insert(0, order.pop(lead))
        return Members(tuple(self.networks[one] for one in order), tuple(self.probabilities[one] for one in order))


def members_of(model: Any) -> Members | None:
    """Return the members of ``model``, None where it is no finite ensemble: has no ``members`` and ``probabilities``.

    What draws among them may be a part of it instead, with ``members_in(model)``: noise of the kind ``members``.

    Raises:
        InputError: there is not one probability for each member, or they are none.
    """
    networks, given = getattr(model, "members", None), getattr(model, "probabilities", None)
    drawing: Any = getattr(model, "perturbation", None)
    if networks is None and given is None and hasattr(drawing, "members_in") and getattr(drawing, "enabled", False):
        networks, given = drawing.members_in(model), drawing.probabilities
    if networks is None or given is None:
        return None
    networks = tuple(networks)
    probabilities = checked_probabilities(given.tolist() if isinstance(given, Tensor) else given, len(networks))
    return Members(networks, probabilities)


def checked_probabilities(given: Sequence[float], members: int) -> tuple[float, ...]:
    """Return the probabilities of so many members.

    Raises:
        InputError: there is not one for each, one is negative, or they do not add up to 1.
    """
    values = tuple(float(value) for value in given)
    if len(values) != members or not members:
        raise InputError(f"there are {members} members and {len(values)} probabilities; give one for each")
    if not all(0 <= value <= 1 for value in values) or not math.isclose(sum(values), 1, abs_tol=_TOLERANCE):
        raise InputError(f"the probabilities of the members are {values}; they must be at least 0 and add up to 1")
    return values


def check_members(model: Network, members: Members, x: Tensor) -> None:
    """Check on a few images ``x`` that the model answers as one of its members does, and these without noise.

    Raises:
        InputError: a member draws noise of its own, or the model is more than a choice among its members.
    """
    with torch.no_grad(), isolated_rng():
        for number, network in enumerate(members.networks):
            first, second = logits_of(network, x), logits_of(network, x)
            if not torch.allclose(first, second, rtol=1e-4, atol=1e-4):
                raise InputError(f"member {number} draws noise of its own, so that there are more than finitely many")
        answers = torch.stack([logits_of(network, x) for network in members.networks])
        for _ in range(_PASSES):
            away = (logits_of(model, x) - answers).abs().amax(dim=2).amin(dim=0)
            if bool((away > 1e-3 * (1 + answers.abs().max())).any()):
                raise InputError(
                    "the model answers as none of its members does; each must hold all that is done to an image, its "
                    "normalisation too"
                )


def expected_correct(members: Members, x: Tensor, y: Tensor) -> Tensor:
    """Return how likely each image (N, C, H, W) is to be classified as its label ``y``: (N,), exact."""
    return expectation(members, answers_right(members, x, y))


def answers_right(members: Members, x: Tensor, y: Tensor) -> Tensor:
    """Return which member classifies which image as its label ``y``: (M, N), bool."""
    with torch.no_grad():
        return torch.stack([logits_of(network, x).argmax(dim=1) == y for network in members.networks])


def expectation(members: Members, right: Tensor) -> Tensor:
    """Return the mean of ``right`` (M, N) over the members as they are drawn, (N,)."""
    return torch.tensor(members.probabilities, dtype=torch.float64, device=right.device) @ right.double()
