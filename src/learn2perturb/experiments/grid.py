"""Which pairs of a study stand in which place of a view; what a view shows is checked before any work.

Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation.result import format_eps
from learn2perturb.experiments.baseline import partner
from learn2perturb.experiments.facts import published
from learn2perturb.experiments.spec import Pair, RunPlan, Study, ViewPlan, matches

# What a view can show, by what is asked of a run; the first is shown where the view does not say.
VALUES: dict[str, tuple[str, ...]] = {
    "accuracy": ("accuracy", "worst_of", "l2", "linf"),
    "certificate": ("certified", "radius", "abstained"),
    "diagnosis": ("verdict", "lowest"),
}
_NUMBERED = ("worst_of", "certified")  # worst_of.10, certified.0.25
Labels = tuple[str, ...]


@final
@dataclass(frozen=True)
class Place:
    """Where a number stands: labels of its row and its column, and where on the axis of a curve."""

    row: Labels
    column: Labels = ()
    x: float | None = None


@final
@dataclass(frozen=True)
class Grid:
    """The pairs of a table or a curve by place.

    ``off_axis`` have no number on the axis of the curve; ``partners``: key of a pair -> the pair of the baseline.
    """

    value: str
    rows: tuple[Labels, ...]
    columns: tuple[Labels, ...]
    places: Mapping[Place, tuple[Pair, ...]]
    off_axis: tuple[Pair, ...] = ()
    partners: Mapping[tuple[str, ...], Pair] = field(default_factory=dict)


def value_and_number(value: str) -> tuple[str, float | None]:
    """Split ``worst_of.10`` into name and number.

    Raises:
        UnknownNameError: there is no such value.
        ConfigError: the number is missing, is none, or the value takes none.
    """
    known = [name for names in VALUES.values() for name in names]
    name, dot, tail = value.partition(".")
    if name not in known:
        raise UnknownNameError.of("value of a view", value, known)
    if name == "worst_of" and not (tail.isdigit() and int(tail) > 0):
        raise ConfigError(f"value is {value!r}; say of how many draws, such as worst_of.10")
    if dot and name not in _NUMBERED:
        raise ConfigError(f"value is {value!r}, but {name} takes no number; write {name}")
    try:
        return name, float(tail) if tail else None
    except ValueError:
        raise ConfigError(f"value is {value!r}; give a radius, such as certified.0.25") from None


def grid(plan: ViewPlan, study: Study) -> Grid:
    """Return the places of a table or a curve and the pairs in each, which differ in their seed only.

    Raises:
        ConfigError: it shows no pair, or would put unlike runs into one place; the message names what is missing.
    """
    everything = list(study.all_pairs())
    chosen = [pair for pair in everything if matches(pair, plan.where)]
    value, kind = _value(plan, chosen)
    chosen = [pair for pair in chosen if pair.cell.kind == kind]
    if not chosen:
        raise ConfigError(f"it shows {value}, and no {kind} has the labels that its where asks for; fix where")
    curve = plan.kind == "curve"
    row_keys, column_keys = (plan.series, ()) if curve else (plan.rows, plan.columns)
    places: dict[Place, list[Pair]] = {}
    off_axis = []
    for pair in chosen:
        x = axis_value(pair, plan.x) if curve else None
        if curve and x is None:
            off_axis.append(pair)
        else:
            places.setdefault(Place(texts(pair, row_keys), texts(pair, column_keys), x), []).append(pair)
    if not places:
        raise ConfigError(f"it has {plan.x} on its axis, and no pair has a number there; change x or where")
    for place, pairs in places.items():
        _check_alike(place, pairs)
        if not plan.noise:
            _check_noise_off(pairs)
    # Rows as the runs come, columns as the cells do: a cell that is asked of some runs only keeps its place.
    ranked = sorted(places, key=lambda place: study.cells.index(places[place][0].cell))
    return Grid(
        value,
        tuple(dict.fromkeys(place.row for place in places)),
        tuple(dict.fromkeys(place.column for place in ranked)),
        {place: tuple(pairs) for place, pairs in places.items()},
        tuple(off_axis),
        _partners(plan, value, places, everything),
    )


def lines(plan: ViewPlan, study: Study) -> dict[Labels, list[RunPlan]]:
    """Return the runs behind each line of a history, which differ in their seed only.

    Raises:
        ConfigError: no run has the labels that it asks for, or unlike runs are behind one line.
    """
    found: dict[Labels, list[RunPlan]] = {}
    for run in study.runs:
        if run.config is not None and matches(run, plan.where):
            found.setdefault(texts(run, plan.series), []).append(run)
    if not found:
        raise ConfigError("it shows the history of no run; fix where (networks that are found have none)")
    for row, runs in found.items():
        _check_same(", ".join(row), [_of_run(run) for run in runs])
    return found


def check_view(plan: ViewPlan, study: Study) -> None:
    """Check that a view can be built of a study.

    Raises:
        ConfigError: it cannot; the message names the view.
    """
    try:
        _check_paper(plan)
        if plan.kind == "history":
            lines(plan, study)
        else:
            grid(plan, study)
    except ConfigError as error:
        raise ConfigError(f"study {study.name}: view {plan.name}: {error}") from None


def axis_value(pair: Pair, key: str) -> float | None:
    """Return where a pair is on the axis ``key``; clean images are attacked by 0."""
    if key == "eps" and pair.cell.kind == "accuracy" and pair.cell.attack is None:
        return 0.0
    value = pair.label(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def texts(item: Pair | RunPlan, keys: Sequence[str]) -> Labels:
    """Return the labels ``keys`` as they are shown."""
    return tuple(text_of(key, item.label(key)) for key in keys)


def text_of(key: str, value: Any) -> str:
    """Return a label as it is shown."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return format_eps(value) if key.rpartition(".")[2] == "eps" else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _value(plan: ViewPlan, chosen: Sequence[Pair]) -> tuple[str, str]:
    """Return what the view shows, and of which kind of cell."""
    kinds = {pair.cell.kind for pair in chosen}
    if plan.value == "accuracy" and kinds and "accuracy" not in kinds:
        kind = next(kind for kind in VALUES if kind in kinds)
        return VALUES[kind][0], kind
    name, _ = value_and_number(plan.value)
    return plan.value, next(kind for kind, names in VALUES.items() if name in names)


def _check_paper(plan: ViewPlan) -> None:
    if not plan.paper:
        return
    if not isinstance(plan.paper.get("facts"), str):
        raise ConfigError("paper names no facts; write paper: {facts: table1}")
    if plan.kind != "history" and (plan.value != "accuracy" or not plan.noise):
        raise ConfigError("the paper's numbers are accuracies with the noise on; leave paper out of any other view")
    keys = ("facts", *published(plan.paper["facts"]).keys)
    for key in plan.paper:
        if key not in keys:
            raise UnknownNameError.of("key of paper", key, keys)


def _partners(
    plan: ViewPlan, value: str, places: Mapping[Place, Sequence[Pair]], everything: Sequence[Pair]
) -> dict[tuple[str, ...], Pair]:
    if not plan.baseline:
        return {}
    if value != "accuracy":
        raise ConfigError(f"it shows {value} against a baseline, and only accuracy is compared; leave baseline out")
    if not any(matches(pair.run, plan.baseline) for pair in everything):
        wanted = ", ".join(f"{key} {item}" for key, item in plan.baseline.items())
        raise ConfigError(f"its baseline is a run of {wanted}, and the study has none; add one to runs or fix it")
    found = {}
    for pairs in places.values():
        for pair in pairs:
            if (other := partner(pair, plan.baseline, everything)) is not None:
                found[pair.key] = other
    return found


def _of_run(run: RunPlan) -> dict[str, Any]:
    return {"name": run.name} | {key: value for key, value in run.axes.items() if key != "seed"}


def _of_pair(pair: Pair) -> dict[str, Any]:
    found = _of_run(pair.run) | {"cell": pair.cell.name} | dict(pair.cell.axes)
    for source in pair.sources.values():
        found |= {f"source.{key}": value for key, value in _of_run(source).items()}
    return found


def _check_alike(place: Place, pairs: Sequence[Pair]) -> None:
    where = ", ".join(filter(None, (*place.row, *place.column, "" if place.x is None else f"{place.x:.4g}")))
    _check_same(where, [_of_pair(pair) for pair in pairs])
    seeds = [pair.run.label("seed") for pair in pairs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where!r} would hold a pair of one seed twice; name runs and cells apart")


def _check_same(where: str, items: Sequence[Mapping[str, Any]]) -> None:
    keys = dict.fromkeys(key for item in items for key in item)
    differing = [key for key in keys if any(item.get(key) != items[0].get(key) for item in items)]
    if differing:
        raise ConfigError(
            f"{where!r} would hold the mean of unlike runs, which differ in {', '.join(differing)}; add that to its "
            "rows, columns or series, or choose by where"
        )


def _check_noise_off(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        if not pair.cell.scoring.noise_off and pair.run.stochastic is not False:
            raise ConfigError(f"it shows noise off, and cell {pair.cell.name} does not score it; set noise_off: true")
