"""The Square attack on a deterministic network, several queries ahead: the same search, in fewer and fuller passes.

Few proposals are better than what they start from, so the next ones may be asked about before the answer to the first
is known: of each image those up to the first better one count, the ones after it are dropped. Nothing but rounding
differs from one query after the other with the same proposals; the dropped ones are passes that need not have been
made, and cost less than passes over few images do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from learn2perturb.attacks.probing import apart
from learn2perturb.attacks.proposals import MOVES, STARTS, Moves, Recolouring
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import per_image
from learn2perturb.engine import execution, windows

# What a pass costs beside its rows, in image points: on a CPU about 16 images of 32 x 32 of ResNet-20, two threads.
_POINTS_OF_A_PASS = {"cpu": 2**14}
_POINTS_OF_A_PASS_ELSEWHERE = 2**20
# What the image that windows differ from costs, in rows: what is computed of ResNet-20 for a small one is 0.6 of all.
_BASE = 1.7
_LARGEST_WINDOW = 0.2  # of the pixels; larger ones have grown over half of them after a few layers
_LONGEST = 500  # queries of an image whose proposals are drawn together


@final
class AheadSearch:
    """One run of the search, of N images that stand; where each of them is, which may be further than another.

    Args:
        query: the model that is asked.
        x, y: images (N, C, H, W), and their labels.
        eps, norm: of the ball.
        sides: side of the squares of each query, the first one's left out.
    """

    def __init__(self, query: Query, x: Tensor, y: Tensor, eps: float, norm: str, sides: list[int]) -> None:
        self.query, self.x, self.y, self.eps, self.norm = query, x, y, eps, norm
        self.sides = sides
        self.in_windows = norm == "linf" and windows.serve(query.model) and self._windows_agree()
        self.best = STARTS[norm](x, eps)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.accepted, self.asked = 1, 2  # as if one in two were better, before any answer

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the best point of each image, that which broke it if one did, and which images (N, bool) broke."""
        values = self.query.value(self.best, self.y)
        self.best_loss = values.loss  # of each image's best point
        self._leave(torch.arange(len(self.x), device=self.x.device), self.best, values.margin)
        for count, side in _stretches(self.sides):
            left = (~self.broken).nonzero().squeeze(1)
            if not len(left):
                break
            self._stretch(left, MOVES[self.norm].drawn(self.x[left], side, count), count)
        return self.best, self.broken

    def _stretch(self, left: Tensor, moves: Moves, count: int) -> None:
        """Make ``count`` queries of each image numbered ``left``, by ``moves``, those of an image in a row."""
        device = self.x.device
        at = torch.zeros(len(left), dtype=torch.int64, device=device)  # the next query of each
        accepted, asked = 0, 0
        while len(going := (at < count).nonzero().squeeze(1)):
            ahead = min(self._ahead(len(going), moves.side), count)
            numbers = at[going, None] + torch.arange(ahead, device=device)
            asked_now = numbers < count
            owner = torch.arange(len(going), device=device)[:, None].expand_as(numbers)[asked_now]
            chosen = moves.of((going[:, None] * count + numbers)[asked_now])
            loss, margin = self._scores(left[going], owner, chosen)
            better = loss > self.best_loss[left[going[owner]]]
            counts = torch.zeros_like(asked_now).masked_scatter(asked_now, better | (margin > 0))
            hit, first = counts.any(dim=1), counts.to(torch.int8).argmax(dim=1)
            done = torch.where(hit, first + 1, asked_now.sum(dim=1))
            at[going] += done
            # Of the rows of the pass, those of the first proposals that count.
            row = torch.zeros_like(numbers).masked_scatter(asked_now, torch.arange(len(owner), device=device))
            row = row[hit].gather(1, first[hit, None]).squeeze(1)
            images = left[going[hit]]
            points = chosen.of(row).shown(self.best[images], self.x[images], self.eps)
            self.best[images] = torch.where(per_image(better[row]), points, self.best[images])
            self.best_loss[images] = torch.where(better[row], loss[row], self.best_loss[images])
            at[going[hit]] += count * self._leave(images, points, margin[row])
            accepted, asked = accepted + len(row), asked + int(done.sum())
        self.accepted, self.asked = accepted + 1, asked + 2

    def _leave(self, images: Tensor, points: Tensor, margin: Tensor) -> Tensor:
        """Let those of the ``images`` leave that their ``points`` break; return which (bool)."""
        gone = self.query.broken(points, self.y[images], margin)
        if bool(gone.any()):
            self.best[images[gone]] = points[gone]
            self.broken[images[gone]] = True
            self.query.left = int((~self.broken).sum())
        return gone

    def _ahead(self, images: int, side: int) -> int:
        """Return how many proposals of each image to ask about at once.

        With a share a of better ones, k at once cost ``k + b`` rows, b those of the pass itself, and about ``a k / 2``
        of them in vain: the queries that count are cheapest at ``k = sqrt(2 b / a)``. At most ``1 / (2 a)``, of which a
        quarter is in vain, however cheap.
        """
        x = self.x
        own = _POINTS_OF_A_PASS.get(x.device.type, _POINTS_OF_A_PASS_ELSEWHERE) / x[0, 0].numel() / images
        small = self._is_small(side)
        between = self.asked / self.accepted  # better ones
        best = min(math.sqrt(2 * (own + (_BASE if small else 0)) * between), between / 2)
        # Whole images are no cheaper in more than one full pass.
        most = math.inf if small else windows.rows_at_once(x) / images
        return max(1, math.ceil(min(best, most)))

    def _scores(self, images: Tensor, owner: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
        """Return loss and margin (M,) of ``moves`` of the ``images``, each of the one with number ``owner`` (M,)."""
        small = self._is_small(moves.side)
        parts = []
        for rows in torch.arange(len(owner), device=owner.device).split(windows.rows_at_once(self.x, small)):
            of = images[owner[rows]]
            values = self.query.value(self._trial(of, moves.of(rows), small), self.y[of])
            parts.append((values.loss, values.margin))
        loss, margin = (torch.cat(part) for part in zip(*parts, strict=True))
        return loss, margin

    def _trial(self, images: Tensor, moves: Moves, small: bool) -> Tensor:
        place = execution.current().place_images
        if small and isinstance(moves, Recolouring):
            shown, owner = images.unique_consecutive(return_inverse=True)
            return moves.windowed(place(self.best[shown]), self.x[shown], self.eps, owner)
        return place(moves.shown(self.best[images], self.x[images], self.eps))

    def _is_small(self, side: int) -> bool:
        return self.in_windows and side**2 <= _LARGEST_WINDOW * self.x[0, 0].numel()

    def _windows_agree(self) -> bool:
        """Tell whether the model answers to windows as to whole images, in full precision."""
        with apart("windows"):
            few = self.x[: windows.COMPARED]
            moves = Recolouring.drawn(few, 1)
            best = STARTS["linf"](few, self.eps)
            owner = torch.arange(len(few), device=few.device)
            with execution.running(execution.PLAIN):
                whole = moves.shown(best, few, self.eps)
                return windows.agree(self.query.logits, whole, moves.windowed(best, few, self.eps, owner))


def _stretches(sides: list[int]) -> Iterator[tuple[int, int]]:
    """Yield how many queries in a row have squares of one side, at most ``_LONGEST``, and that side."""
    for side, alike in itertools.groupby(sides):
        count = len(list(alike))
        for start in range(0, count, _LONGEST):
            yield min(_LONGEST, count - start), side
