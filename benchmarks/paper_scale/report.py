"""The results as Markdown and figures: only what records and metrics say; what is not there is called missing."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks import figure4
from benchmarks.paper_scale.numbers import CLEAN, MISSING, accuracy, command, lead, row_of, table
from benchmarks.paper_scale.plan import Plan
from benchmarks.paper_scale.state import State
from benchmarks.paper_scale.tasks import cells_of
from learn2perturb.records import atomic_write
from learn2perturb.training import read_metrics

_PAPER_CELLS = (CLEAN, "fgsm", "pgd7")
# The draws in a gradient, and the cell that has them.
_EOT = {1: "pgd20", 5: "eot5", 20: "eot20", 80: "eot80"}


def status(plan: Plan, state: State) -> str:
    """Return a line for each run: how far it is, and which cells are there."""
    lines = []
    for run in plan.runs:
        cells = cells_of(plan, run)
        there = [cell.name for cell in cells if state.cell(run, cell.name).exists()]
        training = "finished" if state.is_finished(run) else f"{state.epochs(run)}/{plan.config(run).resolve().epochs}"
        lines.append(f"{run:<44} epochs {training:<9} cells {len(there)}/{len(cells)} {' '.join(there)}".rstrip())
    return "\n".join(lines)


def write_report(plan: Plan, state: State, out: Path) -> Path:
    """Write ``report.md`` and ``theta.png`` into ``out``; return the path of the report."""
    parts = [
        [
            "# Paper scale",
            "",
            f"Plan: `{plan.path.name}`. Accuracy in % on {_images(plan, state)};",
            "brackets: 95 % intervals over images and draws; ±: deviation over scoring draws that no attack has seen.",
        ],
        ["## The paper's table 1 beside ours", "", *_paper(plan, state)],
        ["## Every cell", "", *_cells(plan, state)],
        ["## Draws in the attacker's gradient", "", *_eot(plan, state)],
        ["## Lead over PGD training, paired over images", "", *_leads(plan, state)],
        ["## Seeds", "", *_seeds(plan, state)],
        ["## Theta beside the regulariser alone", "", *_theta(plan, state, out)],
        ["## Time", "", *_time(plan, state)],
        ["## Where", "", *_where(plan, state)],
        ["## Commands", "", *_commands(plan)],
    ]
    return atomic_write(out / "report.md", "\n\n".join("\n".join(part) for part in parts) + "\n")


def _images(plan: Plan, state: State) -> str:
    """Say how many images the records are of."""
    rows = (row_of(plan, state, run, cell.name) for run in plan.runs for cell in cells_of(plan, run))
    counts = sorted({row.n for row in rows if row is not None})
    return f"{' or '.join(map(str, counts))} test images" if counts else "no images yet"


def _models(plan: Plan) -> list[str]:
    return list(dict.fromkeys(config.model for config in plan.runs.values()))


def _paper(plan: Plan, state: State) -> list[str]:
    rows = []
    for run, config in plan.runs.items():
        paper = plan.paper.get(config.model, {}).get(config.defense, {})
        line = [config.model, config.defense, str(config.seed)]
        for cell in _PAPER_CELLS:
            number = f"{paper[cell]:g}" if cell in paper else "none"
            line += [number, accuracy(row_of(plan, state, run, cell))]
        rows.append(line)
    head = ["network", "defense", "seed"]
    return table([*head, *(f"{cell}, {who}" for cell in _PAPER_CELLS for who in ("paper", "ours"))], rows)


def _cells(plan: Plan, state: State) -> list[str]:
    """Give a table for each network: a line for each cell, noise on and off, a column for each run."""
    lines: list[str] = []
    for model in _models(plan):
        runs = [run for run, config in plan.runs.items() if config.model == model]
        rows = []
        for name in [CLEAN, *(cell.name for cell in plan.cells)]:
            for noise in (True, False):
                line = []
                for run in runs:
                    planned = [cell for cell in cells_of(plan, run) if cell.name == name]
                    off = name == CLEAN or any(cell.is_verb and cell.noise_off for cell in planned)
                    if (name != CLEAN and not planned) or not (noise or (off and plan.is_noisy(run))):
                        line.append("")
                    else:
                        line.append(accuracy(row_of(plan, state, run, name, noise=noise)))
                if any(line):
                    rows.append([name if noise else f"{name}, noise off", *line])
        lines += [f"### {model}", "", *table(["attack", *runs], rows), ""]
    return lines[:-1]


def _eot(plan: Plan, state: State) -> list[str]:
    rows = [
        [run, *(accuracy(row_of(plan, state, run, cell)) for cell in _EOT.values())]
        for run in plan.runs
        if plan.is_noisy(run)
    ]
    return table(["run", *(f"{draws} {'draw' if draws == 1 else 'draws'}" for draws in _EOT)], rows)


def _leads(plan: Plan, state: State) -> list[str]:
    """Compare networks with noise under each number of draws with PGD training under the same steps."""
    rows = []
    for run, config in plan.runs.items():
        rivals = [name for name, other in plan.runs.items() if (other.model, other.defense) == (config.model, "pgd_at")]
        rival = next((name for name in rivals if plan.runs[name].seed == config.seed), None)
        if rival is None or not plan.is_noisy(run):
            continue
        pairs = {CLEAN: CLEAN, "fgsm": "fgsm", "pgd7": "pgd7", **dict.fromkeys(_EOT.values(), "pgd20")}
        found = [lead(row_of(plan, state, run, own), row_of(plan, state, rival, other)) for own, other in pairs.items()]
        rows.append([run, rival, *found])
    head = [CLEAN, "FGSM", "PGD-7", *(f"PGD-20, {draws} to a gradient" for draws in _EOT)]
    return table(["run", "less", *head], rows)


def _seeds(plan: Plan, state: State) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for run, config in plan.runs.items():
        groups.setdefault((config.model, config.defense), []).append(run)
    rows = []
    for (model, defense), runs in groups.items():
        for cell in (CLEAN, *(cell.name for cell in plan.cells)):
            found = [row.accuracy for run in runs if (row := row_of(plan, state, run, cell)) is not None]
            if len(found) > 1:
                spread = f"{100 * statistics.mean(found):.2f} ± {100 * statistics.stdev(found):.2f}"
                rows.append([model, defense, cell, spread, f"{len(found)} of {len(runs)}"])
    return table(["network", "defense", "attack", "mean ± deviation over seeds", "seeds"], rows) if rows else [MISSING]


def _theta(plan: Plan, state: State, out: Path) -> list[str]:
    curves = []
    for run in plan.runs:
        lines = read_metrics(state.run(run))
        if lines and figure4.noise_scales(lines[-1]):
            curves.append(figure4.read_curve(state.run(run)))
    if not curves:
        return [MISSING]
    atomic_write(out / "theta.png", figure4.picture(curves))
    rows = []
    for curve in curves:
        shown = {0, len(curve.epochs) - 1} | {epoch - 1 for epoch in (20, 30, 50, 100, 150, 250)}
        for index in sorted(index for index in shown if index < len(curve.epochs)):
            alone = MISSING if curve.schedule is None else f"{curve.schedule[index]:.4f}"
            numbers = [f"{curve.spread[index]:.4f}", f"{curve.minimum[index]:.4f}", f"{curve.maximum[index]:.4f}"]
            rows.append([curve.run, curve.scale, str(curve.epochs[index]), f"{curve.mean[index]:.4f}", alone, *numbers])
    head = ["run", "scale", "epoch", "mean", "regulariser alone", "largest spread in a site", "minimum", "maximum"]
    readings = [f"- {curve.reading()}" for curve in curves]
    return [*table(head, rows), "", *readings, "", "![scale of the noise over epochs](theta.png)"]


def _time(plan: Plan, state: State) -> list[str]:
    """Give seconds an epoch, and the least that the floor of this machine allows, where it was measured."""
    floors = json.loads(state.floors.read_text(encoding="utf-8")) if state.floors.exists() else {}
    rows = []
    for run, config in plan.runs.items():
        lines = read_metrics(state.run(run))
        if not lines:
            rows.append([run, f"0/{config.resolve().epochs}", *[MISSING] * 4])
            continue
        delay = config.resolve().adversarial_delay or 0
        # Epochs before the adversary are cheap ones.
        late = [line["seconds"] for line in lines if line["epoch"] >= delay] or [line["seconds"] for line in lines]
        share = MISSING
        floor = floors.get(f"{config.defense} {config.model}")
        if floor is not None:
            steps = math.ceil(lines[-1]["step"] / (lines[-1]["epoch"] + 1))
            share = f"{floor['seconds'] * steps / statistics.median(late):.1%}"
        tasks = [(task, entry) for entry in state.slices() for task in entry["tasks"] if task["task"] == f"train {run}"]
        wall = sum(task["seconds"] for task, _ in tasks)
        beside = max((entry["side"] for _, entry in tasks), default=1)
        minutes = f"{wall / 60:.1f} in {len(tasks)} slices" if tasks else MISSING
        rows.append(
            [
                run,
                f"{len(lines)}/{config.resolve().epochs}",
                f"{statistics.median(late):.2f}",
                share,
                minutes,
                str(beside),
            ]
        )
    head = ["run", "epochs", "seconds an epoch (median, with adversary)", "share of the floor", "minutes in all"]
    return table([*head, "processes at most side by side"], rows)


def _where(plan: Plan, state: State) -> list[str]:
    found: dict[str, list[str]] = {}
    for run in plan.runs:
        path = state.run(run) / "environment.json"
        if path.exists():
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            keys = ("gpu", "processor", "cpu_count", "platform", "python", "torch", "learn2perturb", "git")
            found.setdefault("; ".join(f"{key} {facts[key]}" for key in keys if facts.get(key)), []).append(run)
    return [f"- {text}: {', '.join(runs)}" for text, runs in found.items()] or [MISSING]


def _commands(plan: Plan) -> list[str]:
    return ["```console", *(command(plan, "RUN", cell) for cell in plan.cells), "```"]
