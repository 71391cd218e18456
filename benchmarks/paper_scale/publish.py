"""A run's weights and their model card, put into the package's zoo."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from benchmarks.paper_scale.numbers import CLEAN, accuracy, command, row_of, table
from benchmarks.paper_scale.plan import Plan
from benchmarks.paper_scale.state import State
from benchmarks.paper_scale.tasks import cells_of
from learn2perturb import zoo
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.records import atomic_write
from learn2perturb.registry import DEFENSES, MODELS
from learn2perturb.runs.checkpoint import read_model, sealed
from learn2perturb.training import read_metrics

# Where something lay on the machine that trained: no concern of a reader's.
_LOCAL = {"data_dir": None, "device": "auto"}


def publish(plan: Plan, state: State, run: str, folder: Path | None = None) -> Path:
    """Put the weights of a finished run, and its card with every number, into the zoo; return the card.

    Raises:
        ConfigError: no such run.
        CheckpointError: it is not finished, lacks a cell, or is too large.
    """
    config = plan.config(run)
    source = state.weights(run)
    if source is None or not state.is_finished(run):
        raise CheckpointError(f"{run} is not finished, or its weights are not here; train it on, or unpack them")
    lacking = [cell.name for cell in cells_of(plan, run) if not state.cell(run, cell.name).exists()]
    if lacking:
        raise CheckpointError(f"{run} lacks {', '.join(lacking)}; a card carries every number, so evaluate it first")
    state_dict, header = read_model(source)
    header["config"] |= _LOCAL
    content = sealed(state_dict, header)
    if len(content) > zoo.MOST_BYTES:
        raise ConfigError(f"{run} has {len(content)} bytes; the zoo takes networks of at most {zoo.MOST_BYTES}")
    place = zoo.FOLDER if folder is None else folder
    atomic_write(place / f"{run}.safetensors", content)
    settings = {key: value for key, value in header["config"].items() if key not in _LOCAL}
    defense, model = DEFENSES.entry(config.defense), MODELS.entry(config.model)
    environment = json.loads((state.run(run) / "environment.json").read_text(encoding="utf-8"))
    where = [environment.get("gpu") or environment["processor"]]
    where += [f"{name} {environment[name]}" for name in ("torch", "learn2perturb")]
    lines = [
        f"# {run}",
        "",
        f"{model.summary}, trained on {config.dataset} with {defense.name}: {defense.summary}"
        + (f" ({defense.paper}, {defense.year})." if defense.paper else "."),
        "",
        "```python",
        "import learn2perturb as l2p",
        "",
        f'model = l2p.load("{zoo.PREFIX}{run}")  # images in [0, 1] to logits; in eval mode, noise on',
        "```",
        "",
        f"{len(content):,} bytes, SHA-256 `{hashlib.sha256(content).hexdigest()}`.",
        "",
        "## Numbers",
        "",
        "Accuracy in %; brackets: 95 % intervals over images and draws; ±: over scoring draws that no attack has seen.",
        "",
        *_numbers(plan, state, run),
        "",
        "One training seed is one draw of the training. Accuracy under an attack is an upper bound of robustness.",
        "A row of `released` is scored as the authors' released code scores, to show what that is worth; it is no",
        "accuracy of this network in use. Random numbers differ between devices: on another one, expect the numbers",
        "again within the deviation over draws, not digit by digit.",
        "",
        "## Training",
        "",
        f"{len(read_metrics(state.run(run)))} epochs; {', '.join(where)}.",
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False).rstrip(),
        "```",
        "",
    ]
    return atomic_write(place / f"{run}.md", "\n".join(lines))


def _numbers(plan: Plan, state: State, run: str) -> list[str]:
    rows = []
    for cell in [None, *cells_of(plan, run)]:
        name = CLEAN if cell is None else cell.name
        how = "" if cell is None else f"`{command(plan, zoo.PREFIX + run, cell)}`"
        for noise in (True, False):
            row = row_of(plan, state, run, name, noise=noise)
            if row is not None:
                rows.append([name if noise else f"{name}, noise off", accuracy(row), str(row.n), str(row.draws), how])
    return table(["attack", "accuracy", "images", "draws", "computed anew by"], rows)
