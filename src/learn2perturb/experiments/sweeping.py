"""Search for settings of a run on held-out images; the chosen one is then trained anew on fresh seeds.

::

    train: {validation: 0.1}
    runs: {noisy: {defense: learn2perturb}}
    cells:
      held-out: {attack: eot-pgd20, split: validation}
      eot: {attack: eot-pgd20}                            # of the chosen one only
    sweep:
      run: noisy
      over: {options.gamma: {low: 1e-5, high: 1e-2, log: true}, options.init: [0.1, 0.25, 0.5]}
      objective: [held-out]
      trials: 20
      seeds: [11, 12, 13]
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, final

from learn2perturb.checks import check_choice, check_count
from learn2perturb.errors import ConfigError, MissingDependencyError, UnknownNameError
from learn2perturb.evaluation.result import Evaluation
from learn2perturb.experiments.results import Results
from learn2perturb.experiments.spec import VALIDATION, Study
from learn2perturb.experiments.study_file import build_study
from learn2perturb.records import Saved

SAMPLERS = ("random", "optuna")


@final
@dataclass(frozen=True)
class Range:
    """What a setting is drawn from: between ``low`` and ``high``, evenly or evenly in its logarithm; or ``choices``."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()


@final
@dataclass(frozen=True)
class SweepPlan:
    """A search as a study says it.

    Attributes:
        run: name of the run whose settings vary.
        over: setting -> what it is drawn from.
        objective: cells, scored on validation images; what is sought is the highest mean of their accuracies.
        trials: settings that are tried.
        seeds: fresh ones, of the trainings of the chosen setting.
        sampler: ``random``, or ``optuna`` (its tree-structured Parzen estimator).
        seed: of the sampler.
        trial_seed: of the training of every trial.
    """

    run: str
    over: Mapping[str, Range]
    objective: tuple[str, ...]
    trials: int
    seeds: tuple[int, ...]
    sampler: str = "random"
    seed: int = 0
    trial_seed: int = 0


@final
@dataclass(frozen=True)
class Trial:
    """A setting that was tried, and the mean accuracy on validation images that it got; None where it failed."""

    settings: Mapping[str, Any]
    objective: float | None


@final
@dataclass(frozen=True)
class Trials(Saved):
    """What a search has tried, and what it chose."""

    FORMAT: ClassVar[str] = "learn2perturb.sweep"
    VERSION: ClassVar[int] = 1

    study: str
    tried: tuple[Trial, ...]
    chosen: Mapping[str, Any]


def read_sweep(study: Study) -> SweepPlan | None:
    """Return the search of a study; None where it has none.

    Raises:
        ConfigError: something in it is not allowed; above all an objective on anything but validation images.
    """
    raw = dict(study.source.get("sweep") or {})
    if not raw:
        return None
    at = f"study {study.name}: sweep: "
    known = [item.name for item in fields(SweepPlan)]
    for key in raw:
        if key not in known:
            raise UnknownNameError.of(f"setting of sweep in study {study.name}", key, known)
    for key in ("run", "over", "objective", "trials", "seeds"):
        if not raw.get(key):
            raise ConfigError(f"{at}{key} is missing; see docs/studies.md for a search written out")
    if raw["run"] not in study.source["runs"]:
        raise UnknownNameError.of(f"run of study {study.name}", raw["run"], study.source["runs"])
    if not isinstance(raw["over"], Mapping):
        raise ConfigError(f"{at}over is {raw['over']!r}; write over: {{options.gamma: {{low: 1e-5, high: 1e-2}}}}")
    over = {str(key): _range(f"{at}{key}", value) for key, value in raw["over"].items()}
    names = raw["objective"] if isinstance(raw["objective"], list) else [raw["objective"]]
    for name in names:
        cells = [cell for cell in study.cells if cell.name == name]
        if not cells:
            raise UnknownNameError.of(f"cell of study {study.name}", name, [cell.name for cell in study.cells])
        for cell in cells:
            if cell.kind != "accuracy" or cell.scoring.split != VALIDATION:
                raise ConfigError(
                    f"{at}objective {name} is scored on {cell.scoring.split} images; a search may only see what the "
                    f"trainings hold out: give cell {name} split: validation, and the study train: {{validation: 0.1}}"
                )
    seeds = raw["seeds"] if isinstance(raw["seeds"], list) else [raw["seeds"]]
    plan = SweepPlan(**{**raw, "over": over, "objective": tuple(map(str, names)), "seeds": tuple(seeds)})
    check_count(f"{at}trials", plan.trials)
    check_choice(f"{at}sampler", plan.sampler, SAMPLERS)
    for name, value in (("seed", plan.seed), ("trial_seed", plan.trial_seed), *(("seeds", one) for one in seeds)):
        check_count(f"{at}{name}", value, 0)
    if plan.trial_seed in plan.seeds:
        raise ConfigError(f"{at}seeds holds {plan.trial_seed}, which the trials have; the chosen one needs fresh seeds")
    return plan


def _range(where: str, value: Any) -> Range:
    if isinstance(value, list) and value:
        return Range(choices=tuple(value))
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        raise ConfigError(f"{where} is {value!r}; write {{low: 1e-5, high: 1e-2, log: true}}, or a list of choices")
    try:
        low, high = float(value["low"]), float(value["high"])
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: low is {value['low']!r} and high {value['high']!r}; give numbers") from None
    log = bool(value.get("log", False))
    if not low < high or not math.isfinite(high - low) or (log and low <= 0):
        raise ConfigError(f"{where} runs from {low} to {high}; low must be below high, and above 0 with log")
    return Range(low, high, log)


class Sampler(Protocol):
    """Says what to try next, and is told what came of it."""

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return so many settings."""

    def tell(self, objectives: Sequence[float | None]) -> None:
        """Take what the settings of the last ``ask`` got."""


@final
class RandomSampler:
    """Draws each setting on its own."""

    def __init__(self, plan: SweepPlan) -> None:
        self._over, self._random = plan.over, random.Random(plan.seed)

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return so many settings."""
        return [{key: self._drawn(one) for key, one in self._over.items()} for _ in range(count)]

    def _drawn(self, one: Range) -> Any:
        if one.choices:
            return self._random.choice(one.choices)
        if one.log:
            return _short(math.exp(self._random.uniform(math.log(one.low), math.log(one.high))))
        return _short(self._random.uniform(one.low, one.high))

    def tell(self, objectives: Sequence[float | None]) -> None:
        """Take nothing: draws do not depend on what came before."""


@final
class OptunaSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), seeded."""

    def __init__(self, plan: SweepPlan) -> None:
        try:
            import optuna
        except ImportError:
            raise MissingDependencyError(
                "sampler optuna needs optuna, which is not installed: pip install 'learn2perturb[sweep]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._over = plan.over
        sampler = optuna.samplers.TPESampler(seed=plan.seed)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._state = optuna.trial.TrialState
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Return so many settings."""
        self._asked = [self._study.ask() for _ in range(count)]
        return [{key: self._drawn(trial, key, one) for key, one in self._over.items()} for trial in self._asked]

    def _drawn(self, trial: Any, key: str, one: Range) -> Any:
        if one.choices:
            return trial.suggest_categorical(key, list(one.choices))
        return _short(trial.suggest_float(key, one.low, one.high, log=one.log))

    def tell(self, objectives: Sequence[float | None]) -> None:
        """Take what the settings of the last ``ask`` got."""
        for trial, value in zip(self._asked, objectives, strict=True):
            if value is None:
                self._study.tell(trial, state=self._state.FAIL)
            else:
                self._study.tell(trial, value)


def _short(value: float) -> float:
    """Return a number that reads well: four digits are more than any search can tell apart."""
    return float(f"{value:.4g}")


def search(study: Study, plan: SweepPlan, batch: int, work: Callable[[Study], Results]) -> Trials | None:
    """Try settings, ``batch`` at a time; return them and the best one; None where the time was up before the end.

    Samplers are seeded and what was tried is in the store, so that a search that was stopped goes on.

    Raises:
        ConfigError: every trial failed.
    """
    sampler: Sampler = OptunaSampler(plan) if plan.sampler == "optuna" else RandomSampler(plan)
    tried: list[Trial] = []
    while len(tried) < plan.trials:
        settings = sampler.ask(min(batch, plan.trials - len(tried)))
        results = work(_trials_study(study, plan, settings, len(tried)))
        objectives = [_objective(results, _title(len(tried) + number)) for number in range(len(settings))]
        if results.missing and all(one is None for one in objectives):
            return None
        sampler.tell(objectives)
        tried += [Trial(one, value) for one, value in zip(settings, objectives, strict=True)]
    best = max((one for one in tried if one.objective is not None), key=lambda one: one.objective or 0.0, default=None)
    if best is None:
        raise ConfigError(f"study {study.name}: every trial of its sweep failed; the messages are above")
    return Trials(study.name, tuple(tried), best.settings)


def _title(number: int) -> str:
    return f"trial {number + 1}"


def _trials_study(study: Study, plan: SweepPlan, settings: Sequence[Mapping[str, Any]], first: int) -> Study:
    """Return the study of some trials: one seed, the objective's cells, nothing else."""
    own = {key: value for key, value in study.source["runs"][plan.run].items() if key != "seed"}
    runs = {
        _title(first + number): {**own, **one, "seed": plan.trial_seed} for number, one in enumerate(settings)
    }  # fmt: skip
    cells = {name: study.source["cells"][name] for name in plan.objective}
    kept = {key: study.source[key] for key in ("train", "evaluate") if key in study.source}
    return build_study(f"{study.name}-sweep", {**kept, "title": f"{study.title}: search", "runs": runs, "cells": cells})


def _objective(results: Results, title: str) -> float | None:
    records = [answer.record for answer in results.answers if answer.pair.run.name == title]
    if not records or not all(isinstance(record, Evaluation) for record in records):
        return None
    rows = [record.rows[0] for record in records if isinstance(record, Evaluation)]
    return sum(row.accuracy for row in rows) / len(rows)


def chosen_study(study: Study, plan: SweepPlan, chosen: Mapping[str, Any]) -> Study:
    """Return the study with the chosen settings, on fresh seeds."""
    runs = {
        name: {key: value for key, value in run.items() if key != "seed"} for name, run in study.source["runs"].items()
    }
    runs[plan.run] = {**runs[plan.run], **chosen}
    source = {key: value for key, value in study.source.items() if key != "sweep"}
    return build_study(study.name, {**source, "runs": runs, "seeds": list(plan.seeds)})
