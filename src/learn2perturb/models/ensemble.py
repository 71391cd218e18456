"""A network that answers by one of several, drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_choice
from learn2perturb.engine.finite import checked_probabilities

_SHARING = ("per_example", "per_batch")


@final
class RandomEnsemble(nn.Module):
    """Networks of which one, drawn anew in every pass, answers: for each image, or with ``per_batch`` for all of them.

    Pinot et al., Randomization matters, 2020, https://arxiv.org/abs/2002.11565 (two members, 0.9 and 0.1); Dbouk,
    Shanbhag, 2023, https://arxiv.org/abs/2302.01375. There are finitely many outcomes, so accuracy is known exactly:
    ``learn2perturb.evaluation.exact_accuracy``; the attack for it is ``learn2perturb.attacks.ARC``.

    Args:
        members: networks from images in [0, 1] to logits, normalisation included.
        probabilities: how likely each is to answer; equal where none are given.
        sharing: ``"per_example"`` or ``"per_batch"``.

    Raises:
        ConfigError: an unknown sharing.
        InputError: there is not one probability for each member, or they do not add up to 1.
    """

    def __init__(
        self,
        members: Iterable[nn.Module],
        probabilities: Sequence[float] | None = None,
        *,
        sharing: str = "per_example",
    ) -> None:
        super().__init__()
        check_choice("sharing", sharing, _SHARING)
        self.members = nn.ModuleList(members)
        count = len(self.members)
        self.probabilities = checked_probabilities(
            [1 / count] * count if probabilities is None else probabilities, count
        )
        self.sharing = sharing

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        draws = 1 if self.sharing == "per_batch" else len(x)
        chosen = torch.multinomial(torch.tensor(self.probabilities, device=x.device), draws, replacement=True)
        if draws == 1:
            answer: Tensor = self.members[int(chosen)](x)
            return answer
        rows = [(chosen == number).nonzero().squeeze(1) for number in range(len(self.members))]
        asked = [(own, member(x[own])) for own, member in zip(rows, self.members, strict=True) if len(own)]
        order = torch.cat([own for own, _ in asked]).argsort()
        return torch.cat([logits for _, logits in asked])[order]
