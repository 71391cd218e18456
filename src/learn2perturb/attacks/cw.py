"""The Carlini-Wagner l2 attack: the least perturbation that gives a margin, by Adam and a search for the constant."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.losses import margin
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import per_image
from learn2perturb.checks import check_choice, check_count, check_flag, check_size
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError

KEPT = ("mean", "single")
_BETAS, _TINY = (0.9, 0.999), 1e-8  # Adam's own
_INSIDE = 1 - 1e-6  # images are drawn in by this much, where atanh is finite
_CHECKS = 10  # of a search step: where an image leaves whose objective has not fallen at the last few of them
_STUCK = 0.9999
_PATIENCE = 3  # such checks; the published rule has one, of the sum over a batch, which wavers less than one image's
_JUDGEMENTS = 20  # of a search step, of the nearest candidate since the last one, on a stochastic model
_CONFIRMATION = 5  # iterations between the same in low precision, where a judgement is a single pass
_FALLING = 0.99  # of the objective, over a tenth of the steps: an image below has not converged
_SMOOTHING = 0.9  # of the margin along the path of a stochastic model: neighbours stand in for draws


@final
@dataclass(frozen=True)
class CW(Attack):
    """``min |x' - x|^2 + c max(kappa - margin, 0)``, ``x' = (tanh(w) + 1) / 2``, by Adam on ``w`` and a search for c.

    The margin is ``max_{j != y} Z_j - Z_y`` (its negative if ``targeted``). Each image has its own c: ten times as
    large until the margin exceeds kappa, then bisected; perturbation and Adam start anew with every c. Images that are
    misclassified by that margin stay as they are.

    On a deterministic model an image leaves a search step once its objective falls no more. On a stochastic one noise
    would make it leave, and would make lucky points look best: there every image takes all steps, the nearest
    candidate of each twentieth of a search step is judged by its mean margin over ``draws`` fresh draws, less its
    standard error, and only what stands is kept. ``keep="single"`` keeps what the draws
    of its own gradient let pass, as published results do.
    Carlini, Wagner, Towards Evaluating the Robustness of Neural Networks, 2017, https://arxiv.org/abs/1608.04644.

    Attributes:
        eps: infinite by default: the norms are the result. Finite: success is success inside the ball.
        confidence: kappa, the margin asked for, in logits.
        steps, search_steps: iterations for each ``c``, values of ``c``.
        lr: of Adam; the paper of Learn2Perturb has 5e-4, others 1e-2.
        initial_c, largest_c: the first ``c``, and the last that is tried.
        abort_early: images leave a search step as said above.
        keep: ``"mean"`` or ``"single"``.
        draws: fresh draws that judge a candidate on a stochastic model.
    """

    eps: float = math.inf
    norm: str = field(default="l2", kw_only=True)
    loss: str = field(default="margin", kw_only=True)
    confidence: float = field(default=0.0, kw_only=True)
    steps: int = field(default=1000, kw_only=True)
    search_steps: int = field(default=9, kw_only=True)
    lr: float = field(default=5e-4, kw_only=True)
    initial_c: float = field(default=1e-3, kw_only=True)
    largest_c: float = field(default=1e10, kw_only=True)
    abort_early: bool = field(default=True, kw_only=True)
    keep: Literal["mean", "single"] = field(default="mean", kw_only=True)
    draws: int = field(default=20, kw_only=True)

    minimum_norm: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    losses: ClassVar[tuple[str, ...]] = ("margin",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "search_steps", "draws"):
            check_count(name, getattr(self, name))
        for name in ("lr", "initial_c", "largest_c"):
            check_size(name, getattr(self, name), norm=self.norm)
        if (
            isinstance(self.confidence, bool)
            or not isinstance(self.confidence, int | float)
            or not self.confidence >= 0
        ):
            raise ConfigError(f"confidence must be a number of at least 0, in logits, got {self.confidence!r}")
        if self.largest_c < self.initial_c:
            raise ConfigError(f"largest_c={self.largest_c!r} is below initial_c={self.initial_c!r}; raise it")
        check_flag("abort_early", self.abort_early)
        check_choice("keep", self.keep, KEPT)

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave a search step once their objective falls no more."""
        return self.abort_early

    @property
    def window(self) -> int:
        """After how many steps the nearest candidate since the last judgement is judged, on a stochastic model."""
        return 1 if self.keep == "single" else max(1, self.steps // _JUDGEMENTS)

    @property
    def judging(self) -> int:
        """Forward passes over an image that judge candidates: those of ``keep="single"`` are made by then."""
        return 0 if self.keep == "single" else self.search_steps * math.ceil(self.steps / self.window) * self.draws

    @property
    def full_precision(self) -> bool:
        """Whether passes are in full precision: they need not be, what is kept is confirmed there."""
        return False

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the nearest points found, ``x`` where none is.

        Costs up to ``search_steps * steps * eot`` forward and backward passes, and on a stochastic model
        ``20 search_steps * draws`` forward passes that judge (with few steps, ``draws`` in each).
        """
        return _Search(self, query, x, y).run()


@final
@dataclass(eq=False)
class _State:
    """The images of a search step that are still in it; every field has one row an image."""

    row: Tensor  # in the batch
    x: Tensor
    y: Tensor
    c: Tensor
    w: Tensor
    first: Tensor  # Adam's moments
    second: Tensor
    objective: Tensor  # the lowest at a check
    waits: Tensor  # checks since then
    best: Tensor  # the nearest point kept, of all search steps
    norm: Tensor  # and its distance
    found: Tensor  # whether this c gave one
    candidate: Tensor  # the nearest point to be judged
    candidate_norm: Tensor
    smooth: Tensor  # margin along the path
    before: Tensor  # sums of the objective over the last tenth of the steps but one, and over the last
    last: Tensor

    def of(self, kept: Tensor) -> _State:
        """Return the state of some of the images."""
        return _State(**{item.name: getattr(self, item.name)[kept] for item in fields(self)})


@final
class _Search:
    """One call: what is kept for each image, and the search for its c."""

    def __init__(self, attack: CW, query: Query, x: Tensor, y: Tensor) -> None:
        self.attack, self.query, self.x, self.y = attack, query, x, y
        self.fixed = query.deterministic(x)
        self.best = x.clone()
        self.norm = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self.found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.falling = torch.zeros_like(self.found)
        self.c = torch.full_like(self.norm, attack.initial_c)
        self.lower, self.upper = torch.zeros_like(self.norm), torch.full_like(self.norm, torch.inf)
        if self.fixed:
            self.judges = execution.current().dtype is not None
            self.window = _CONFIRMATION if self.judges else 1
        else:
            self.judges, self.window = attack.keep != "single", attack.window

    def run(self) -> Tensor:
        """Return the nearest points."""
        rows = torch.arange(len(self.x), device=self.x.device)
        already = self._judged(self.x, self.y) > self.attack.confidence
        self.norm = torch.where(already, 0.0, self.norm)
        if self.fixed:
            rows = rows[~already]
        for _ in range(self.attack.search_steps):
            if not len(rows):
                break
            self.falling[rows] = False
            self._descend(self._start(rows))
            self._next_c()
        # Without an upper end no c was large enough: the search would have gone on.
        self.query.watch.unfinished(c_rising=(self.upper == torch.inf) & ~already)
        if self.fixed:  # noise of one draw a step, times a large constant, would look like a fall
            self.query.watch.unfinished(loss_falling=self.falling)
        return self.best

    def _start(self, rows: Tensor) -> _State:
        x = self.x[rows]
        none = torch.full_like(self.norm[rows], torch.inf)
        return _State(
            row=rows,
            x=x,
            y=self.y[rows],
            c=self.c[rows],
            w=torch.atanh((2 * x - 1) * _INSIDE),
            first=torch.zeros_like(x),
            second=torch.zeros_like(x),
            objective=none,
            waits=torch.zeros_like(rows),
            best=self.best[rows],
            norm=self.norm[rows],
            found=torch.zeros_like(rows, dtype=torch.bool),
            candidate=x.clone(),
            candidate_norm=none.clone(),
            smooth=torch.zeros_like(none),
            before=torch.zeros_like(none),
            last=torch.zeros_like(none),
        )

    def _descend(self, state: _State) -> None:
        """Run one search step; images leave it where the model is deterministic and the objective falls no more."""
        attack = self.attack
        abort = attack.abort_early and self.fixed
        tenth = max(1, attack.steps // _CHECKS)
        for step in range(attack.steps):
            point = (state.w.tanh() + 1) / 2
            values, gradient = self.query.value_and_gradient(point, state.y, loss=self._hinge)
            away = point - state.x
            square = away.flatten(1).square().sum(dim=1)
            # The objective to be minimised has minus the hinge, which is one to be maximised.
            gradient = 2 * away - per_image(state.c) * gradient
            self._propose(state, point, square.sqrt(), values.margin, step)
            if (step + 1) % self.window == 0 or step + 1 == attack.steps:
                self._settle(state)
            _adam(state, gradient.mul_(2 * point * (1 - point)), attack.lr, step + 1)
            objective = square - state.c * values.loss
            if step >= attack.steps - tenth:
                state.last = state.last + objective
            elif step >= attack.steps - 2 * tenth:
                state.before = state.before + objective
            if abort and step % tenth == 0:
                state.waits = torch.where(objective > _STUCK * state.objective, state.waits + 1, 0)
                state.objective = torch.minimum(objective, state.objective)
                stuck = state.waits >= _PATIENCE
                if bool(stuck.any()):
                    self._settle(state)
                    self._write(state.of(stuck))
                    state = state.of(~stuck)
                    if not len(state.row):
                        return
        self._write(state)
        self.falling[state.row] = state.last < _FALLING * state.before

    def _hinge(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return ``-max(kappa - margin, 0)`` of each row: of each draw, so that its mean is the objective's."""
        reached = -margin(logits, y) if self.attack.targeted else margin(logits, y)
        return (reached - self.attack.confidence).clamp_max(0.0)

    def _propose(self, state: _State, point: Tensor, norm: Tensor, margins: Tensor, step: int) -> None:
        """Remember the point as the candidate where it reaches the margin and is nearer than the last one."""
        if not self.fixed and self.window > 1:
            state.smooth = margins if step == 0 else torch.lerp(margins, state.smooth, _SMOOTHING)
            margins = state.smooth
        nearer = (margins > self.attack.confidence) & (norm < state.candidate_norm)
        state.candidate = torch.where(per_image(nearer), point, state.candidate)
        state.candidate_norm = torch.where(nearer, norm, state.candidate_norm)

    def _settle(self, state: _State) -> None:
        """Keep the candidates that stand."""
        stands = state.candidate_norm < torch.inf
        if self.judges:
            stands &= self._judged(state.candidate, state.y) > self.attack.confidence
        nearer = stands & (state.candidate_norm < state.norm)
        state.best = torch.where(per_image(nearer), state.candidate, state.best)
        state.norm = torch.where(nearer, state.candidate_norm, state.norm)
        state.found = state.found | stands
        state.candidate_norm = torch.full_like(state.candidate_norm, torch.inf)

    def _judged(self, points: Tensor, y: Tensor) -> Tensor:
        """Return margins (N,) that count: of fresh draws; of one pass in full precision where there is no noise."""
        if not self.fixed:
            draws = self.attack.eot if self.attack.keep == "single" else self.attack.draws
            margins = torch.stack([self.query.score(points, y, 1) for _ in range(draws)])
            # Less a standard error: among the many points judged, the nearest that pass are those with lucky draws.
            return margins.mean(dim=0) - margins.std(dim=0, correction=0) / math.sqrt(draws)
        with contextlib.nullcontext() if execution.current().dtype is None else execution.running(execution.PLAIN):
            return self.query.score(points, y, 1)

    def _write(self, state: _State) -> None:
        self.best[state.row], self.norm[state.row], self.found[state.row] = state.best, state.norm, state.found

    def _next_c(self) -> None:
        """Bisect where both ends are known, else ten times as much."""
        found, c = self.found, self.c
        self.upper = torch.where(found, torch.minimum(self.upper, c), self.upper)
        self.lower = torch.where(found, self.lower, torch.maximum(self.lower, c))
        middle = (self.lower + self.upper) / 2
        self.c = torch.where(self.upper < torch.inf, middle, c * 10).clamp_max(self.attack.largest_c)
        self.found = torch.zeros_like(found)


def _adam(state: _State, gradient: Tensor, lr: float, step: int) -> None:
    """Move ``w`` by one step of Adam, the number ``step`` from 1."""
    one, two = _BETAS
    state.first.mul_(one).add_(gradient, alpha=1 - one)
    state.second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
    scale = state.second.sqrt().div_(math.sqrt(1 - two**step)).add_(_TINY)
    state.w.addcdiv_(state.first, scale, value=-lr / (1 - one**step))
