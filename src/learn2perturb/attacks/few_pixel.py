"""The few-pixel attack: differential evolution over the places and colours of k pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import Average, values_of
from learn2perturb.attacks.losses import LOSSES
from learn2perturb.attacks.probing import apart
from learn2perturb.attacks.query import Query
from learn2perturb.checks import check_choice, check_count
from learn2perturb.engine import execution, windows
from learn2perturb.errors import ConfigError, InputError

STRATEGIES = ("best1bin", "rand1")
# Of a stochastic model: the share of each population that is scored anew in every generation, and the fresh draws that
# choose among them at the end.
_ELITE = 0.1
_FINAL_DRAWS = 20


class _Swarm(NamedTuple):
    """The populations, of P candidates, of the A images still attacked.

    Attributes:
        image: (A,) which images those are.
        genes: (A, P, k, 2 + C) row, column, colour of each pixel of each candidate, all in [0, 1].
        score: (A, P) fitness, larger is better: the mean over ``seen`` scorings.
        margin: (A, P) mean margin of the last scoring, positive where the candidate has its way.
        seen: (A, P) number of scorings.
    """

    image: Tensor
    genes: Tensor
    score: Tensor
    margin: Tensor
    seen: Tensor

    def of(self, kept: Tensor) -> _Swarm:
        """Return the populations of some of the images."""
        return _Swarm(*(part[kept] for part in self))

    def fitter(self, trial: _Swarm) -> _Swarm:
        """Return the populations in which a trial has replaced its parent where it is fitter."""
        better = trial.score > self.score
        genes = torch.where(better[..., None, None], trial.genes, self.genes)
        rest = (torch.where(better, new, old) for new, old in zip(trial[2:], self[2:], strict=True))
        return _Swarm(self.image, genes, *rest)


@final
@dataclass(frozen=True)
class FewPixel(Attack):
    """Change at most k pixels, found by differential evolution: a black-box attack, it asks for logits only.

    A candidate is k times (row, column, colour). Places start uniform, colours ``N(128, 127) / 255`` clipped. A trial
    is ``best + F (a - b)``, ``F ~ U[.5, 1)`` (``best1bin`` with crossover 1), or ``a + .5 (b - c)`` (``rand1``, the
    paper's), a, b, c other members of the population; what leaves [0, 1] is drawn anew. It replaces its parent if
    it is fitter: the loss, which for ``ce`` orders candidates as the probability of y does.

    The generations of all images are scored together; passes with one pixel may compute what it reaches alone (see
    ``engine.windows``). On a deterministic model an image leaves as soon as a candidate fools it; images that are
    misclassified already stay as they are. On a stochastic model a lucky draw fools nobody: fitness averages ``eot``
    draws, the fittest tenth is scored again in every generation (the mean over all its scorings counts), and the final
    choice is by the mean margin over 20 fresh draws.
    Su, Vargas, Sakurai, One pixel attack for fooling deep neural networks, 2019, https://arxiv.org/abs/1710.08864.

    Attributes:
        eps: k, the number of pixels (all channels of one place), a whole number.
        norm: ``"l0"``: the number of places that changed.
        population, generations: size and number of the generations; the first one is drawn, not evolved.
        strategy: ``"best1bin"`` or ``"rand1"``.
        chunk: candidates in one pass; None suits the device.
    """

    eps: float = 1
    norm: str = field(default="l0", kw_only=True)
    eot_average: Average = field(default="probability", kw_only=True)
    population: int = field(default=400, kw_only=True)
    generations: int = field(default=75, kw_only=True)
    strategy: Literal["best1bin", "rand1"] = field(default="best1bin", kw_only=True)
    chunk: int | None = field(default=None, kw_only=True)

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps != int(self.eps):
            raise ConfigError(f"eps of a few-pixel attack is a number of pixels, 1, 2, 3, ..., got {self.eps!r}")
        check_count("population", self.population)
        if self.population < 4:  # a trial is made of three other members
            raise ConfigError(f"population must be at least 4, got {self.population}; the paper has 400")
        check_count("generations", self.generations)
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.chunk is not None:
            check_count("chunk", self.chunk)

    @property
    def pixels(self) -> int:
        """The number of pixels that may change."""
        return int(self.eps)

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken."""
        return True

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the images with the best candidates painted in.

        Costs up to ``population (generations + 1)`` forward passes of each image, times ``eot`` on a stochastic model.

        Raises:
            InputError: the images have fewer than k pixels.
        """
        if x[0, 0].numel() < self.pixels:
            raise InputError(f"eps={self.pixels} pixels are more than the {x[0, 0].numel()} of an image; lower eps")
        with torch.no_grad():
            fixed = query.deterministic(x)
            found = x.clone()
            start = torch.arange(len(x), device=x.device)
            if fixed:
                start = start[query.score(x, y, 1) <= 0]
                query.left = len(start)
            if len(start):
                self._evolve(_Search(self, query, x, y, fixed), start, found)
        return found

    def _evolve(self, search: _Search, image: Tensor, found: Tensor) -> None:
        """Evolve populations for the images numbered ``image``; write what is found into ``found``."""
        swarm = search.scored(image, self._first(len(image), search.x))
        newest = swarm
        for _ in range(self.generations):
            if search.fixed:
                swarm = swarm.of(search.unbroken(newest, found))
                search.query.left = len(swarm.image)
                if not len(swarm.image):
                    return
            newest = search.scored(swarm.image, self._trials(swarm))
            if not search.fixed:
                swarm = search.elite_again(swarm)
            swarm = swarm.fitter(newest)
        if search.fixed:
            swarm = swarm.of(search.unbroken(newest, found))
        if len(swarm.image):
            found[swarm.image] = search.best(swarm)

    def _first(self, images: int, x: Tensor) -> Tensor:
        shape = (images, self.population, self.pixels, 2 + x.shape[1])
        genes = torch.rand(shape, dtype=x.dtype, device=x.device)
        genes[..., 2:].normal_(128 / 255, 127 / 255).clamp_(0, 1)
        return genes

    def _trials(self, swarm: _Swarm) -> Tensor:
        genes = swarm.genes
        count = len(genes)
        if self.strategy == "best1bin":
            base = genes[torch.arange(count, device=genes.device), swarm.score.argmax(dim=1)].unsqueeze(1)
            first, second = _others(genes, 2)
            scale = torch.empty(count, 1, 1, 1, dtype=genes.dtype, device=genes.device).uniform_(0.5, 1)
        else:
            base, first, second = _others(genes, 3)
            scale = torch.full((), 0.5, dtype=genes.dtype, device=genes.device)
        trial = base + scale * (first - second)
        return torch.where((trial < 0) | (trial > 1), torch.rand_like(trial), trial)


@final
class _Search:
    """Paints and scores the candidates of one call."""

    def __init__(self, attack: FewPixel, query: Query, x: Tensor, y: Tensor, fixed: bool) -> None:
        self.attack, self.query, self.x, self.y, self.fixed = attack, query, x, y, fixed
        self.draws = 1 if fixed else attack.eot
        self.elite = math.ceil(_ELITE * attack.population)
        # Draws differ from the first noise on, wherever a window is; pixels far apart leave little outside of it.
        self.in_windows = fixed and attack.pixels == 1 and windows.serve(query.model) and self._windows_agree()
        self.chunk = attack.chunk or windows.rows_at_once(x, self.in_windows)

    def paint(self, image: Tensor, genes: Tensor) -> Tensor:
        """Return the images (M, C, H, W) numbered ``image`` (M,), each with the pixels ``genes`` (M, k, 2 + C)."""
        painted = execution.current().place_images(self.x.index_select(0, image))
        every = torch.arange(len(painted), device=painted.device)
        # Pixel after pixel: of two at one place the later one shows, on every device.
        for pixel in genes.unbind(dim=1):
            row, column, colour = self._pixel(pixel)
            painted[every, :, row, column] = colour
        return painted

    def windowed(self, image: Tensor, genes: Tensor) -> windows.Windowed:
        """Return what :meth:`paint` does, for one pixel, as a batch of which passes compute the windows alone."""
        shown, owner = image.unique_consecutive(return_inverse=True)
        row, column, colour = self._pixel(genes[:, 0])
        base = execution.current().place_images(self.x.index_select(0, shown))
        return windows.Windowed(base, owner, row, column, colour[:, :, None, None])

    def _pixel(self, genes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row (M,), column (M,) and colour (M, C) that genes (M, 2 + C) stand for."""
        row, column = (
            (genes[:, axis] * size).long().clamp_(max=size - 1) for axis, size in enumerate(self.x.shape[2:])
        )
        return row, column, genes[:, 2:]

    def _windows_agree(self) -> bool:
        """Tell whether the model answers to windows as to whole images, in full precision."""
        with apart("windows"):
            image = torch.randint(len(self.x), (windows.COMPARED,), device=self.x.device).sort().values
            genes = torch.rand(windows.COMPARED, 1, 2 + self.x.shape[1], dtype=self.x.dtype, device=self.x.device)
            with execution.running(execution.PLAIN):
                return windows.agree(self.query.logits, self.paint(image, genes), self.windowed(image, genes))

    def scored(self, image: Tensor, genes: Tensor) -> _Swarm:
        """Return the candidates (A, P, k, 2 + C) of the images (A,) with their fitness, in passes of bounded size."""
        owner = image.repeat_interleave(genes.shape[1])
        flat = genes.flatten(0, 1)
        paint = self.windowed if self.in_windows else self.paint
        parts = [
            self._values(paint(some, candidates), self.y[some])
            for some, candidates in zip(owner.split(self.chunk), flat.split(self.chunk), strict=True)
        ]
        score, margins = (torch.cat(values).view(genes.shape[:2]) for values in zip(*parts, strict=True))
        return _Swarm(image, genes, score, margins, torch.ones_like(score))

    def _values(self, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return fitness and margin (M,) of each image, means over the draws."""
        attack = self.attack
        # The model may work on its input in place, so only the last draw may have the images themselves.
        draws = [self.query.logits(images.clone()) for _ in range(self.draws - 1)] + [self.query.logits(images)]
        values = values_of(draws, LOSSES[attack.loss], y, attack.eot_average)
        return (-values.loss, -values.margin) if attack.targeted else (values.loss, values.margin)

    def unbroken(self, newest: _Swarm, found: Tensor) -> Tensor:
        """Paint the candidates that fool the model into ``found``; return which populations (A,) have none."""
        margins, index = newest.margin.max(dim=1)
        kept = margins <= 0
        rows = (~kept).nonzero().squeeze(1)
        if len(rows):
            image = newest.image[rows]
            painted = self.paint(image, newest.genes[rows, index[rows]])
            broken = self.query.broken(painted, self.y[image], margins[rows])
            found[image[broken]] = painted[broken]
            kept[rows[~broken]] = True
        return kept

    def elite_again(self, swarm: _Swarm) -> _Swarm:
        """Return the populations with their fittest candidates scored once more; the mean of all scorings counts."""
        top = swarm.score.topk(self.elite, dim=1).indices
        again = self.scored(swarm.image, _members(swarm.genes, top))
        before, seen = swarm.score.gather(1, top), swarm.seen.gather(1, top)
        score = swarm.score.scatter(1, top, before + (again.score - before) / (seen + 1))
        return swarm._replace(score=score, seen=swarm.seen.scatter(1, top, seen + 1))

    def best(self, swarm: _Swarm) -> Tensor:
        """Return the images (A, C, H, W) with the best candidate each; where draws vary, judged by fresh ones."""
        if self.fixed:
            chosen = swarm.score.argmax(dim=1)
        else:
            top = swarm.score.topk(self.elite, dim=1).indices
            genes = _members(swarm.genes, top)
            total = sum(self.scored(swarm.image, genes).margin for _ in range(math.ceil(_FINAL_DRAWS / self.draws)))
            assert isinstance(total, Tensor)
            chosen = top.gather(1, total.argmax(dim=1, keepdim=True)).squeeze(1)
        return self.paint(swarm.image, _members(swarm.genes, chosen.unsqueeze(1)).squeeze(1))


def _members(genes: Tensor, index: Tensor) -> Tensor:
    """Return the candidates ``index`` (A, M) of each population."""
    return genes[torch.arange(len(genes), device=genes.device).unsqueeze(1), index]


def _others(genes: Tensor, count: int) -> list[Tensor]:
    """Return ``count`` different members of its population for every candidate, none of them itself."""
    images, size = genes.shape[:2]
    taken = torch.arange(size, device=genes.device).expand(images, size).unsqueeze(2)
    for _ in range(count):
        # Uniform over what is left: a number among those, moved up past every one taken below it.
        drawn = torch.randint(size - taken.shape[2], (images, size), device=genes.device)
        for one in taken.sort(dim=2).values.unbind(dim=2):
            drawn = drawn + (drawn >= one)
        taken = torch.cat([taken, drawn.unsqueeze(2)], dim=2)
    return [_members(genes, chosen) for chosen in taken.unbind(dim=2)[1:]]
