"""Accuracy of a classifier, clean and attacked, scored with repeated fresh draws that no attack has seen."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learn2perturb.attacks import Attack
from learn2perturb.configs import takes
from learn2perturb.data import BatchSource, check_labels, classes_of, warn_of_subset
from learn2perturb.data.loader import MemorySource
from learn2perturb.engine import execution
from learn2perturb.engine.random import derive_seed, seed_everything
from learn2perturb.engine.ranks import ALONE, current
from learn2perturb.errors import ConfigError, DataError
from learn2perturb.evaluation.arrays import BlackBox, tell_queries
from learn2perturb.evaluation.attacked import AttackedImages, AttackedRow, Numbers, Pixels
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.evaluation.image_keeper import ImageKeeper, arrays_of
from learn2perturb.evaluation.inputs import peculiarities
from learn2perturb.evaluation.keeping import Unfinished, taken
from learn2perturb.evaluation.pace import Rest, guessed_passes, tell_seconds
from learn2perturb.evaluation.passes import (
    PROBABILITIES,
    Model,
    are_probabilities,
    checked_logits,
    passes_differ,
)
from learn2perturb.evaluation.replays import SEEDS, contained, draws_anew, seeds_decide
from learn2perturb.evaluation.result import CLEAN, Evaluation, Row
from learn2perturb.evaluation.rows import CONFIDENCE, RowRun
from learn2perturb.evaluation.target import Target
from learn2perturb.noise import is_stochastic, noise_disabled, noise_modules
from learn2perturb.plugins import codes_of
from learn2perturb.progress import Progress, Reporter
from learn2perturb.records import PackedIntegers

_ZERO_GRADIENTS = 0.05  # of the images, from which on it is said aloud that their gradients are zero
_PROBED = 8  # images
_FIRST_PASS: tuple[str, int] = ("probe", 0)  # its stream of draws


@takes(EvaluateConfig)
def evaluate(
    model: Model,
    data: Any,
    attacks: Mapping[str, Attack] | EvaluateConfig | None = None,
    config: EvaluateConfig | None = None,
    *,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: Progress | bool | None = True,
    keep: Unfinished | None = None,
    images: ImageKeeper | None = None,
    **settings: Any,
) -> Evaluation:
    """Score ``model`` on clean and attacked images, each scored ``draws`` times with fresh draws of its noise.

    A module is evaluated in eval mode, always, and gets its modes back; its noise stays on, and is switched off
    only for the rows with ``noise=False``, which attack the noise-off network itself.  A model without noise is scored
    once, and an attack's EOT, which would average equal gradients, is dropped.

    Args:
        model: any callable from images in [0, 1] (N, C, H, W) to logits (N, classes).
        data: what ``learn2perturb.data.make_source`` takes: ImageData, (images, labels), Dataset, DataLoader.
        attacks: name -> attack, untargeted; the clean rows come first in any case.
        config: all settings in one; without attacks it may be the third argument.
        settings: the fields of :class:`EvaluateConfig`; what is given replaces that of ``config``.
        device: where to evaluate; by default where the model is.
        name: of the model, for the record.
        progress: show a bar, or plain lines off a terminal; or what is called with (images done, images in all, label
            of the row), where an image counts once in each row.
        keep: where finished rows are kept, so that the same call goes on with them. Of images that are held here only;
            of a loader's all rows are computed on each batch, and nothing is kept.
        images: asks for attacked images, which it then has.

    Raises:
        ConfigError: a setting is not allowed.
        UnknownNameError: an unknown predictor, or no such setting.
        InputError: the model's output is no finite (N, classes) tensor, or a label is beyond its classes.
        DataError: there are no images.
    """
    if isinstance(attacks, EvaluateConfig):
        if config is not None:
            raise ConfigError("two configs are given; give the attacks third, and one config")
        attacks, config = None, attacks
    config = EvaluateConfig.of(config, settings)
    target = Target(model, device, name)
    table = [*([(CLEAN, None)] if config.clean else []), *_expand(attacks, config.eps)]
    if not table:
        raise ConfigError("clean is False and no attack is given, so nothing is left to score; give one of them")
    target.parts(data, attacks=[attack for _, attack in table])
    source = target.source(data, batch_size=config.batch_size, seed=config.seed, limit=config.limit)
    mode = execution.select(config.engine, target.device, pixels=_pixels(source, table, config))
    with target.judged(progress) as told:
        work = _Work(target, source, table, config, mode, told, images)
        work.read()
        target.check_alike(config, {run.label: run.numbers for run in work.runs}, images=work.by_row)
        warn_of_subset(source, torch.from_numpy(work.truth), work.num_classes)
        rows = work.rows(keep)
    _warn_of_zero_gradients(rows)
    more: dict[str, Any] = {"batch_size": config.batch_size, "limit": config.limit, "findings": work.findings}
    names = classes_of(data)
    more["classes"] = list(names) if names is not None and len(names) == work.num_classes else None
    found = work.evaluation(rows, target.metadata(data, config, mode, **more))
    if images is not None:
        images.found = work.attacked_images(found)
    return found


def _pixels(source: BatchSource, table: list[tuple[str, Attack | None]], config: EvaluateConfig) -> float:
    """Return about how many pixels all passes of the attacks see, which the choice of the execution mode is made by."""
    passes = sum(guessed_passes(attack, config.batch_size) for _, attack in table if attack is not None)
    if source.input_shape is None:  # a loader that was not looked into: as if it were long
        return math.inf if passes else 0.0
    return source.num_examples * passes * math.prod(source.input_shape[1:])


@final
class _Work:
    """An evaluation in the making: its rows are planned at the first batch.

    Of what is held here every row gets the same images, so that rows follow each other and a finished one can be kept.
    A loader may shuffle or augment in its own way: one pass, all rows on each batch. So for what a generator or buffer
    of the model carries from pass to pass.
    """

    def __init__(
        self,
        target: Target,
        source: BatchSource,
        table: list[tuple[str, Attack | None]],
        config: EvaluateConfig,
        mode: execution.ExecutionMode,
        told: Progress,
        images: ImageKeeper | None,
    ) -> None:
        self.target, self.source, self.table, self.config = target, source, table, config
        self.mode, self.told, self.images = mode, told, images
        self.model = target.model  # that is scored: with random generators of its own, where it seeds them
        self.runs: list[RowRun] = []
        self.findings: list[str] = []
        self.num_classes = 0
        self.by_row = False
        self.ranks = ALONE  # that share the batches
        self.labels: list[NDArray[np.int64]] = []
        self.finished: list[tuple[Row, ...]] = []  # run by run
        self.attacked: list[AttackedRow] = []  # of the finished rows of attacks
        self.clean: dict[int, Pixels] = {}  # number of a kept image -> itself, of what cannot be read again
        self.expected = source.num_examples  # of a limit as many
        self.rest: Rest | None = None

    @property
    def truth(self) -> NDArray[np.int64]:
        """The labels of all images."""
        return np.concatenate(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many images each batch has."""
        return tuple(len(part) for part in self.labels)

    def read(self) -> None:
        """Read all images; where they may differ when they are read again, attack and score them at once.

        Raises:
            DataError: there are none.
        """
        for index, (x, y) in enumerate(self.target.batches(self.source, self.config.limit)):
            if not self.runs:
                self._plan(x)
            check_labels(y, self.num_classes)
            self.target.seen.add(x, y)
            for number, run in enumerate(() if self.by_row else self.runs):
                start = sum(self.sizes)
                done = start * len(self.runs) + number * len(x)
                self._add(run, x, y, index, start, done, self.expected * len(self.runs))
            places = {number: None for run in self.runs for number in run.kept_of(index)}
            self.clean |= {sum(self.sizes) + number: arrays_of(x[number]) for number in places}
            self.labels.append(y.cpu().numpy())
        if not self.labels:
            raise DataError("the data hold no images; give at least one, and a limit of at least 1")

    def _plan(self, x: Tensor) -> None:
        model, seed = self.target.model, self.config.seed
        start = time.perf_counter()
        self.num_classes = _classes(model, x, seed)
        one_pass = (time.perf_counter() - start) / len(x)
        self.model = _contained(model, x, seed)
        self.findings = peculiarities(model, x, seed)
        self.runs = _planned(self.model, x, self.table, self.config, self.mode)
        for run in self.runs:
            run.compile_if_long(self.expected * math.prod(x.shape[2:]), rows=len(x))
        self.by_row = isinstance(self.source, MemorySource) and self.model is model and not self.findings
        # Alone too: the generator of a model that has one is then where it is in each of several processes.
        # Asked of a whole batch: a program may be made for one number of images.
        start = time.perf_counter()
        self.ranks = current() if isinstance(model, BlackBox) or seeds_decide(model, x, seed) else ALONE
        if isinstance(model, BlackBox):
            tell_queries(self.told, model, self.expected * sum(run.queries(len(x)) for run in self.runs))
            return
        # The first pass of a process is slower than any other; those two were over the same batch.
        one_pass = min(one_pass, (time.perf_counter() - start) / 2 / len(x))
        each = {run: run.seconds_each(len(x), one_pass) for run in self.runs}
        single = self.expected * sum(run.seconds_each(len(x), one_pass, single=True) for run in self.runs)
        self.rest = Rest(self.expected, each)
        early = [run.label for run in each if run.drops]
        seconds = {run.label: self.expected * one for run, one in each.items()}
        tell_seconds(self.told, seconds, early=early, single=single)

    def _add(self, run: RowRun, x: Tensor, y: Tensor, index: int, start: int, before: int, total: int) -> None:
        """Attack and score one batch of one row: after ``start`` images of it, and ``before`` of ``total`` in all."""
        choose = None
        if self.images is not None and run.attack is not None:
            choose = self.images.choice(y, self._clean_votes(run, index))

        def tell(share: float) -> None:
            if self.rest is not None and isinstance(self.told, Reporter):
                self.told.left = self.rest.seconds(run, start + share * len(x))
            self.told(before + share * len(x), total, run.label)

        if self.rest is not None:
            self.rest.begin()
        run.add(self.model, x, y, index, tell, choose)
        tell(1.0)
        if self.rest is not None:
            self.rest.end(run)

    def _clean_run(self, run: RowRun) -> int | None:
        """Return the number of the run of the clean images that ``run`` attacks; None where they are not scored."""
        own = run.noise, run.switched, run.predictors
        runs = enumerate(self.runs)
        return next(
            (n for n, one in runs if one.attack is None and (one.noise, one.switched, one.predictors) == own), None
        )

    def _clean_votes(self, run: RowRun, index: int) -> Numbers | None:
        """Return the predictions (draws, images) of the clean images of a batch."""
        number = self._clean_run(run)
        if number is None:
            return None
        if not self.by_row:
            return self.runs[number].batches[index].predictions
        start = sum(self.sizes[:index])
        return self.finished[number][0].predictions.unpack()[:, start : start + self.sizes[index]]

    def rows(self, keep: Unfinished | None) -> list[Row]:
        """Return the rows; those that are not computed yet one after the other, each kept when it is finished."""
        if not self.by_row:
            for run in self.runs:
                self._finish(run)
            return list(itertools.chain.from_iterable(self.finished))
        # A function's weights are not known, so that its rows cannot be told from those of another.
        # Several processes share the batches, and keep nothing: each would have to know what the others have finished.
        ranks = self.ranks
        keep = keep if self.target.weights is not None and current().alone else None
        if keep is not None:
            self._go_on(keep)
        size = len(self.truth)
        if self.rest is not None:
            self.rest.leave_out(self.runs[: len(self.finished)])
        for number, run in enumerate(self.runs[len(self.finished) :], start=len(self.finished)):
            start = 0
            for index, (x, y) in enumerate(self.target.batches(self.source, self.config.limit)):
                if index % ranks.world == ranks.rank:  # the draws of a batch follow from its number
                    self._add(run, x, y, index, start, number * size + start, len(self.runs) * size)
                start += len(x)
            run.meet(ranks)
            self._finish(run)
            if keep is not None:
                so_far = self.evaluation(itertools.chain.from_iterable(self.finished))
                keep.keep(so_far, None if self.images is None else self.attacked_images(so_far))
        return list(itertools.chain.from_iterable(self.finished))

    def _finish(self, run: RowRun) -> None:
        """Take in the rows of a run that has seen all images, and its images."""
        self.finished.append(tuple(run.rows(self.truth, self.num_classes, self.sizes)))
        kept = run.kept(self.sizes)
        if self.images is not None and kept is not None:
            number = self._clean_run(run)
            clean = None if number is None else self.finished[number][0].predictions.unpack()
            row = AttackedRow.of(self.finished[-1][0], kept.index, kept.images, clean)
            self.attacked.append(row.chosen(self.truth[kept.index], self.images.each))

    def attacked_images(self, found: Evaluation) -> AttackedImages:
        """Return the kept images of the finished rows, whose record is ``found``."""
        wanted = np.unique(np.concatenate([row.index for row in self.attacked] or [np.empty(0, np.int64)]))
        if self.by_row and len(wanted):
            start = 0
            for x, _ in self.target.batches(self.source, self.config.limit):
                own = wanted[(wanted >= start) & (wanted < start + len(x))]
                self.clean |= dict(zip(own.tolist(), arrays_of(x[(own - start).tolist()]), strict=True))
                start += len(x)
        each = None if self.images is None else self.images.each
        return AttackedImages.of(found, self.attacked, self.clean, each)

    def _go_on(self, keep: Unfinished) -> None:
        """Take in what the same evaluation has finished before; where its images are lost, nothing."""
        finished = self._kept(keep)
        if self.images is not None:
            count = sum(run.attack is not None for run, _ in zip(self.runs, finished, strict=False))
            images = keep.images()
            rows = () if images is None else images.rows[:count]
            record = self.evaluation(itertools.chain.from_iterable(finished))
            if len(rows) < count or (images is not None and replace(images, rows=rows).misfit(record) is not None):
                return
            self.attacked.extend(rows)
        self.finished.extend(finished)

    def _kept(self, keep: Unfinished) -> list[tuple[Row, ...]]:
        """Return the rows that the same evaluation has finished before, run by run."""
        config, target = self.config, self.target
        identity = target.identity(config.seed, config.batch_size, self.mode)
        counts = [len(run.predictors) for run in self.runs]
        kept: tuple[Any, ...] = () if self.images is None else (("images", self.images.each),)  # as it always was
        if codes := codes_of(target.parts()):
            kept += (("code", codes),)
        runs = [run.identity for run in self.runs]
        return taken(keep.open((identity, runs, *kept), sum(counts)), counts)

    def evaluation(self, rows: Iterable[Row], metadata: dict[str, Any] | None = None) -> Evaluation:
        """Return the record of ``rows``."""
        return Evaluation(
            tuple(rows), PackedIntegers.pack(self.truth), self.num_classes, self.config.seed, CONFIDENCE,
            metadata=metadata or {}, batches=PackedIntegers.pack(np.array(self.sizes)),
        )  # fmt: skip


def _contained(model: Model, x: Tensor, seed: int) -> Model:
    """Return the model, with random generators of its own, after a warning, if its first pass has seeded torch's."""
    if torch.initial_seed() == derive_seed(seed, *_FIRST_PASS):
        return model
    found = contained(model, x[:_PROBED], seed)
    if found is not model:
        warnings.warn(
            f"{SEEDS}: its draws are replayed, so scoring uses the draws that the attacks saw; learn2perturb diagnose "
            "fails such a model",
            stacklevel=5,
        )
    return found


def _warn_of_zero_gradients(rows: Iterable[Row]) -> None:
    for row in rows:
        if row.zero_gradients is not None and row.zero_gradients >= _ZERO_GRADIENTS * row.n:
            warnings.warn(
                f"{row.label}: the gradient of {row.zero_gradients} of {row.n} images is exactly zero at the first "
                "step, so the attack does not know where to go and the model may look more robust than it is (a "
                "saturated softmax, or masked gradients); try loss='margin', and square, which needs no gradient",
                stacklevel=3,
            )


def _planned(
    model: Model,
    x: Tensor,
    table: list[tuple[str, Attack | None]],
    config: EvaluateConfig,
    mode: execution.ExecutionMode,
) -> list[RowRun]:
    """Return the rows to run: for each predictor clean and attacks, then the same with the noise switched off."""
    predictors, seed = config.predictors, config.seed
    ours = isinstance(model, nn.Module) and is_stochastic(model)
    stochastic = ours or draws_anew(model, x, seed)
    modules = noise_modules(model) if isinstance(model, nn.Module) else []
    if any(module.enabled and module.replay is not None for module in modules):
        warnings.warn(
            "the model's noise is being replayed (fixed_noise), so these scorings are of one fixed draw, which "
            "says little about a random one; evaluate outside of fixed_noise",
            stacklevel=5,
        )
    noise = not modules or any(module.enabled for module in modules)
    groups = [(one,) for one in predictors] if stochastic else [predictors]
    settings: dict[str, Any] = {"draws": config.draws, "members": config.members, "seed": seed, "mode": mode}
    runs = [
        RowRun(row, attack, noise=noise, switched=False, stochastic=stochastic, predictors=group, **settings)
        for group in groups
        for row, attack in table
    ]
    if ours and config.noise_off and isinstance(model, nn.Module):
        with noise_disabled(model):
            rest = passes_differ(model, x, seed)  # noise that is not ours, such as dropout that is always on
        groups = [(one,) for one in predictors] if rest else [("single",)]
        runs += [
            RowRun(row, attack, noise=False, switched=True, stochastic=rest, predictors=group, **settings)
            for group in groups
            for row, attack in table
        ]
    return runs


def _classes(model: Model, x: Tensor, seed: int) -> int:
    """Return the number of classes; warn when the model gives probabilities instead of logits."""
    if not len(x):
        raise DataError("the data hold no images; give at least one")
    seed_everything(seed, *_FIRST_PASS)
    with torch.no_grad():
        logits = checked_logits(model, x)
    if are_probabilities(logits):
        warnings.warn(PROBABILITIES, stacklevel=5)
    return logits.shape[1]


def _expand(attacks: Mapping[str, Attack] | None, eps: float | Sequence[float] | None) -> list[tuple[str, Attack]]:
    """Return (name, attack) for every attack and eps."""
    if attacks is None:
        return []
    if not isinstance(attacks, Mapping):
        raise ConfigError(f"attacks is a {type(attacks).__name__}, must map names to attacks: attacks={{'pgd': PGD()}}")
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            kind = f"the class {attack.__name__}" if isinstance(attack, type) else f"a {type(attack).__name__}"
            raise ConfigError(f"attack {name!r} is {kind}, must be an Attack such as PGD(eps=8/255)")
        if not isinstance(name, str) or not name or name == CLEAN:
            raise ConfigError(f"an attack is named {name!r}, must be a text other than '' and {CLEAN!r}; rename it")
        if attack.targeted:
            raise ConfigError(f"attack {name!r} is targeted, but here are true labels only; set targeted=False")
    if eps is None:
        return list(attacks.items())
    if not isinstance(eps, (int, float, Iterable)):
        raise ConfigError(f"eps is a {type(eps).__name__}, must be a number or a list of numbers, such as 8/255")
    sizes = [eps] if isinstance(eps, (int, float, str)) else list(eps)
    if not sizes:
        raise ConfigError("eps is an empty list, must hold numbers; leave it out to keep the eps of each attack")
    norms = sorted({attack.norm for attack in attacks.values() if attack.sized})
    if len(norms) > 1:
        raise ConfigError(
            f"eps would be the radius of attacks of norms {' and '.join(norms)}, where one size means different "
            "things; leave eps out and give each attack its own"
        )
    # The attack itself says what is wrong with a size.
    return [
        (name, attack.resized(size) if attack.sized else attack)
        for name, attack in attacks.items()
        for size in (dict.fromkeys(sizes) if attack.sized else [attack.eps])
    ]
