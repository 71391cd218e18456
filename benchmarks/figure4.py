"""The paper's figure 4 from runs' metrics: mean noise scale over epochs, and what the regulariser alone would give.

    python benchmarks/figure4.py runs/cifar10-learn2perturb runs/cifar10-pni --out runs/figure4

The paper reads growing thetas of Learn2Perturb beside PNI's alphas, which go to zero, as a sign that the noise is
learned. The dashed line is Learn2Perturb-R, which no loss has touched: where theta follows it, growth proves nothing.
Writes OUT.png and OUT.csv and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from learn2perturb.errors import Learn2PerturbError
from learn2perturb.records import atomic_write
from learn2perturb.training import read_metrics
from learn2perturb.training.metrics import noise_scales

HEAD = ("run", "defense", "network", "scale", "epoch", "mean", "regulariser_only", "spread", "minimum", "maximum")


@dataclass(frozen=True)
class Curve:
    """The scale of a run's noise after each epoch; ``schedule`` is None where no regulariser drives it."""

    run: str
    defense: str
    network: str
    scale: str
    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    schedule: tuple[float, ...] | None
    spread: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]

    def reading(self) -> str:
        """Say what the curve shows, in a line."""
        first, last = self.mean[0], self.mean[-1]
        name = f"{self.run} ({self.defense}): mean {'|alpha|' if self.scale == 'alpha' else self.scale}"
        text = f"{name} {first:.4f} after the first epoch, {last:.4f} after the last"
        if self.schedule is None:
            return f"{text}: it {'falls' if last < first else 'grows'}"
        alone = self.schedule[-1]
        return (
            f"{text}; the regulariser alone gives {alone:.4f}: the loss accounts for {100 * (last / alone - 1):+.1f} %"
        )


def read_curve(run: Path) -> Curve:
    """Read the curve of a run folder.

    Raises:
        Learn2PerturbError: it has no metrics, or its noise is not learned.
    """
    lines = read_metrics(run)
    if not lines:
        raise Learn2PerturbError(f"{run} has no finished epoch in metrics.jsonl; give a run folder that has trained")
    scale = next(iter(noise_scales(lines[-1])), None)
    if scale is None:
        raise Learn2PerturbError(f"the noise of {run} is not learned; give runs of learn2perturb and pni")
    lines = [line for line in lines if f"{scale}_mean" in line]
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    sites = [line[scale].values() for line in lines]
    scheduled = all(f"{scale}_schedule" in line for line in lines)
    return Curve(
        run.name,
        config["defense"],
        config["model"],
        scale,
        tuple(line["epoch"] + 1 for line in lines),
        tuple(line[f"{scale}_mean"] for line in lines),
        tuple(line[f"{scale}_schedule"] for line in lines) if scheduled else None,
        tuple(max(site["spread"] for site in found) for found in sites),
        tuple(min(site["minimum"] for site in found) for found in sites),
        tuple(max(site["maximum"] for site in found) for found in sites),
    )


def rows(curves: Sequence[Curve]) -> list[tuple[object, ...]]:
    """Return the rows of the table: one for each run and epoch."""
    found: list[tuple[object, ...]] = []
    for curve in curves:
        for index, epoch in enumerate(curve.epochs):
            numbers = (curve.spread[index], curve.minimum[index], curve.maximum[index])
            alone = curve.schedule[index] if curve.schedule is not None else ""
            found.append(
                (curve.run, curve.defense, curve.network, curve.scale, epoch, curve.mean[index], alone, *numbers)
            )
    return found


def picture(curves: Sequence[Curve]) -> bytes:
    """Return the figure as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, curve in enumerate(curves):
        symbol = r"|\alpha|" if curve.scale == "alpha" else rf"\{curve.scale}"
        label = f"{curve.defense}, mean ${symbol}$ ({curve.network})"
        axes.plot(curve.epochs, curve.mean, marker="o", markersize=3, color=f"C{number}", label=label)
        if curve.schedule is not None:
            label = f"{curve.defense}, regulariser alone"
            axes.plot(curve.epochs, curve.schedule, linestyle=(0, (3, 3)), color="black", zorder=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("scale of the noise, mean over sites")
    axes.set_ylim(0, 1.1 * max(max(curve.mean + (curve.schedule or ())) for curve in curves))
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    plt.close(figure)
    return content.getvalue()


def main() -> int:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of learn2perturb, pni, ...")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/figure4"), help="name of the files, without .png and .csv"
    )
    arguments = parser.parse_args()
    try:
        curves = [read_curve(run) for run in arguments.runs]
        text = io.StringIO()
        csv.writer(text).writerows([HEAD, *rows(curves)])
        atomic_write(arguments.out.with_name(arguments.out.name + ".csv"), text.getvalue())
        atomic_write(arguments.out.with_name(arguments.out.name + ".png"), picture(curves))
    except Learn2PerturbError as error:
        print(f"figure4: error: {error}", file=sys.stderr)
        return 2
    print(("{:<24}{:<8}{:>6}{:>10}{:>18}{:>10}{:>10}{:>10}").format(*HEAD[:1], *HEAD[3:]))
    for run, _, _, scale, epoch, mean, alone, *numbers in rows(curves):
        shown = f"{alone:.4f}" if alone != "" else "-"
        print(
            f"{run:<24}{scale:<8}{epoch:>6}{mean:>10.4f}{shown:>18}" + "".join(f"{number:>10.4f}" for number in numbers)
        )
    for curve in curves:
        print(curve.reading())
    return 0


if __name__ == "__main__":
    sys.exit(main())
