"""The charts of a page, as Vega-Lite specifications: what is drawn, with bands for intervals and words for screens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from learn2perturb.certification import Certification
from learn2perturb.diagnosis import Diagnosis
from learn2perturb.diagnosis.claim import Claim
from learn2perturb.diagnosis.record import Curve
from learn2perturb.evaluation.intervals import Interval
from learn2perturb.experiments.view import View, ViewCell
from learn2perturb.report.sources import Training
from learn2perturb.report.sweeps import Sweep

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # names the language; nothing is fetched
Spec = dict[str, Any]
_AXES = {
    "draws": "draws averaged in each gradient",
    "steps": "steps of the attack",
    "eps": "eps",
    "eot": "draws averaged in each gradient",
}

# Which check a curve is of.
_CHECKS = {"draws": 7, "steps": 7, "eps": 5}


def chart(title: str, told: str, **parts: Any) -> Spec:
    """Return a specification that fills its place, with a description for screen readers."""
    return {"$schema": SCHEMA, "title": title, "description": told, "width": "container", "height": 240} | parts


def percent(title: str, *, zero: bool = True) -> Spec:
    """Return the axis of a share of 100."""
    return {"type": "quantitative", "title": title, "scale": {"domain": [0, 100]} if zero else {"zero": False}}


def accuracy_curve(diagnosis: Diagnosis, curve: Curve) -> Spec:
    """Return accuracy against eps, steps or draws with its band, chance and the claimed point."""
    stated = None
    if diagnosis.claim is not None:
        stated = 100 * diagnosis.claim.accuracy, diagnosis.eps if diagnosis.claim.eps is None else diagnosis.claim.eps
    title = f"Accuracy against {curve.axis} (check {_CHECKS[curve.axis]})"
    points = [(point.at, point) for point in curve.points]
    return _band(title, curve.axis, points, curve.n, diagnosis.norm, diagnosis.num_classes, stated)


def swept(sweep: Sweep, claim: Claim | None) -> Spec:
    """Return accuracy against the size, the steps or the draws of an attack, of rows that differ in nothing else."""
    last = sweep.rows[-1]
    title = (
        f"Accuracy against {sweep.axis}: {last.attack_type}, {'noise' if last.noise else 'noise off'}, {last.predictor}"
    )
    stated = None if claim is None else (100 * claim.accuracy, claim.eps)
    points = list(zip(sweep.at, sweep.rows, strict=True))
    return _band(title, sweep.axis, points, last.n, sweep.norm, sweep.num_classes, stated)


class _Measured(Protocol):
    """An accuracy with its interval."""

    @property
    def accuracy(self) -> float:
        """Of 1."""

    @property
    def interval(self) -> Interval:
        """Of the accuracy."""


def _band(
    title: str,
    axis: str,
    points: Sequence[tuple[float, _Measured]],
    n: int,
    norm: str,
    num_classes: int,
    stated: tuple[float, float | None] | None,
) -> Spec:
    """Return a line with its band, chance, and the per cent that are ``stated``, at their eps if there is one."""
    scale = 255 if axis == "eps" and norm == "linf" else 1
    unit = " (255ths of the pixel range)" if scale == 255 else ""
    values = [
        {
            "at": scale * at, "accuracy": 100 * point.accuracy,
            "low": 100 * point.interval.low, "high": 100 * point.interval.high,
        }
        for at, point in points
    ]  # fmt: skip
    x: Spec = {"field": "at", "type": "quantitative", "title": _AXES[axis] + unit, "scale": {"type": "symlog"}}
    # Ticks where something was measured: those of a symlog scale would lie on each other.
    x["axis"] = {"values": [value["at"] for value in values], "format": ".3~g", "labelOverlap": True}
    tooltip = [{"field": name, "type": "quantitative", "format": ".4g"} for name in ("at", "accuracy", "low", "high")]
    layers: list[Spec] = [
        {
            "mark": {"type": "area", "opacity": 0.25},
            "encoding": {"x": x, "y": {"field": "low", **percent("accuracy, %")}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "line", "point": {"size": 60}},
            "encoding": {"x": x, "y": {"field": "accuracy", **percent("accuracy, %")}, "tooltip": tooltip},
        },
    ]
    layers.append(_rule(100 / num_classes, "chance"))
    if stated is not None:
        accuracy, eps = stated
        layers.append(_rule(accuracy, "claimed"))
        if axis == "eps" and eps is not None:
            layers.append(_point(scale * eps, accuracy, x))
    told = "; ".join(f"{value['at']:.4g}: {value['accuracy']:.1f} %" for value in values)
    return chart(title, f"{told}; n = {n}", data={"values": values}, layer=layers)


def _rule(at: float, word: str) -> Spec:
    """Return a dashed line with its name: no colour alone tells what it is."""
    return {
        "data": {"values": [{"at": at, "word": word}]},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [4, 4]},
                "encoding": {"y": {"field": "at", "type": "quantitative"}},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "dy": -6, "x": 0},
                "encoding": {"y": {"field": "at", "type": "quantitative"}, "text": {"field": "word"}},
            },
        ],
    }


def _point(at: float, accuracy: float, x: Spec) -> Spec:
    """Return the claimed point: a shape of its own on the line that has its name."""
    return {
        "data": {"values": [{"at": at, "accuracy": accuracy}]},
        "mark": {"type": "point", "shape": "diamond", "size": 150, "strokeWidth": 2},
        "encoding": {
            "x": x, "y": {"field": "accuracy", "type": "quantitative"},
            "tooltip": [{"field": name, "format": ".4g", "title": f"claimed {name}"} for name in ("at", "accuracy")],
        },
    }  # fmt: skip


def noise_over_epochs(training: Training) -> Spec | None:
    """Return the scale of the noise over epochs beside what the regulariser alone gives; None where none is learned."""
    last = training.epochs[-1] if training.epochs else {}
    names = [key for key in last if _is_number(last.get(f"{key}_mean"))]
    values = []
    for line in training.epochs:
        for name in names:
            if _is_number(line.get(f"{name}_mean")):
                values.append({"epoch": line["epoch"] + 1, "value": line[f"{name}_mean"], "of": f"mean {name}"})
            if _is_number(line.get(f"{name}_schedule")):
                values.append(
                    {"epoch": line["epoch"] + 1, "value": line[f"{name}_schedule"], "of": "regulariser alone"}
                )
    if not values:
        return None
    told = ", ".join(f"{name} ends at {last[f'{name}_mean']:.4g}" for name in names)
    return _lines("Scale of the noise over epochs", told, values, "scale of the noise")


def training_curves(training: Training) -> Spec | None:
    """Return the accuracies of the training over epochs; None before the first."""
    last = training.epochs[-1] if training.epochs else {}
    names = [key for key in last if key.endswith(("_accuracy", "_clean", "_pgd")) and _is_number(last[key])]
    values = [
        {"epoch": line["epoch"] + 1, "value": 100 * line[name], "of": name.replace("_", " ")}
        for line in training.epochs
        for name in names
        if _is_number(line.get(name))
    ]
    if not values:
        return None
    told = ", ".join(f"{name.replace('_', ' ')} {100 * last[name]:.1f} %" for name in names)
    return _lines("Accuracy in training over epochs", f"at the end: {told}", values, "accuracy, %")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(title: str, told: str, values: Sequence[Spec], y: str) -> Spec:
    encoding = {
        "x": {"field": "epoch", "type": "quantitative", "title": "epoch", "axis": {"tickMinStep": 1}},
        "y": {"field": "value", "type": "quantitative", "title": y, "scale": {"zero": False}},
        "color": {"field": "of", "type": "nominal", "title": None},
        "strokeDash": {"field": "of", "type": "nominal", "title": None},
        "tooltip": [{"field": "of"}, {"field": "epoch"}, {"field": "value", "format": ".5g"}],
    }
    return chart(title, told, data={"values": list(values)}, mark={"type": "line", "point": True}, encoding=encoding)


def of_view(view: View) -> Spec | None:
    """Return the lines of a curve or a history with their bands, the paper's beside; None for a table."""
    values = [value for cell in view.cells for value in _points(view, cell)]
    if view.kind == "table" or not values:
        return None
    scale = _in_255ths(view)
    axis = _AXES.get(view.x.rpartition(".")[2], view.x.replace("_", " "))
    x = {
        "field": "at", "type": "quantitative",
        "title": axis + (" (255ths of the pixel range)" if scale == 255 else ""),
    }  # fmt: skip
    y: Spec = {"type": "quantitative", "title": ", ".join(filter(None, (view.value.replace("_", " "), view.unit)))}
    y["scale"] = {"domain": [0, 100]} if view.unit == "%" else {"zero": False}
    of = {"field": "of", "type": "nominal", "title": None}
    layers = [
        {
            "mark": {"type": "area", "opacity": 0.15},
            "encoding": {"x": x, "y": {"field": "low", **y}, "y2": {"field": "high"}, "fill": {**of, "legend": None}},
        },
        {
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": x, "y": {"field": "value", **y}, "color": of, "strokeDash": of,
                "tooltip": [{"field": "of"}, *({"field": name, "format": ".4g"} for name in ("at", "value"))],
            },
        },
    ]  # fmt: skip
    last = {str(value["of"]): value for value in values}
    told = "; ".join(f"{name} ends at {value['value']:.4g}" for name, value in last.items())
    return chart(view.title, told, data={"values": values}, layer=layers)


def _in_255ths(view: View) -> int:
    """Return 255 where the axis is a size of at most 1, as papers show it."""
    return 255 if view.x.rpartition(".")[2] == "eps" and all((cell.x or 0) <= 1 for cell in view.cells) else 1


def _points(view: View, cell: ViewCell) -> list[Spec]:
    if cell.x is None:
        return []
    name = ", ".join(filter(None, (*cell.row, *cell.column))) or view.value
    at, found = _in_255ths(view) * cell.x, []
    if cell.value is not None:
        band = cell.interval
        ends = {} if band is None else {"low": view.scale * band.low, "high": view.scale * band.high}
        found.append({"at": at, "value": view.scale * cell.value, "of": name, **ends})
    if cell.paper is not None:
        found.append({"at": at, "value": view.scale * cell.paper.mean, "of": f"{name}, paper"})
    return found


def certified(certification: Certification) -> Spec:
    """Return certified accuracy against radius, and the radius that the l_inf ball needs."""
    top = max(certification.needed, *certification.radii) * 1.05
    radii = [top * part / 200 for part in range(201)]
    values = [{"radius": radius, "share": 100 * share} for radius, share in certification.curve(radii)]
    line = {
        "mark": {"type": "line", "interpolate": "step-after"},
        "encoding": {
            "x": {
                "field": "radius",
                "type": "quantitative",
                "title": f"{certification.norm} radius, [0, 1] pixel scale",
            },
            "y": {"field": "share", **percent("certified accuracy, %")},
            "tooltip": [{"field": "radius", "format": ".4g"}, {"field": "share", "format": ".1f"}],
        },
    }
    needed = {
        "data": {"values": [{"at": certification.needed, "word": f"covers l_inf {certification.eps:.4g}"}]},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [4, 4]},
                "encoding": {"x": {"field": "at", "type": "quantitative"}},
            },
            {
                "mark": {"type": "text", "align": "right", "dx": -4, "y": 10},
                "encoding": {"x": {"field": "at", "type": "quantitative"}, "text": {"field": "word"}},
            },
        ],
    }
    told = f"{values[0]['share']:.1f} % at radius 0; the ball of l_inf {certification.eps:.4g} "
    told += f"needs {certification.needed:.4g}"
    return chart("Certified accuracy against radius", told, data={"values": values}, layer=[line, needed])
