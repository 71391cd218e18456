"""Accuracy of a classifier, clean and attacked, scored with repeated fresh draws that no attack has seen."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learn2perturb import __version__
from learn2perturb.attacks import Attack
from learn2perturb.attacks.listening import passes_told_to
from learn2perturb.configs import takes
from learn2perturb.data import BatchSource, check_labels, make_source, warn_of_subset
from learn2perturb.data.loader import MemorySource
from learn2perturb.engine import gears
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.identity import ImagesFingerprint, fingerprint_of_weights
from learn2perturb.engine.modes import in_mode, own_modes
from learn2perturb.engine.random import derive_seed, isolated_rng, seed_everything
from learn2perturb.errors import ConfigError, DataError
from learn2perturb.evaluation.arrays import BlackBox, tell_queries
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.evaluation.inputs import peculiarities
from learn2perturb.evaluation.intervals import majority
from learn2perturb.evaluation.keeping import Unfinished, taken
from learn2perturb.evaluation.origin import origin, weights_of
from learn2perturb.evaluation.pace import Pace, guessed_passes
from learn2perturb.evaluation.parts import attacked
from learn2perturb.evaluation.passes import (
    PROBABILITIES,
    Model,
    are_probabilities,
    checked_logits,
    circumstances,
    device_of,
    passes_differ,
)
from learn2perturb.evaluation.predictors import AVERAGE, scores, winners
from learn2perturb.evaluation.replays import SEEDS, contained
from learn2perturb.evaluation.result import CLEAN, Evaluation, Row, statistics
from learn2perturb.noise import is_stochastic, noise_disabled, noise_modules
from learn2perturb.progress import Progress, shown
from learn2perturb.records import PackedIntegers, plain

_CONFIDENCE = 0.95
_ZERO_GRADIENTS = 0.05  # of the images, from which on it is said aloud that their gradients are zero
_PROBED = 8  # images
_COUNTS = ("zero_gradients", "c_rising", "loss_falling")  # of images, in an attack's result and in the row
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
    if not callable(model):
        raise ConfigError(f"model is a {type(model).__name__}, must be callable: a network or a function")
    seed, batch_size, limit = config.seed, config.batch_size, config.limit
    table = [(CLEAN, None), *_expand(attacks, config.eps)]
    place = device_of(model, device)
    gear = gears.select(config.engine, place)
    source = make_source(data, batch_size=batch_size, seed=seed, device=place, limit=limit)

    labels: list[NDArray[np.int64]] = []
    seen = ImagesFingerprint()
    weights = weights_of(model)
    runs: list[_RowRun] = []
    findings: list[str] = []
    num_classes = done = 0
    by_row = False
    scored = model
    expected = source.num_examples if limit is None else min(limit, source.num_examples)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with shown(progress) as told, own_modes(), isolated_rng(), in_mode(model, False):
        for index, (x, y) in enumerate(_batches(source, limit, place)):
            if not runs:
                num_classes = _classes(model, x, seed)
                scored = _contained(model, x, seed)
                findings = peculiarities(model, x, seed)
                runs = _plan(scored, x, table, config, gear)
                if isinstance(model, BlackBox):
                    tell_queries(told, model, expected * sum(run.queries(len(x)) for run in runs))
                for run in runs:
                    run.compile_if_long(expected * math.prod(x.shape[2:]), rows=len(x))
                # Of what is held here every row gets the same images, so that rows follow each other and a finished one
                # can be kept. A loader may shuffle or augment in its own way: one pass, all rows on each batch. So for
                # what a generator or buffer of the model carries from pass to pass.
                by_row = isinstance(source, MemorySource) and scored is model and not findings
            check_labels(y, num_classes)
            labels.append(y.cpu().numpy())
            seen.add(x, y)
            for number, run in enumerate(() if by_row else runs):
                before, total = done * len(runs) + number * len(x), expected * len(runs)
                run.add(scored, x, y, index, _share(told, before, len(x), total, run.label))
                told(before + len(x), total, run.label)
            done += len(x)
        if not done:
            raise DataError("the data hold no images; give at least one, and a limit of at least 1")
        truth, batches = np.concatenate(labels), tuple(len(part) for part in labels)
        warn_of_subset(source, torch.from_numpy(truth), num_classes)
        if by_row:
            identity = (
                weights,
                seen.hexdigest(),
                f"{type(model)} {model}",
                seed,
                batch_size,
                circumstances(place, gear),
            )
            kept = keep if weights is not None else None
            rows = _rows_in_turn(
                runs, scored, _Images(source, limit, place, truth, num_classes, batches), told, kept, identity
            )
        else:
            rows = [row for run in runs for row in run.rows(truth, num_classes, batches)]
    _warn_of_zero_gradients(rows)
    metadata = {
        **origin(model, data, name, weights=weights, seen=seen),
        "date": started,
        "batch_size": batch_size,
        "limit": limit,
        "findings": findings,
        "config": config.to_dict(),
        **circumstances(place, gear),
    }
    return Evaluation(
        tuple(rows), PackedIntegers.pack(truth), num_classes, seed, _CONFIDENCE, metadata=metadata,
        batches=PackedIntegers.pack(np.array(batches)),
    )  # fmt: skip


def _batches(source: BatchSource, limit: int | None, place: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches that are evaluated, where they are."""
    done = 0
    for x, y in source.epoch(0):
        if limit is not None:
            x, y = x[: limit - done], y[: limit - done]
        done += len(x)
        yield x.to(place), y.to(place)
        if limit is not None and done >= limit:
            return


@dataclasses.dataclass(frozen=True, eq=False)
class _Images:
    """Images that can be read again, batch by batch, and what is known of them."""

    source: BatchSource
    limit: int | None
    place: torch.device
    truth: NDArray[np.int64]
    num_classes: int
    batches: tuple[int, ...]


def _rows_in_turn(
    runs: Sequence[_RowRun], model: Model, images: _Images, told: Progress, keep: Unfinished | None, identity: object
) -> list[Row]:
    """Return all rows, each computed when that before it is finished and kept."""
    counts, size = [len(run.predictors) for run in runs], len(images.truth)
    finished: list[tuple[Row, ...]] = []
    if keep is not None:
        finished = taken(keep.open((__version__, identity, [run.identity for run in runs]), sum(counts)), counts)
    labels, passes = PackedIntegers.pack(images.truth), PackedIntegers.pack(np.array(images.batches))
    for number, run in enumerate(runs[len(finished) :], start=len(finished)):
        done = 0
        for index, (x, y) in enumerate(_batches(images.source, images.limit, images.place)):
            before, total = number * size + done, len(runs) * size
            run.add(model, x, y, index, _share(told, before, len(x), total, run.label))
            done += len(x)
            told(before + len(x), total, run.label)
        finished.append(tuple(run.rows(images.truth, images.num_classes, images.batches)))
        if keep is not None:
            rows = tuple(itertools.chain.from_iterable(finished))
            keep.keep(Evaluation(rows, labels, images.num_classes, run.seed, _CONFIDENCE, batches=passes))
    return list(itertools.chain.from_iterable(finished))


def _share(told: Progress, before: int, images: int, total: int, label: str) -> Callable[[float], object]:
    """Return what shows that a share of the ``images`` of a batch is done."""
    return lambda share: told(before + share * images, total, label)


def _contained(model: Model, x: Tensor, seed: int) -> Model:
    """Return the model, with random generators of its own, after a warning, if its first pass has seeded torch's."""
    if torch.initial_seed() == derive_seed(seed, *_FIRST_PASS):
        return model
    found = contained(model, x[:_PROBED], seed)
    if found is not model:
        warnings.warn(
            f"{SEEDS}: its draws are replayed, so scoring uses the draws that the attacks saw; learn2perturb diagnose "
            "fails such a model",
            stacklevel=3,
        )
    return found


@final
class _RowRun:
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
        gear: gears.Gear,
    ) -> None:
        self.gear = gear
        self.name, self.noise, self.switched, self.stochastic, self.seed = name, noise, switched, stochastic, seed
        # Without noise all predictors are one and the same, so one run serves the rows of all.
        self.predictors = predictors
        self.predictor = predictors[0]
        self.draws = draws if stochastic else 1
        self.members = members if stochastic and self.predictor != "single" else 1
        self.attack = None if attack is None else _adapted(attack, self.predictor, self.members, stochastic)
        self.pace = None if self.attack is None else Pace(self.attack)
        self.pools = stochastic and self.predictor == "single" and self.draws > 1
        self.predictions: list[NDArray[np.int64]] = []
        self.pooled: list[NDArray[np.int64]] = []
        self.totals = dict.fromkeys(("linf", "l2", "forward_passes", "backward_passes"), 0.0)
        self.seconds = 0.0
        self.fits = Halving()
        self.counts: dict[str, int] = {}

    def compile_if_long(self, pixels: int, rows: int) -> None:
        """Attack in compiled passes of ``rows`` images if that is worth it for ``pixels``: all images, once."""
        # Of a model without noise, images drop out of some attacks as they are broken, so batches have no one size.
        if self.stochastic:
            passes = math.prod(getattr(self.attack, name, 1) for name in ("steps", "eot", "restarts"))
            self.gear = gears.with_compiled_attack(self.gear, pixels * passes, rows)

    @property
    def identity(self) -> tuple[object, ...]:
        """All that the rows follow from, beside model, images and seed."""
        attack = None if self.attack is None else (type(self.attack).__name__, _settings(self.attack))
        switches = self.noise, self.switched, self.stochastic
        return self.name, attack, switches, self.predictors, self.draws, self.members, repr(self.gear)

    def queries(self, images: int) -> float:
        """Return about how many passes of an image the row takes, in batches of so many ``images``."""
        scorings = self.draws * self.members
        return scorings if self.attack is None else scorings + guessed_passes(self.attack, images)

    @property
    def label(self) -> str:
        """What progress shows."""
        eps = "" if self.attack is None else f" eps {self.attack.eps:.4g}"
        return f"{self.name}{eps}{'' if self.noise else ', noise off'}, {self.predictor}"

    def add(self, model: Model, x: Tensor, y: Tensor, batch: int, tell: Callable[[float], object]) -> None:
        """Attack and score one batch; ``tell`` is called with the share of it that is done."""
        quiet = noise_disabled(model) if self.switched and isinstance(model, nn.Module) else contextlib.nullcontext()
        with quiet:
            x_adv = x
            if self.attack is not None and self.pace is not None:
                with passes_told_to(self.pace.listener(len(x), tell)):
                    x_adv = self._attacked(self.attack, model, x, y, batch)
            with torch.no_grad():
                self._score(model, x_adv, batch)

    def _attacked(self, attack: Attack, model: Model, x: Tensor, y: Tensor, batch: int) -> Tensor:
        own = derive_seed(self.seed, "attack", self.name, repr(attack.eps), batch)
        with gears.running(self.gear):
            result = attacked(dataclasses.replace(attack, seed=own), model, self.gear.place_images(x), y, self.fits)
        if self.pace is not None:
            self.pace.took(result.forward_passes)
        self.totals["linf"] += result.linf.sum().item()
        self.totals["l2"] += result.l2.sum().item()
        self.totals["forward_passes"] += result.forward_passes * len(x)
        self.totals["backward_passes"] += result.backward_passes * len(x)
        self.seconds += result.seconds
        for name in _COUNTS:
            count = getattr(result, name)
            if count is not None:
                self.counts[name] = self.counts.get(name, 0) + count
        return result.x_adv.to(x.dtype).contiguous()

    def _score(self, model: Model, x: Tensor, batch: int) -> None:
        scorings = []
        total: Tensor | None = None
        eps = "" if self.attack is None else repr(self.attack.eps)
        for draw in range(self.draws):
            # Each scoring has a stream of its own, named so that no attack's stream can be the same.
            seed_everything(self.seed, "score", self.name, eps, batch, draw)
            score = scores(self.predictor, lambda images: checked_logits(model, images), x, self.members)
            scorings.append(winners(score))
            if self.pools:
                total = score.softmax(dim=1) + (0 if total is None else total)
        self.predictions.append(np.stack(scorings))
        if total is not None:
            self.pooled.append(total.argmax(dim=1).cpu().numpy())

    def rows(self, labels: NDArray[np.int64], num_classes: int, batches: tuple[int, ...]) -> Iterator[Row]:
        """Give the finished rows: one, or one for each predictor that this run serves."""
        predictions = np.concatenate(self.predictions, axis=1)
        pooled = {}
        if self.pools:
            pooled = {"vote": majority(predictions, num_classes), "mean_probability": np.concatenate(self.pooled)}
        found = statistics(
            predictions,
            labels,
            pooled,
            stochastic=self.stochastic,
            batches=batches,
            confidence=_CONFIDENCE,
        )
        parameters = {} if self.attack is None else _settings(self.attack)
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
                seconds=self.seconds,
                linf=self.totals["linf"] / size,
                l2=self.totals["l2"] / size,
                forward_passes=self.totals["forward_passes"] / size,
                backward_passes=self.totals["backward_passes"] / size,
                zero_gradients=self.counts.get("zero_gradients"),
                c_rising=self.counts.get("c_rising"),
                loss_falling=self.counts.get("loss_falling"),
                **found,
            )


def _warn_of_zero_gradients(rows: Iterable[Row]) -> None:
    for row in rows:
        if row.zero_gradients is not None and row.zero_gradients >= _ZERO_GRADIENTS * row.n:
            warnings.warn(
                f"{row.label}: the gradient of {row.zero_gradients} of {row.n} images is exactly zero at the first "
                "step, so the attack does not know where to go and the model may look more robust than it is (a "
                "saturated softmax, or masked gradients); try loss='margin', and square, which needs no gradient",
                stacklevel=3,
            )


def _settings(attack: Attack) -> dict[str, Any]:
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


def _plan(
    model: Model,
    x: Tensor,
    table: list[tuple[str, Attack | None]],
    config: EvaluateConfig,
    gear: gears.Gear,
) -> list[_RowRun]:
    """Return the rows to run: for each predictor clean and attacks, then the same with the noise switched off."""
    predictors, seed = config.predictors, config.seed
    ours = isinstance(model, nn.Module) and is_stochastic(model)
    stochastic = ours or passes_differ(model, x, seed)
    modules = noise_modules(model) if isinstance(model, nn.Module) else []
    if any(module.enabled and module.replay is not None for module in modules):
        warnings.warn(
            "the model's noise is being replayed (fixed_noise), so these scorings are of one fixed draw, which "
            "says little about a random one; evaluate outside of fixed_noise",
            stacklevel=3,
        )
    noise = not modules or any(module.enabled for module in modules)
    groups = [(one,) for one in predictors] if stochastic else [predictors]
    settings: dict[str, Any] = {"draws": config.draws, "members": config.members, "seed": seed, "gear": gear}
    runs = [
        _RowRun(row, attack, noise=noise, switched=False, stochastic=stochastic, predictors=group, **settings)
        for group in groups
        for row, attack in table
    ]
    if ours and config.noise_off and isinstance(model, nn.Module):
        with noise_disabled(model):
            rest = passes_differ(model, x, seed)  # noise that is not ours, such as dropout that is always on
        groups = [(one,) for one in predictors] if rest else [("single",)]
        runs += [
            _RowRun(row, attack, noise=False, switched=True, stochastic=rest, predictors=group, **settings)
            for group in groups
            for row, attack in table
        ]
    return runs


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


def _classes(model: Model, x: Tensor, seed: int) -> int:
    """Return the number of classes; warn when the model gives probabilities instead of logits."""
    if not len(x):
        raise DataError("the data hold no images; give at least one")
    seed_everything(seed, *_FIRST_PASS)
    with torch.no_grad():
        logits = checked_logits(model, x)
    if are_probabilities(logits):
        warnings.warn(PROBABILITIES, stacklevel=3)
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
