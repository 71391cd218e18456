"""The tables of ``learn2perturb bench``. Knows no torch."""

from __future__ import annotations

from typing import Any

from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.options import print_table

Rows = dict[str, dict[str, Any]]


def title(what: str, settings: BenchSettings) -> str:
    """Return in words what is timed."""
    images = f"{settings.dataset or 'random'} images"
    network = f"{settings.model}, {settings.defense}"
    if settings.defense == "learn2perturb":
        network += f", noise {settings.sharing}"
    if what in ("step", "scale"):
        return f"a training step: {network}, PGD-{settings.attack_steps}, batch {settings.batch_size}, {images}"
    if what == "attack":
        return f"attacks on {settings.images} {images}: {network}, EOT with {settings.eot} draws"
    workers = _some(settings.workers, "worker")
    return f"an epoch of {settings.images} {images}: batch {settings.batch_size}, DataLoader with {workers}"


def show(what: str, settings: BenchSettings, measured: Rows) -> None:
    """Print a table of the execution modes, one for each attack, and what the roofline was estimated from."""
    if what == "scale":
        _show_scale(settings, measured)
        return
    where = measured["roofline"]["environment"]
    place = where["gpu"] or f"{where['processor']}, {_some(where['torch_threads'], 'thread')}"
    print(f"{place}, torch {where['torch']}; {_some(settings.rounds, 'round')}, medians\n")
    attacks = [key for key, value in measured["roofline"].items() if isinstance(value, dict) and "seconds" in value]
    for attack in attacks or [""]:
        rows = {name: row.get(attack, row) for name, row in measured.items()}
        heading = f"{attack}: {title(what, settings)}" if attack else title(what, settings)
        _table(heading, rows, ("attack_share", "noise_share") if what == "step" else ())
        print(_estimate(rows["roofline"]) + "\n")
    for name, row in measured.items():
        if "unavailable" in row:
            print(f"{name}: {row['unavailable']}")


def _show_scale(settings: BenchSettings, measured: Rows) -> None:
    where = measured["1 process"]["environment"]
    print(f"{where['gpu'] or where['processor']}, torch {where['torch']}; {_some(settings.rounds, 'round')}, medians\n")
    lines = [
        [
            name, f"{row['milliseconds']:.1f}", f"{row['images_per_second']:.1f}", f"{row['efficiency']:.0%}",
            f"{row['work']:.2f}", *(f"{row[key]:.1%}" for key in ("overhead", "slower", "waiting_share")),
            str(row["messages"]),
        ]
        for name, row in measured.items()
    ]  # fmt: skip
    head = ["", "ms", "images/s", "efficiency", "work", "overhead", "slower", "waiting", "messages"]
    engine = measured["1 process"]["settings"]["engine"]
    print_table(
        head, lines, title=f"{title('scale', settings)}, {engine} engine, {_some(settings.threads or 1, 'thread')} each"
    )


def _some(count: int | None, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _table(heading: str, rows: Rows, shares: tuple[str, ...]) -> None:
    head = ["", "ms", "fastest", "slowest", "images/s", "x baseline"]
    head += [*(share.removesuffix("_share") for share in shares), "of roofline", "peak MiB", "first call s"]
    lines: list[list[str]] = []
    for name, row in rows.items():
        if "unavailable" in row:
            continue
        line = [name, f"{1000 * row['seconds']:.1f}"]
        if name == "roofline":
            line += ["", "", f"{row['images_per_second']:.1f}"]
        else:
            line += [f"{1000 * row['fastest']:.1f}", f"{1000 * row['slowest']:.1f}", f"{row['images_per_second']:.1f}"]
            line += [f"{row['baseline_ratio']:.2f}", *(f"{row[share]:.0%}" for share in shares)]
            line += [f"{row['roofline_share']:.1%}", f"{row['peak_memory_bytes'] / 2**20:.0f}"]
            line += [f"{row['warmup_seconds']:.2f}"]
        lines.append(line + [""] * (len(head) - len(line)))
    print_table(head, lines, title=heading)


def _estimate(roofline: dict[str, Any]) -> str:
    """Return in words what the roofline was estimated from."""
    parts = []
    if roofline["flops"]:
        rate = f"{roofline['flops_per_second'] / 1e9:.0f} GFLOP/s in {roofline['dtype']}"
        parts.append(f"{roofline['flops'] / 1e9:.1f} GFLOP at {rate}: {1000 * roofline['arithmetic_seconds']:.1f} ms")
    if roofline["draws"]:
        rate = f"{roofline['draws_per_second'] / 1e9:.2f} G/s"
        parts.append(f"{roofline['draws'] / 1e6:.1f} M draws at {rate}: {1000 * roofline['noise_seconds']:.1f} ms")
    rate = f"{roofline['bytes_per_second'] / 1e9:.1f} GB/s"
    parts.append(f"{roofline['bytes'] / 1e6:.0f} MB at {rate}: {1000 * roofline['traffic_seconds']:.1f} ms")
    return f"roofline: {'; '.join(parts)} (arithmetic and draws, or traffic, whichever is longer)"
