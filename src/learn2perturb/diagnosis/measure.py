"""The bench: craft attacks on one model, score them on another, with streams of draws of their own, and keep count."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learn2perturb.attacks import PGD, SPSA, Attack
from learn2perturb.attacks.listening import passes_told_to
from learn2perturb.attacks.losses import margin
from learn2perturb.diagnosis.budget import Budget
from learn2perturb.diagnosis.record import Measurement
from learn2perturb.engine import execution
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.identity import fingerprint
from learn2perturb.engine.modes import dropouts_off
from learn2perturb.engine.random import derive_seed, seed_everything
from learn2perturb.engine.ranks import ALONE, Ranks
from learn2perturb.evaluation.intervals import Scores, accuracy_interval, passes_of
from learn2perturb.evaluation.pace import Pace
from learn2perturb.evaluation.parts import attacked
from learn2perturb.evaluation.passes import Model, checked_logits, classes_of
from learn2perturb.evaluation.pieces import NOTHING, Pieces
from learn2perturb.evaluation.rows import settings_of
from learn2perturb.noise import noise_disabled
from learn2perturb.progress import Progress
from learn2perturb.records import PackedBits, plain

T = TypeVar("T")
_KEPT = 8  # attacks whose images are kept to the end


def digest(*images: Tensor) -> str:
    """Return a hash of tensors, for the keys of what follows from them."""
    return fingerprint((str(number), one) for number, one in enumerate(images))


def _joined(*parts: object) -> object:
    """Return a key of several parts, of which the first may be unknown: then the whole is."""
    return None if None in parts[:2] else parts


@final
@dataclass(frozen=True)
class Subject:
    """A model in one of the states that a diagnosis attacks or scores it in: as it is, or with its noise off.

    A diagnosis has one :class:`~learn2perturb.evaluation.target.Target`, the model as its user gave it, with device and
    metadata; and several of these: that model contained, without its noise, sources of transfer attacks.

    Attributes:
        model: what is called.
        stochastic: whether two passes of it differ.
        quiet: whether its noise and its dropouts are switched off while it is used.
        gradient: whether attacks may use its gradient. Where not, SPSA takes their place.
        identity: all that its answers follow from, as plain values; None where that is not known.
    """

    model: Model
    stochastic: bool
    quiet: bool = False
    gradient: bool = True
    identity: object = None

    @property
    def key(self) -> object:
        """What tells the work on it from that on any other; None where nothing does."""
        known = self.identity, self.stochastic, self.quiet, self.gradient
        return None if self.identity is None else known

    @contextlib.contextmanager
    def ready(self) -> Iterator[Model]:
        """Switch the noise as it is to be."""
        with contextlib.ExitStack() as stack:
            if self.quiet and isinstance(self.model, nn.Module):
                stack.enter_context(noise_disabled(self.model))
                stack.enter_context(dropouts_off(self.model))
            yield self.model

    def suited(self, attack: Attack) -> Attack:
        """Return the attack without the EOT that a model without noise has no use for."""
        return attack if self.stochastic else dataclasses.replace(attack, eot=1)


@final
@dataclass(frozen=True, eq=False)
class Attacked:
    """Adversarial images (n) and which of them were classified rightly in each scoring."""

    name: str
    x: Tensor
    scores: Scores

    @property
    def accuracy(self) -> float:
        """Mean over scorings and images."""
        return self.scores.mean()

    def first(self, n: int) -> Scores:
        """Return the scores of the first ``n`` images."""
        return self.scores.first(n)


@final
class Bench:
    """Everything that the checks share: the model, its images, the budget, and what was measured so far."""

    def __init__(
        self,
        subject: Subject,
        x: Tensor,
        y: Tensor,
        attack: PGD,
        budget: Budget,
        *,
        seed: int,
        mode: execution.ExecutionMode,
        batch_size: int,
        expected_passes: float,
        progress: Progress | None,
        ranks: Ranks = ALONE,
        pieces: Pieces = NOTHING,
    ) -> None:
        self.ranks, self.pieces = ranks, pieces  # that share the batches; of them that were finished before
        self.subject, self.x, self.y, self.attack, self.budget = subject, x, y, attack, budget
        self.seed, self.mode, self.batch_size, self.progress = seed, mode, batch_size, progress
        self._fits = Halving()
        self.measurements: list[Measurement] = []
        self.rivals: dict[str, float] = {}
        # The images of the strongest of them, to be scored again.
        self.kept: dict[str, Tensor] = {}
        self._passes, self._expected = 0.0, expected_passes
        self.stage = ""  # what is going on, beside the attack in hand
        with subject.ready() as model:
            self.num_classes = classes_of(model, x)

    def attacked(
        self,
        name: str,
        attack: Attack,
        n: int,
        *,
        source: Subject | None = None,
        victim: Subject | None = None,
        targets: Tensor | None = None,
        rival: bool = True,
    ) -> Attacked:
        """Attack the first ``n`` images with ``source`` as the model, score them on ``victim``; both default to ours.

        ``rival``: whether the result is an accuracy of our model at the size that is diagnosed, so that it may be the
        lowest that is known.
        """
        source, victim = source or self.subject, victim or self.subject
        attack = source.suited(attack if source.gradient or not attack.needs_gradient else self._descent(attack))
        batches, before, made, pace = self.batches(n), self._passes, 0.0, Pace(attack)
        worth = 1.0 if attack.needs_gradient else 1 / 3
        with source.ready() as model, execution.running(self.mode):

            def one(batch: int) -> tuple[Tensor, dict[str, float]]:
                nonlocal made
                rows = batches[batch]

                def within(share: float) -> None:
                    passes = self._passes + self.ranks.world * share * pace.expected * worth * len(x)
                    self._tell(passes, name, (rows.start + share * len(x)) / n)

                x = self.mode.place_images(self.x[rows])
                y = self.y[rows] if targets is None else targets[rows]
                own = dataclasses.replace(attack, seed=derive_seed(self.seed, "diagnose", name, batch))
                with passes_told_to(pace.listener(len(x), within)):
                    result = attacked(own, model, x, y, self._fits)
                pace.took(result.forward_passes)
                passes = len(x) * max(result.backward_passes, result.forward_passes / 3)
                made += passes
                self.spend(passes, name, rows.stop / n)
                told = {
                    "forwards": result.forward_passes * len(x), "backwards": result.backward_passes * len(x),
                    "seconds": result.seconds, "passes": passes,
                }  # fmt: skip
                return result.x_adv.to(self.x.dtype).contiguous(), told

            key = _joined(
                source.key, victim.key, "attack", name, type(attack).__name__, settings_of(attack), n,
                None if targets is None else fingerprint([("targets", targets)]),
            )  # fmt: skip
            found = self.each(one, len(batches), key)
        forwards, backwards, seconds, passes = (
            sum((told[key] for _, told in found), 0.0) for key in ("forwards", "backwards", "seconds", "passes")
        )
        self._passes = before
        self._settle(passes, made)
        x_adv = torch.cat([part for part, _ in found])
        scores = self.score(name, x_adv, victim)
        parameters = plain(attack)
        parameters.pop("seed", None)
        alone = source is self.subject and victim is self.subject and targets is None and source.gradient
        self._keep(
            name, type(attack).__name__, parameters, scores, forwards / n, backwards / n, seconds, by_itself=alone
        )
        if rival and victim is self.subject:
            self.rivals[name] = scores.mean()
        if victim is self.subject and (attack.norm, attack.eps) == (self.attack.norm, self.attack.eps):
            self._keep_images(name, x_adv)
        return Attacked(name, x_adv, scores)

    def scored(self, name: str, x: Tensor, *, kind: str, rival: bool = False) -> Attacked:
        """Score images that no attack of ours has just made, on our model."""
        scores = self.score(name, x, self.subject)
        self._keep(name, kind, {}, scores, 0.0, 0.0, 0.0)
        if rival:
            self.rivals[name] = scores.mean()
            self._keep_images(name, x)
        return Attacked(name, x, scores)

    def measured(self, name: str) -> Measurement:
        """Return the measurement of that name."""
        return next(one for one in self.measurements if one.name == name)

    def record(self, name: str, of: str, scores: Scores) -> None:
        """Keep another scoring of the images of the measurement ``of``."""
        one = self.measured(of)
        self._keep(
            name, one.attack, one.parameters, scores, one.forward_passes, one.backward_passes, one.seconds,
            by_itself=one.by_itself,
        )  # fmt: skip

    def _keep_images(self, name: str, x: Tensor) -> None:
        """Keep images, unless those of enough stronger attacks are there: all of them would be much memory."""
        self.kept[name] = x
        accuracy = {one.name: one.accuracy for one in self.measurements}
        # Of equally strong ones the earlier: the order of a set would be another in each process.
        for weakest in sorted((key for key in self.kept if key != "reported"), key=lambda key: accuracy[key])[_KEPT:]:
            del self.kept[weakest]

    def assembled(self, name: str, parts: Sequence[Attacked], winner: NDArray[np.int64]) -> Attacked:
        """Keep for image i what part ``winner[i]`` found and how it was scored, by draws that chose no winner."""
        images = np.arange(len(winner))
        draws = min(len(part.scores.correct) for part in parts)
        correct = np.stack([part.scores.correct[:draws] for part in parts])[winner, :, images].T
        scores = dataclasses.replace(parts[0].scores, correct=correct)
        x = torch.stack([part.x for part in parts])[torch.as_tensor(winner), torch.as_tensor(images)]
        self._keep(name, "best of", {}, scores, 0.0, 0.0, 0.0)
        self.rivals[name] = scores.mean()
        self._keep_images(name, x)
        return Attacked(name, x, scores)

    def score(self, name: str, x: Tensor, victim: Subject) -> Scores:
        """Return which images were classified rightly in each scoring: fresh draws from a stream of its own."""
        with torch.no_grad(), victim.ready() as model:

            def right(rows: slice, batch: int, draw: int) -> Tensor:
                seed_everything(self.seed, "score", name, batch, draw)
                return checked_logits(model, x[rows]).argmax(dim=1) == self.y[rows]

            draws, key = self.budget.scorings if victim.stochastic else 1, ("score", name, digest(x))
            return self.scorings(right, len(x), draws, victim, key)

    def scorings(
        self, right: Callable[[slice, int, int], Tensor], n: int, draws: int, victim: Subject, key: object = None
    ) -> Scores:
        """Return the scores of which ``right`` tells those of some rows, by the number of their batch and the draw.

        ``key`` says what they follow from beside the victim; None: they are not kept.
        """
        batches = self.batches(n)

        def one(number: int) -> Tensor:
            draw, batch = divmod(number, len(batches))
            return right(batches[batch], batch, draw)

        found = torch.cat(self.each(one, draws * len(batches), _joined(victim.key, key, n)))
        return Scores(found.view(draws, n).cpu().numpy(), passes_of(n, self.batch_size), victim.stochastic)

    def mean_margin(self, purpose: str, x: Tensor, y: Tensor, draws: int) -> Tensor:
        """Return ``max_{j != y} z_j - z_y`` of each image, the mean over fresh draws, shape (n,)."""
        return self._mean(purpose, x, draws, ("margin", digest(y)), lambda logits, rows: margin(logits, y[rows]))

    def mean_success(self, purpose: str, x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Return the share (n,) of fresh draws in which each image is wrong, and the mean margin over the same."""

        def value(logits: Tensor, rows: slice) -> Tensor:
            wrong = logits.argmax(dim=1) != y[rows]
            return torch.stack([wrong.to(logits.dtype), margin(logits, y[rows])], dim=1)

        return tuple(self._mean(purpose, x, draws, ("success", digest(y)), value).unbind(dim=1))  # type: ignore[return-value]

    def mean_logits(self, purpose: str, x: Tensor, draws: int) -> Tensor:
        """Return the logits (n, classes), the mean over fresh draws."""
        return self._mean(purpose, x, draws, "logits", lambda logits, _: logits)

    def vote(self, purpose: str, x: Tensor, y: Tensor, draws: int) -> float:
        """Return the accuracy of the mean probability over fresh draws."""
        mean = self._mean(purpose, x, draws, "vote", lambda logits, _: logits.softmax(dim=1))
        return float((mean.argmax(dim=1) == y).float().mean())

    def _mean(
        self, purpose: str, x: Tensor, draws: int, what: object, value: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """Return the mean over fresh draws of a ``value`` of logits; ``what`` tells it from others."""
        draws = draws if self.subject.stochastic else 1
        batches = self.batches(len(x))
        with torch.no_grad(), self.subject.ready() as model:

            def one(batch: int) -> Tensor:
                rows = batches[batch]
                seed_everything(self.seed, purpose, batch)
                total = value(checked_logits(model, x[rows]), rows)
                for _ in range(draws - 1):
                    total = total + value(checked_logits(model, x[rows]), rows)
                return total / draws

            return torch.cat(self.each(one, len(batches), _joined(self.subject.key, what, purpose, draws, digest(x))))

    def _descent(self, attack: Attack) -> Attack:
        """Return what stands for an attack by gradients where there are none: a descent on values in the same ball.

        Every direction has draws of its own, so that it needs no EOT.
        """
        steps, directions = self.budget.descent_steps, self.budget.descent_directions
        return SPSA(attack.eps, norm=attack.norm, targeted=attack.targeted, steps=steps, directions=directions)

    def each(self, work: Callable[[int], T], count: int, key: object = None) -> list[T]:
        """Return what ``work`` gives for each number below ``count``; the processes share it, see ``shared_work``.

        ``key``: all that it follows from beside the model, its images, the attack that is reported, the budget and the
        seed, so that what a process before this one has finished is taken from there; None: it is never kept.
        """
        return self.pieces.each(work, count, key, self.x.device, self.ranks)

    def spend(self, passes: float, name: str, share: float) -> None:
        """Count passes of this process, and tell of what, and what ``share`` of it is done."""
        self._passes += self.ranks.world * passes
        self._tell(self._passes, name, share)

    def _settle(self, passes: float, made: float) -> None:
        """Count the passes of all processes; what was finished before is neither done here nor left to be done."""
        found_before = passes - made if self.ranks.alone else 0.0
        self._passes += passes - found_before
        self._expected -= found_before

    def _tell(self, passes: float, name: str, share: float) -> None:
        if self.progress is not None:
            what = f"{self.stage}, {name}" if self.stage else name
            self.progress(passes, max(self._expected, passes), f"{what} ({share:.0%})")

    def batches(self, n: int) -> list[slice]:
        """Return the rows of each pass over the first ``n`` images."""
        return [slice(start, min(start + self.batch_size, n)) for start in range(0, n, self.batch_size)]

    def _keep(
        self,
        name: str,
        kind: str,
        parameters: dict[str, Any],
        scores: Scores,
        forwards: float,
        backwards: float,
        seconds: float,
        by_itself: bool = False,
    ) -> None:
        self.measurements.append(
            Measurement(
                name=name,
                attack=kind,
                parameters=parameters,
                n=scores.n,
                accuracy=scores.mean(),
                interval=accuracy_interval(scores),
                correct=PackedBits.pack(scores.correct),
                forward_passes=forwards,
                backward_passes=backwards,
                seconds=seconds,
                by_itself=by_itself,
            )
        )
