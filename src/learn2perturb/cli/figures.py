"""Figures of records, as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.errors import ConfigError

if TYPE_CHECKING:
    from learn2perturb.certification.record import Certification
    from learn2perturb.diagnosis import Diagnosis

_AXES = {
    "draws": "draws averaged in each gradient",
    "steps": "steps of the attack",
}
# norm -> label and scale of its radii
_RADII = {"linf": ("eps, in 255ths of the pixel range", 255), "l2": ("l2 eps, [0, 1] pixel scale", 1)}


def check_folder(folder: str | None) -> Path | None:
    """Return the folder of the figures, or None.

    Raises:
        ConfigError: it is a file.
    """
    if folder is None:
        return None
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--figures {folder} is a file; give a folder")
    return path


def diagnosis_figures(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Draw accuracy against eps, draws and steps, each with its 95 % interval."""
    paths = []
    for curve in diagnosis.curves:
        label, scale = _RADII[diagnosis.norm] if curve.axis == "eps" else (_AXES[curve.axis], 1)
        at = [scale * point.at for point in curve.points]
        accuracy = [100 * point.accuracy for point in curve.points]
        low = [100 * point.interval.low for point in curve.points]
        high = [100 * point.interval.high for point in curve.points]
        figure, axes = _axes(label, f"{diagnosis.metadata.get('model')}, {curve.n} images")
        axes.plot(at, accuracy, marker="o")
        axes.fill_between(at, low, high, alpha=0.25)
        if curve.axis == "eps":
            axes.axhline(100 / diagnosis.num_classes, linestyle=":", color="grey")
            axes.set_xscale("symlog", linthresh=min(value for value in at if value > 0), base=2)
        elif len(at) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{value:.4g}" for value in at], minor=False)
        axes.minorticks_off()
        paths.append(_written(figure, folder / f"accuracy-against-{curve.axis}.png"))
    return paths


def certification_figure(certification: Certification, folder: Path) -> list[Path]:
    """Draw certified accuracy against radius, and the radius that the l_inf ball needs."""
    top = max(certification.needed, *certification.radii) * 1.05
    radii: Sequence[float] = [top * part / 200 for part in range(201)]
    accuracy = [100 * share for _, share in certification.curve(radii)]
    title = f"{certification.metadata.get('model')}, {len(certification.radii)} images, {certification.method}"
    figure, axes = _axes(f"{certification.norm} radius", title)
    axes.set_ylabel("certified accuracy, %")
    axes.plot(radii, accuracy, drawstyle="steps-post")
    axes.axvline(certification.needed, linestyle=":", color="grey", label=f"covers l_inf {certification.eps:.4g}")
    axes.legend()
    return [_written(figure, folder / "certified-accuracy.png")]


def _axes(label: str, title: str) -> tuple[Any, Any]:
    # Figure, not pyplot: no display, and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    return figure, axes


def _written(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
