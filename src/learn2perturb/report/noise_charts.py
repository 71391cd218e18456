"""Charts of what lies behind the accuracies: the noise place by place, and how sure the answers were."""

from __future__ import annotations

from learn2perturb.evaluation import Row
from learn2perturb.evaluation.margins import BINS, Margins
from learn2perturb.report.charts import Spec, chart
from learn2perturb.runs.noise_maps import NoiseMap


def noise_map(one: NoiseMap) -> Spec:
    """Return the scale of the noise at a site as a map, light to dark; every value is told on hover."""
    values = [
        {"row": row, "column": column, "value": value}
        for row, line in enumerate(one.values)
        for column, value in enumerate(line)
    ]
    flat = len(one.values) == 1
    size = " x ".join(map(str, one.shape)) or "1 number"
    told = f"{one.symbol} of shape {size}: mean {one.mean:.4g}, deviation {one.spread:.2g}, "
    told += f"from {one.minimum:.4g} to {one.maximum:.4g}"
    told += f"; shown are means over {one.averaged}" if one.averaged else ""
    axis = {"labelAngle": 0, "labelOverlap": True}
    x = {"field": "column", "type": "ordinal", "title": one.columns, "axis": axis}
    y = {"field": "row", "type": "ordinal", "title": one.rows or None, "axis": None if flat else axis}
    # Blocks stand beside each other without a gap; a strip is no taller than it needs to be to be seen.
    height = 60 if flat else 240
    return chart(
        f"{one.symbol} at {one.site or 'the whole network'}", told, data={"values": values},
        mark={"type": "rect"}, height=height,
        encoding={
            "x": x, "y": y,
            "color": {
                "field": "value", "type": "quantitative", "title": one.symbol, "scale": {"scheme": "viridis"},
                "legend": {"format": ".3g"},
            },
            "tooltip": [{"field": "row"}, {"field": "column"}, {"field": "value", "format": ".4g"}],
        },
    )  # fmt: skip


def margins(row: Row, counted: Margins, attack: str) -> Spec:
    """Return how sure the answers of ``row`` were: shares of all answers by margin, wrong ones left of zero."""
    every = sum(counted.right) + sum(counted.wrong)
    sides = (
        ("wrong", [(-(at + 1) / BINS, -at / BINS, count) for at, count in enumerate(counted.wrong)]),
        ("right", [(at / BINS, (at + 1) / BINS, count) for at, count in enumerate(counted.right)]),
    )
    values = [
        {"from": low, "to": high, "share": 100 * count / every, "answers": answers}
        for answers, bins in sides
        for low, high, count in bins
    ]
    sure = 100 * counted.right[-1] / every
    told = f"{100 * sum(counted.wrong) / every:.1f} % of {every} answers are wrong, "
    told += f"{100 * counted.wrong[-1] / every:.1f} % with a margin below {1 / BINS - 1:g}; "
    told += f"{sure:.1f} % are right with one above {1 - 1 / BINS:g}"
    x = {"field": "from", "type": "quantitative", "title": "probability of the true class less the largest other"}
    return chart(
        f"Margins, {attack}", told, data={"values": values},
        mark={"type": "bar", "binSpacing": 0},
        encoding={
            "x": {**x, "scale": {"domain": [-1, 1]}, "bin": "binned"},
            "x2": {"field": "to"},
            "y": {"field": "share", "type": "quantitative", "title": f"share of {row.draws} x {row.n} answers, %"},
            "color": {"field": "answers", "type": "nominal", "title": None, "sort": ["right", "wrong"]},
            "tooltip": [
                {"field": "answers"}, {"field": "from", "format": ".2f"}, {"field": "to", "format": ".2f"},
                {"field": "share", "format": ".2f"},
            ],
        },
    )  # fmt: skip
