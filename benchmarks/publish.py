"""Put a network of a study into the package's zoo: its weights, and a card with every number that the study has of it.

    python -m benchmarks.publish "learn2perturb, seed 1" learn2perturb-resnet20-cifar10 --level forty

It refuses a network that lacks a record: a card carries every number.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from pathlib import Path

import yaml

from learn2perturb import zoo
from learn2perturb.errors import CheckpointError, ConfigError, Learn2PerturbError, UnknownNameError
from learn2perturb.evaluation import Evaluation, Row
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.spec import RunPlan
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import read_study
from learn2perturb.records import atomic_write
from learn2perturb.registry import DEFENSES, MODELS
from learn2perturb.runs.checkpoint import read_model, sealed
from learn2perturb.terminal import markdown_row

# Where something lay on the machine that trained: no concern of a reader's.
_LOCAL = {"data_dir": None, "device": "auto"}


def main(words: list[str] | None = None) -> int:
    """Publish one network; 0 is success, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="title of the run in its study, as `study --plan` prints it")
    parser.add_argument("name", help="in the zoo")
    parser.add_argument("--study", default="paper-scale")
    parser.add_argument("--level")
    parser.add_argument("--store", default="runs/store")
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    given = parser.parse_args(words)
    try:
        ledger = Ledger(read_study(given.study, given.level), Store(given.store))
        print(publish(ledger, given.run, given.name, given.zoo))
    except Learn2PerturbError as error:
        print(f"publish: error: {error}", file=sys.stderr)
        return 2
    return 0


def publish(ledger: Ledger, title: str, name: str, folder: Path) -> Path:
    """Write weights and card; return the card.

    Raises:
        UnknownNameError: no such run.
        CheckpointError: it is not trained, or lacks a record.
        ConfigError: it is too large.
    """
    runs = {run.title: run for run in ledger.study.runs}
    if title not in runs:
        raise UnknownNameError.of(f"run of study {ledger.study.name}", title, runs)
    run = runs[title]
    network = ledger.network(run)
    if network is None or run.config is None:
        raise CheckpointError(f"{title} is not trained by this study; run it first")
    lacking = [pair.cell.title for pair in ledger.study.pairs(run) if not ledger.is_there(pair)]
    if lacking:
        raise CheckpointError(
            f"{title} lacks {', '.join(lacking)}; a card carries every number, so run the study first"
        )
    state, header = read_model(Path(network.place))
    header["config"] |= _LOCAL
    content = sealed(state, header)
    if len(content) > zoo.MOST_BYTES:
        raise ConfigError(f"{title} has {len(content)} bytes; the zoo takes networks of at most {zoo.MOST_BYTES}")
    atomic_write(folder / f"{name}.safetensors", content)
    return atomic_write(folder / f"{name}.md", _card(ledger, run, name, content, header["config"]))


def _card(ledger: Ledger, run: RunPlan, name: str, content: bytes, settings: dict[str, object]) -> str:
    config = run.config
    assert config is not None
    defense, model = DEFENSES.entry(config.defense), MODELS.entry(config.model)
    facts = ledger.store.finished(ledger.folder(run))
    assert facts is not None
    where = [facts.where.get("gpu") or facts.where["processor"]]
    where += [f"{key} {facts.where[key]}" for key in ("torch", "learn2perturb")]
    level = "" if ledger.study.level is None else f" --level {ledger.study.level}"
    again = f"learn2perturb study {ledger.study.name}{level}"
    asked = shlex.join(["learn2perturb", "reproduce", ledger.study.name, zoo.PREFIX + name])
    kept = yaml.safe_dump({key: value for key, value in settings.items() if key not in _LOCAL}, sort_keys=False)
    return "\n".join([
        f"# {name}", "",
        f"{model.summary}, trained on {config.dataset} with {defense.name}: {defense.summary}"
        + (f" ({defense.paper}, {defense.year})." if defense.paper else "."), "",
        "```python", "import learn2perturb as l2p", "",
        f'model = l2p.load("{zoo.PREFIX}{name}")  # images in [0, 1] to logits; in eval mode, noise on', "```", "",
        f"{len(content):,} bytes, SHA-256 `{hashlib.sha256(content).hexdigest()}`.", "",
        "## Numbers", "",
        "Accuracy in %; brackets: 95 % intervals over images and draws; ±: over scoring draws that no attack has seen.",
        "", *_numbers(ledger, run), "",
        f"Trained and asked by `{again}`; the same is asked of these weights by `{asked}`.",
        "One training seed is one draw of the training. Accuracy under an attack is an upper bound of robustness.",
        "A row of `released` is scored as the authors' released code scores, to show what that is worth; it is no",
        "accuracy of this network in use. Random numbers differ between devices: on another one, expect the numbers",
        "again within the deviation over draws, not digit by digit.", "",
        "## Training", "", f"{config.epochs} epochs; {', '.join(where)}.", "", "```yaml", kept.rstrip(), "```", "",
    ])  # fmt: skip


def _numbers(ledger: Ledger, run: RunPlan) -> list[str]:
    head = ["asked", "attack", "accuracy", "images", "draws"]
    lines = [markdown_row(head), "|" + "---|" * len(head)]
    for pair in ledger.study.pairs(run):
        found = ledger.place(pair)
        record = None if found is None else ledger.store.record(found[1], pair.cell.kind)
        if isinstance(record, Evaluation):
            for row in record.rows:
                words = [pair.cell.title, row.label, _accuracy(row), str(row.n), str(row.draws)]
                lines.append(markdown_row(words))
    return lines


def _accuracy(row: Row) -> str:
    spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
    return f"{100 * row.accuracy:.2f}{spread} [{100 * row.interval.low:.2f}, {100 * row.interval.high:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
