"""One row of an evaluation in the making: attack each batch, score it by fresh draws, and sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learn2perturb.attacks import Attack
from learn2perturb.attacks.listening import passes_told_to
from learn2perturb.engine import execution
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.engine.random import derive_seed, seed_everything
from learn2perturb.engine.ranks import Ranks
from learn2perturb.evaluation.image_keeper import Choice, Kept
from learn2perturb.evaluation.intervals import majority
from learn2perturb.evaluation.margins import Margins
from learn2perturb.evaluation.pace import Pace, guessed_passes, guessed_seconds
from learn2perturb.evaluation.parts import attacked
from learn2perturb.evaluation.passes import Model, checked_logits
from learn2perturb.evaluation.predictors import AVERAGE, probability_margins, scores, winners
from learn2perturb.evaluation.result import Row, statistics
from learn2perturb.noise import noise_disabled
from learn2perturb.records import plain

CONFIDENCE = 0.95
_COUNTS = ("zero_gradients", "c_rising", "loss_falling")  # of images, in an attack's result and in the row


@final
@dataclasses.dataclass
class _Batch:
    """What came of one batch: predictions (draws, images), pooled ones (images), and numbers to be summed up."""

    predictions: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))
    pooled: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, dtype=np.int64))
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    kept: Kept | None = None
    margins: Margins | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        kept = None if self.kept is None else self.kept.plain()
        return {
            "predictions": self.predictions.tolist(), "pooled": self.pooled.tolist(), "sums": self.sums, "kept": kept,
            "margins": None if self.margins is None else [self.margins.right, self.margins.wrong],
        }  # fmt: skip

    @classmethod
    def of(
        cls,
        predictions: list[list[int]],
        pooled: list[int],
        sums: dict[str, float],
        kept: dict[str, str] | None,
        margins: list[list[int]] | None,
    ) -> _Batch:
        """Return what :meth:`plain` gave."""
        images = None if kept is None else Kept.of(**kept)
        counted = None if margins is None else Margins(*map(tuple, margins))
        return cls(np.array(predictions, dtype=np.int64), np.array(pooled, dtype=np.int64), sums, images, counted)


@final
class RowRun:
    """One row in the making: what to run on each batch, and what came out so far."""

    def __init__(
        self,
        name: str,
        attack: Attack | None,
        *,
        noise: bool,
        switched: bool,
        stochastic: bool,
        predictors: tuple[str, ...],
        draws: int,
        members: int,
        seed: int,
        mode: execution.ExecutionMode,
    ) -> None:
        self.mode = mode
        self.name, self.noise, self.switched, self.stochastic, self.seed = name, noise, switched, stochastic, seed
        # Without noise all predictors are one and the same, so one run serves the rows of all.
        self.predictors = predictors
        self.predictor = predictors[0]
        self.draws = draws if stochastic else 1
        self.members = members if stochastic and self.predictor != "single" else 1
        self.attack = None if attack is None else _adapted(attack, self.predictor, self.members, stochastic)
        self.on_single = None if attack is None else _adapted(attack, "single", 1, stochastic)
        self.pace = None if self.attack is None else Pace(self.attack, stochastic)
        self.pools = stochastic and self.predictor == "single" and self.draws > 1
        self.batches: dict[int, _Batch] = {}
        self.fits = Halving()

    def compile_if_long(self, pixels: int, rows: int) -> None:
        """Attack in compiled passes of ``rows`` images if that is worth it for ``pixels``: all images, once."""
        # Of a model without noise, images drop out of some attacks as they are broken, so batches have no one size.
        if self.stochastic:
            passes = math.prod(getattr(self.attack, name, 1) for name in ("steps", "eot", "restarts"))
            self.mode = execution.with_compiled_attack(self.mode, pixels * passes, rows)

    @property
    def identity(self) -> tuple[object, ...]:
        """All that the rows follow from, beside model, images and seed."""
        attack = None if self.attack is None else (type(self.attack).__name__, settings_of(self.attack))
        switches = self.noise, self.switched, self.stochastic
        return self.name, attack, switches, self.predictors, self.draws, self.members, repr(self.mode)

    @property
    def numbers(self) -> dict[str, Any]:
        """Those settings of the attack that are the same in every process: no object's address is among them."""
        settings = {} if self.attack is None else settings_of(self.attack)
        return {name: value for name, value in settings.items() if value is None or isinstance(value, (int, float))}

    def queries(self, images: int) -> float:
        """Return about how many passes of an image the row takes, in batches of so many ``images``."""
        scorings = self.draws * self.members
        if self.attack is None:
            return scorings
        return scorings + guessed_passes(self.attack, images, stochastic=self.stochastic)

    def seconds_each(self, images: int, one_pass: float, *, single: bool = False) -> float:
        """Return about how long an image of the row takes, where a pass of an image takes ``one_pass`` seconds.

        ``single``: if single draws were attacked and scored in place of its predictor.
        """
        scored = self.draws * (1 if single else self.members) * one_pass
        attack = self.on_single if single else self.attack
        if attack is None:
            return scored
        mode = execution.in_full_precision(self.mode) if attack.full_precision else self.mode
        # Forward and back: about three forward passes.
        one_pass *= execution.guessed_pace(mode)  # the pass that was timed was plain
        seconds = {"forward": one_pass, "both": 3 * one_pass}
        return scored + guessed_seconds(attack, images, **seconds, stochastic=self.stochastic)

    @property
    def drops(self) -> bool:
        """Whether images may leave its attack before the end."""
        return self.attack is not None and self.attack.drops and not self.stochastic

    @property
    def label(self) -> str:
        """What progress shows."""
        eps = "" if self.attack is None else f" eps {self.attack.eps:.4g}"
        return f"{self.name}{eps}{'' if self.noise else ', noise off'}, {self.predictor}"

    def add(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        batch: int,
        tell: Callable[[float], object],
        choose: Choice | None = None,
    ) -> None:
        """Attack and score one batch; ``tell`` is called with the share of it that is done.

        ``choose`` says by the predictions which of the attacked images are kept.
        """
        quiet = noise_disabled(model) if self.switched and isinstance(model, nn.Module) else contextlib.nullcontext()
        found = self.batches[batch] = _Batch()
        with quiet:
            x_adv = x
            if self.attack is not None and self.pace is not None:
                with passes_told_to(self.pace.listener(len(x), tell)):
                    x_adv = self._attacked(self.attack, model, x, y, batch, found)
            with torch.no_grad():
                self._score(model, x_adv, y, batch, found)
        if choose is not None and self.attack is not None:
            found.kept = Kept.among(x_adv, choose(found.predictions))

    def meet(self, ranks: Ranks) -> None:
        """Take in the batches that other processes have attacked and scored."""
        if not ranks.alone:
            own = json.dumps({number: one.plain() for number, one in self.batches.items()})
            for content in ranks.gathered(own.encode()):
                self.batches |= {int(number): _Batch.of(**one) for number, one in json.loads(content).items()}

    def _attacked(self, attack: Attack, model: Model, x: Tensor, y: Tensor, batch: int, found: _Batch) -> Tensor:
        own = derive_seed(self.seed, "attack", self.name, repr(attack.eps), batch)
        with execution.running(self.mode):
            result = attacked(dataclasses.replace(attack, seed=own), model, self.mode.place_images(x), y, self.fits)
        if self.pace is not None:
            self.pace.took(result.forward_passes)
        found.sums = {
            "linf": result.linf.sum().item(),
            "l2": result.l2.sum().item(),
            "forward_passes": result.forward_passes * len(x),
            "backward_passes": result.backward_passes * len(x),
            "seconds": result.seconds,
        }
        found.sums |= {name: count for name in _COUNTS if (count := getattr(result, name)) is not None}
        return result.x_adv.to(x.dtype).contiguous()

    def _score(self, model: Model, x: Tensor, y: Tensor, batch: int, found: _Batch) -> None:
        scorings, margins = [], []
        total: Tensor | None = None
        eps = "" if self.attack is None else repr(self.attack.eps)
        for draw in range(self.draws):
            # Each scoring has a stream of its own, named so that no attack's stream can be the same.
            seed_everything(self.seed, "score", self.name, eps, batch, draw)
            score = scores(self.predictor, lambda images: checked_logits(model, images), x, self.members)
            scorings.append(winners(score))
            margins.append(probability_margins(score, y))
            if self.pools:
                total = score.softmax(dim=1) + (0 if total is None else total)
        found.predictions = np.stack(scorings)
        found.margins = Margins.of(np.stack(margins), found.predictions == y.cpu().numpy())
        if total is not None:
            found.pooled = total.argmax(dim=1).cpu().numpy()

    def kept_of(self, batch: int) -> list[int]:
        """Return which images of a batch are kept."""
        found = self.batches.get(batch)
        return [] if found is None or found.kept is None else found.kept.index.tolist()

    def kept(self, sizes: tuple[int, ...]) -> Kept | None:
        """Return the images that were kept of all batches, which have so many images each; None where none were."""
        starts = np.cumsum((0, *sizes))
        return Kept.joined([one.kept.moved(int(starts[at])) for at, one in sorted(self.batches.items()) if one.kept])

    def _sum(self, name: str) -> Any:
        """Return the sum over all batches, in their order; None where no attack has the number."""
        there = [one.sums[name] for _, one in sorted(self.batches.items()) if name in one.sums]
        return sum(there) if there else None

    def rows(self, labels: NDArray[np.int64], num_classes: int, batches: tuple[int, ...]) -> Iterator[Row]:
        """Give the finished rows: one, or one for each predictor that this run serves."""
        parts = [one for _, one in sorted(self.batches.items())]
        predictions = np.concatenate([one.predictions for one in parts], axis=1)
        pooled = {}
        if self.pools:
            means = np.concatenate([one.pooled for one in parts])
            pooled = {"vote": majority(predictions, num_classes), "mean_probability": means}
        found = statistics(
            predictions,
            labels,
            pooled,
            stochastic=self.stochastic,
            batches=batches,
            confidence=CONFIDENCE,
        )
        margins = [one.margins for one in parts if one.margins is not None]
        parameters = {} if self.attack is None else settings_of(self.attack)
        size = len(labels)
        for predictor in self.predictors:
            yield Row(
                attack=self.name,
                attack_type=None if self.attack is None else type(self.attack).__name__,
                parameters=parameters,
                eps=None if self.attack is None else float(self.attack.eps),
                noise=self.noise,
                stochastic=self.stochastic,
                predictor=predictor,
                members=self.members,
                seconds=self._sum("seconds") or 0.0,
                linf=(self._sum("linf") or 0.0) / size,
                l2=(self._sum("l2") or 0.0) / size,
                forward_passes=(self._sum("forward_passes") or 0.0) / size,
                backward_passes=(self._sum("backward_passes") or 0.0) / size,
                zero_gradients=self._sum("zero_gradients"),
                c_rising=self._sum("c_rising"),
                loss_falling=self._sum("loss_falling"),
                margins=Margins.joined(margins),
                **found,
            )


def settings_of(attack: Attack) -> dict[str, Any]:
    """Return all settings of ``attack`` but its seed; a network among them is known by the hash of its weights."""
    found = {name: value for name, value in plain(attack).items() if name != "seed"}
    for item in dataclasses.fields(attack):
        value = getattr(attack, item.name)
        network = value if isinstance(value, nn.Module) else getattr(value, "model", None)
        if isinstance(network, nn.Module):
            found[f"{item.name}_weights"] = fingerprint_of_weights(network)
            if network is value:
                found[item.name] = type(network).__name__
    return found


def _adapted(attack: Attack, predictor: str, members: int, stochastic: bool) -> Attack:
    """Return ``attack`` aimed at what will be scored: one draw, an ensemble, or a network without noise."""
    names = {field.name for field in dataclasses.fields(attack)}
    if "eot" not in names:
        return attack
    if not stochastic:
        return dataclasses.replace(attack, eot=1)
    if predictor == "single" or "eot_average" not in names:
        return attack
    return dataclasses.replace(attack, eot=max(attack.eot, members), eot_average=AVERAGE[predictor])
