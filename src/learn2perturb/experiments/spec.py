"""What a study is once it is read: runs, cells, views, and which run is asked what. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from learn2perturb.checks import check_choice, check_count, check_flag, fraction
from learn2perturb.configs import ENGINES
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.registry import DEFENSES
from learn2perturb.training.config import TrainConfig

TWIN, OTHERS = "twin", "others"  # sources of transferred images: the run with its noise off; every other run
OWN = "own"  # the predictor that the defense's paper predicts by
VALIDATION = "validation"  # the split of what each run holds out, by its seed


@final
@dataclass(frozen=True)
class Scoring:
    """How a cell is scored.

    Args:
        draws: scorings with fresh draws.
        predictor: ``own`` (as the defense's paper predicts), ``single``, ``vote``, ``mean_probability`` or
            ``mean_logits``.
        members: passes of an ensemble; None: the defense's own number.
        noise_off: also give the rows of the network with its noise switched off.
        limit: so many images only, balanced over the classes.
        batch_size: images in a pass.
        engine: attacks are crafted in.
        seed: of attacks and scoring.
        split: ``test``, ``train`` or ``validation`` (what the run held out).
    """

    draws: int = EvaluateConfig.draws
    predictor: str = OWN
    members: int | None = None
    noise_off: bool = False
    limit: int | None = None
    batch_size: int = EvaluateConfig.batch_size
    engine: str = EvaluateConfig.engine
    seed: int = EvaluateConfig.seed
    split: str = "test"

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("batch_size", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("members", "limit"):
            check_count(name, getattr(self, name), optional=True)
        check_flag("noise_off", self.noise_off)
        check_choice("predictor", self.predictor, (OWN, "single", "vote", "mean_probability", "mean_logits"))
        check_choice("engine", self.engine, ENGINES)
        check_choice("split", self.split, ("test", "train", VALIDATION))


@final
@dataclass(frozen=True)
class RunPlan:
    """One network: trained by ``config``, or found at ``weights``. ``axes`` tell it from others of its ``name``."""

    name: str
    axes: Mapping[str, Any]
    config: TrainConfig | None = None
    weights: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = True  # whether its study has no runs of another name

    @property
    def title(self) -> str:
        """What progress calls it."""
        return self.kind + (f", seed {_text(self.axes['seed'])}" if "seed" in self.axes else "")

    @property
    def kind(self) -> str:
        """What tables call it: all but its seed."""
        axes = {key: value for key, value in self.axes.items() if key != "seed"}
        parts = [one if isinstance(one, str) else f"{_last(key)} {_text(one)}" for key, one in axes.items()]
        return ", ".join([*([] if self.alone and parts else [self.name]), *parts])

    @property
    def stochastic(self) -> bool | None:
        """Whether its network draws noise; None where only the weights can tell."""
        if self.config is None:
            return self.facts.get("stochastic")
        return DEFENSES.entry(self.config.defense).fact("stochastic")

    def label(self, key: str) -> Any:
        """Return its label ``key``: ``run`` (all but its seed), ``name``, a setting, ``options.gamma``; else None."""
        if key == "run":
            return self.kind
        if key == "name":
            return self.name
        if key == "stochastic":
            return self.stochastic
        if key in self.axes:
            return self.axes[key]
        if key in self.facts:
            return self.facts[key]
        if self.config is None:
            return None
        head, _, tail = key.partition(".")
        value = getattr(self.config, head, None)
        return value.get(tail) if tail and isinstance(value, Mapping) else value


@final
@dataclass(frozen=True)
class CellPlan:
    """What is asked of a run: its accuracy under an attack, certificates, or a diagnosis.

    Attributes:
        kind: ``accuracy``, ``certificate`` or ``diagnosis``.
        attack: registered name and settings; None for clean images.
        eps: size of the attack; None: that of the run.
        source: of transferred images: ``twin``, ``others``, or labels of a run; of a diagnosis: name -> labels.
        only: labels that a run must have.
        released: batch size, where it is scored as the released code does.
        settings: of the certificate or the diagnosis.
        preset_step: whether the step of the attack is a preset's, made for l_inf.
    """

    name: str
    axes: Mapping[str, Any]
    kind: str
    attack: tuple[str, Mapping[str, Any]] | None
    eps: float | None
    source: Any
    only: Mapping[str, Any]
    released: int | None
    settings: Mapping[str, Any]
    scoring: Scoring
    preset_step: bool = False

    @property
    def title(self) -> str:
        """What progress and tables call it."""
        return ", ".join([self.name, *(f"{_last(key)} {_text(value)}" for key, value in self.axes.items())])

    def label(self, key: str) -> Any:
        """Return its label ``key``: ``cell``, ``eps``, ``attack.steps``, ``eot``, ``draws``; None where it has none."""
        if key == "cell":
            return self.name
        if key in self.axes:
            return self.axes[key]
        if key == "eps":
            return self.eps
        head, _, tail = ("attack.eot" if key == "eot" else key).partition(".")
        if head == "attack" and self.attack is not None:
            return self.attack[1].get(tail) if tail else self.attack[0]
        return getattr(self.scoring, key, None)


@final
@dataclass(frozen=True)
class ViewPlan:
    """A table or a figure of a study; see ``docs/studies.md`` for what each key does."""

    name: str
    kind: str = "table"
    title: str = ""
    rows: tuple[str, ...] = ("run",)
    columns: tuple[str, ...] = ("cell",)
    where: Mapping[str, Any] = field(default_factory=dict)
    noise: bool = True
    value: str = "accuracy"
    baseline: Mapping[str, Any] = field(default_factory=dict)
    x: str = "eps"
    series: tuple[str, ...] = ("run",)
    paper: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Pair:
    """A run and what is asked of it, with the runs that images are crafted on, by name."""

    run: RunPlan
    cell: CellPlan
    sources: Mapping[str, RunPlan] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What progress calls it."""
        return f"{self.run.title}: {self.cell.title}"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from the other pairs of a study."""
        runs = (self.run, *self.sources.values())
        return (self.cell.title, *(part for run in runs for part in (run.name, run.title)))

    def label(self, key: str) -> Any:
        """Return a label of the cell, else of the run; ``source`` names the run that images come from."""
        if key == "source":
            return next(iter(self.sources), None)
        if key.startswith("source."):
            found = next(iter(self.sources.values()), None)
            return None if found is None else found.label(key.removeprefix("source."))
        if key == "eps" and self.cell.kind == "accuracy" and self.cell.attack is None:
            return None  # clean images have no size, whatever the run was trained for
        found = self.cell.label(key)
        return self.run.label(key) if found is None else found


@final
@dataclass(frozen=True)
class Study:
    """A study at one of its levels: everything that is to be computed, and how it is shown."""

    name: str
    title: str
    level: str | None
    notes: tuple[str, ...]
    runs: tuple[RunPlan, ...]
    cells: tuple[CellPlan, ...]
    views: tuple[ViewPlan, ...]
    reasons: tuple[Mapping[str, Any], ...]
    sweep: Mapping[str, Any]
    source: Mapping[str, Any]

    def pairs(self, run: RunPlan) -> Iterator[Pair]:
        """Give what is asked of a run, in order."""
        for cell in self.cells:
            if not matches(run, cell.only):
                continue
            if cell.source == OTHERS:
                for other in self._others(run):
                    yield Pair(run, cell, {str(other.label("defense") or other.name): other})
            elif cell.source in (None, TWIN):
                yield Pair(run, cell)
            elif cell.kind == "diagnosis":
                yield Pair(run, cell, {name: self._source(run, cell, labels) for name, labels in cell.source.items()})
            else:
                found = self._source(run, cell, cell.source)
                yield Pair(run, cell, {str(found.label("defense") or found.name): found})

    def all_pairs(self) -> Iterator[Pair]:
        """Give every pair."""
        for run in self.runs:
            yield from self.pairs(run)

    def _others(self, run: RunPlan) -> list[RunPlan]:
        return [other for other in self.runs if other is not run and _beside(run, other)]

    def _source(self, run: RunPlan, cell: CellPlan, labels: Mapping[str, Any]) -> RunPlan:
        found = [other for other in self.runs if matches(other, labels)]
        near = [other for other in found if _beside(run, other)] or [
            other for other in found if other.label("model") == run.label("model")
        ] or found  # fmt: skip
        if not near:
            wanted = ", ".join(f"{key} {value}" for key, value in labels.items())
            raise ConfigError(f"cell {cell.name} crafts on a run of {wanted}, and the study has none; add one to runs")
        return near[0]


def _beside(run: RunPlan, other: RunPlan) -> bool:
    """Tell whether images of one may be tried on the other in a table: same network, data and seed."""
    if run.weights is not None and other.weights is not None:
        return bool(run.label("dataset") == other.label("dataset"))
    return all(run.label(key) == other.label(key) for key in ("model", "dataset", "seed"))


def matches(item: RunPlan | CellPlan | Pair, wanted: Mapping[str, Any]) -> bool:
    """Tell whether the labels of ``item`` are among those ``wanted``, each a value or a list of values.

    A number may be written as in the rest of a file (``8/255``), a defense by another name of its (``vanilla``).
    """
    for key, value in wanted.items():
        allowed = value if isinstance(value, (list, tuple)) else [value]
        label = item.label(key)
        if not any(_is(key, label, one) for one in allowed):
            return False
    return True


def _is(key: str, label: Any, wanted: Any) -> bool:
    if label == wanted:
        return True
    if isinstance(label, (int, float)) and not isinstance(label, bool) and isinstance(wanted, (str, float)):
        try:
            return math.isclose(label, fraction(wanted), rel_tol=1e-9)
        except ConfigError:
            return False
    named = key.rpartition(".")[2] in ("defense", "source") and isinstance(wanted, str) and wanted in DEFENSES
    return named and label == DEFENSES.entry(wanted).name


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
