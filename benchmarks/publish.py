"""Put a trained network into the package's zoo: weights, settings, records, and a card with every number they hold.

    python -m benchmarks.publish runs/mine mine-resnet20-cifar10
    python -m benchmarks.publish --table docs/zoo.md

The records are those of `learn2perturb evaluate` and `diagnose` in the run folder (more with --records). It refuses a
network that no attack and no diagnosis was run on. What names the run, or another folder beside it, then names the zoo.
--table writes the table of all networks anew into the page, between its two marks.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import lzma
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from learn2perturb import zoo
from learn2perturb.cli.subject import is_record
from learn2perturb.diagnosis import Diagnosis
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.errors import CheckpointError, ConfigError, Learn2PerturbError
from learn2perturb.evaluation import Evaluation, Row
from learn2perturb.evaluation.result import CLEAN
from learn2perturb.records import atomic_write, make_folder, to_json
from learn2perturb.registry import DEFENSES, MODELS
from learn2perturb.runs.checkpoint import read_model, sealed
from learn2perturb.runs.files import locate
from learn2perturb.runs.loading import load
from learn2perturb.terminal import markdown_row
from learn2perturb.training import read_metrics

# Where something lay on the machine that trained: no concern of a reader's.
_LOCAL = {"data_dir": None, "device": "auto"}
_PLACES = ("--out", "--data-dir")
_NOTES = (
    "One training seed is one draw of the training. Accuracy under an attack is an upper bound of robustness. A row of",
    "`released` is scored as the authors' released code scores, to show what that is worth; it is no accuracy of this",
    "network in use. Random numbers differ between devices: on another one, expect the numbers again within the",
    "deviation over draws, not digit by digit.",
)
# For words of four bytes, as float32 has them: 8 % smaller than by the usual settings, and 4 MB to read, not 64.
_WORDS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 4 << 20, "lc": 0, "lp": 2, "pb": 2}]
Record = Evaluation | Diagnosis


def main(words: list[str] | None = None) -> int:
    """Publish one network; 0 is success, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    parser.add_argument("name", nargs="?", help="in the zoo")
    parser.add_argument("--records", type=Path, nargs="*", default=(), help="further records, or folders of them")
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    parser.add_argument("--told", type=Path, nargs="*", default=(), help="evaluations that only the card shows")
    parser.add_argument(
        "--renamed", metavar="PLACE=WORD", action="append", default=[], help="in commands of the records"
    )
    parser.add_argument("--table", type=Path, help="page whose table is written anew")
    given = parser.parse_args(words)
    if (given.table is None) == (given.name is None):
        parser.error("give RUN and NAME, or --table PAGE")
    try:
        if given.table is not None:
            atomic_write(given.table, with_table(given.table.read_text(encoding="utf-8")))
            return 0
        renamed = dict(pair.split("=", 1) for pair in given.renamed)
        told = [Evaluation.load(path) for path in given.told]
        print(publish(given.run, given.name, given.records, given.zoo, renamed=renamed, told=told))
    except Learn2PerturbError as error:
        print(f"publish: error: {error}", file=sys.stderr)
        return 2
    return 0


def publish(
    run: Path,
    name: str,
    more: Sequence[Path] = (),
    into: Path = zoo.FOLDER,
    *,
    renamed: Mapping[str, str] | None = None,
    told: Sequence[Evaluation] = (),
) -> Path:
    """Write the folder of a network in the zoo; return it. In commands of its records places are ``renamed``.

    The numbers of ``told`` stand on the card, without their records.

    Raises:
        CheckpointError: it is not trained, has no attack or no diagnosis, or a record is of other weights.
        ConfigError: it is too large.
    """
    state, header = read_model(locate(run))
    header["config"] = settings = header["config"] | _LOCAL
    packed = lzma.compress(sealed(state, header), filters=_WORDS)
    records = _records(run, name, fingerprint_of_weights(load(run)), more, renamed)
    parts: dict[str, bytes | str] = {
        zoo.WEIGHTS: packed,
        "config.yaml": yaml.safe_dump(settings, sort_keys=False),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in read_metrics(run)),
        zoo.CARD: _card(run, name, packed, settings, list(records.values()), told),
    }
    parts |= {f"evaluation/{part}": to_json(record) for part, record in records.items()}
    contents = {part: text.encode() if isinstance(text, str) else text for part, text in parts.items()}
    if len(packed) > zoo.MOST_BYTES:
        raise ConfigError(f"{name} has {len(packed):,} bytes; the zoo takes at most {zoo.MOST_BYTES:,} of a network")
    for part, whole in contents.items():
        make_folder((into / name / part).parent)
        atomic_write(into / name / part, whole)
    return into / name


def _records(
    run: Path, name: str, weights: str, more: Sequence[Path] = (), renamed: Mapping[str, str] | None = None
) -> dict[str, Record]:
    """Return the records of a run by the names of their files, evaluations first, all said of the zoo."""
    folders = [run / "evaluation", *(path for path in more if path.is_dir())]
    files = [*(path for folder in folders for path in sorted(folder.glob("*.json"))), *(p for p in more if p.is_file())]
    found: dict[str, Record] = {}
    for kind, cls in (("evaluation", Evaluation), ("diagnosis", Diagnosis)):
        for path in files:
            if is_record(path, kind):
                record: Record = cls.load(path)
                if record.metadata.get("weights", weights) != weights:
                    raise CheckpointError(f"{path} is of other weights than {run}; leave it out, or run it again")
                if isinstance(record, Diagnosis) and not record.metadata.get("run"):
                    raise CheckpointError(f"{path} was made without a RUN; diagnose {run} itself")
                found[path.name] = dataclasses.replace(
                    record, metadata=_of_zoo(record.metadata, run, name, renamed or {})
                )
    evaluations = [record for record in found.values() if isinstance(record, Evaluation)]
    if not any(row.attack != CLEAN for record in evaluations for row in record.rows):
        raise CheckpointError(f"no attack was run on {run}; run: learn2perturb evaluate {run}")
    if len(evaluations) == len(found):
        raise CheckpointError(f"{run} has no diagnosis; run: learn2perturb diagnose {run}")
    return found


def _of_zoo(metadata: dict[str, Any], run: Path, name: str, renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata of a record with the run, and folders beside it, under their names in the zoo."""

    def said(word: str) -> str:
        for place, title in {**renamed, str(run): zoo.PREFIX + name, f"{run.parent}/": zoo.PREFIX}.items():
            word = word.replace(place, title)
        return word

    told = list(metadata.get("command", ()))
    for option in _PLACES:
        while option in told:
            del told[told.index(option) : told.index(option) + 2]
    command = [said(word) for word in told]
    return metadata | {"model": zoo.PREFIX + name} | ({"command": command} if command else {})


def _card(
    run: Path,
    name: str,
    packed: bytes,
    settings: dict[str, Any],
    records: Sequence[Record],
    told: Sequence[Evaluation],
) -> str:
    defense, model = DEFENSES.entry(settings["defense"]), MODELS.entry(settings["model"])
    where = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    machine = [where.get("gpu") or where["processor"], *(f"{key} {where[key]}" for key in ("torch", "learn2perturb"))]
    kept = yaml.safe_dump({key: value for key, value in settings.items() if key not in _LOCAL}, sort_keys=False)
    evaluations = [record for record in records if isinstance(record, Evaluation)]
    diagnoses = [record for record in records if isinstance(record, Diagnosis)]
    commands = [shlex.join(record.metadata["command"]) for record in records if record.metadata.get("command")]
    return "\n".join([
        f"# {name}", "",
        f"{model.summary}, trained on {settings['dataset']} with {defense.name}: {defense.summary}"
        + (f" ({defense.paper}, {defense.year})." if defense.paper else "."), "",
        "```python", "import learn2perturb as l2p", "",
        f'model = l2p.load("{zoo.PREFIX}{name}")  # images in [0, 1] to logits; in eval mode, noise on', "```", "",
        f"{len(packed):,} bytes, SHA-256 `{hashlib.sha256(packed).hexdigest()}`.", "",
        "## Numbers", "",
        "Accuracy in %; brackets: 95 % intervals over images and draws; ±: over scoring draws that no attack has seen.",
        "", *_numbers(evaluations, told), "",
        *_NOTES, "",
        "## Diagnosis", "", *(line for record in diagnoses for line in _diagnosis(record)),
        "## Its page, and all of it again", "", "```console",
        f"learn2perturb report {zoo.PREFIX}{name} --out page.html", *commands, "```", "",
        "## Training", "",
        f"{settings['epochs']} epochs; {', '.join(machine)}. `learn2perturb train --config` takes these settings:", "",
        "```yaml", kept.rstrip(), "```", "",
    ])  # fmt: skip


def _numbers(evaluations: Sequence[Evaluation], told: Sequence[Evaluation]) -> list[str]:
    """Return the rows, each attack once, that of the most images; those of records that stay behind are marked."""
    rows: dict[str, tuple[Row, str]] = {}
    for mark, records in (("", evaluations), (" *", told)):
        for row in (row for record in records for row in _of_its_own(record)):
            if row.label not in rows or rows[row.label][0].n < row.n:
                rows[row.label] = row, mark
    lines = [
        markdown_row([label + mark, _accuracy(row), str(row.n), str(row.draws)]) for label, (row, mark) in rows.items()
    ]
    after = ["", "\\* Its record is larger than a package should carry, and is not in it."] if told else []
    return [markdown_row(["attack", "accuracy", "images", "draws"]), "|" + "---|" * 4, *lines, *after]


def _of_its_own(record: Evaluation) -> list[Row]:
    """Return the rows of a record but for clean images scored as the released code scores: they have no other name."""
    released = any(row.attack == "released" for row in record.rows)
    return [row for row in record.rows if not (released and row.attack == CLEAN)]


def _accuracy(row: Row) -> str:
    spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
    return f"{100 * row.accuracy:.2f}{spread} [{100 * row.interval.low:.2f}, {100 * row.interval.high:.2f}]"


def _diagnosis(record: Diagnosis) -> list[str]:
    """Return verdict and checks; of each what was seen."""
    head = ["check", "verdict", "what was seen"]
    lines = [markdown_row([f"{check.number}. {check.name}", check.status, check.sentence]) for check in record.checks]
    said = f"{len(record.labels.unpack())} images. {record.summary.splitlines()[0]}"
    return [said, "", markdown_row(head), "|" + "---|" * len(head), *lines, ""]


# --- the table of all networks

_MARKS = ("<!-- table of the zoo -->", "<!-- end of the table -->")
# column -> kind of attack, and what its settings are at least
_COLUMNS: dict[str, tuple[str | None, dict[str, int]]] = {
    "clean": (None, {}), "FGSM": ("FGSM", {}), "PGD-20": ("PGD", {"steps": 20}),
    "PGD-20, averaged draws": ("PGD", {"steps": 20, "eot": 10}), "APGD, averaged draws": ("APGD", {"steps": 50}),
}  # fmt: skip


def with_table(page: str) -> str:
    """Return the page with the table of all networks of the zoo between its marks."""
    head, mark, rest = page.partition(_MARKS[0])
    _old, end, tail = rest.partition(_MARKS[1])
    if not mark or not end:
        raise ConfigError(f"the page has no place for the table; it goes between {_MARKS[0]} and {_MARKS[1]}")
    titles = ["network", *_COLUMNS, "diagnosis", "kB"]
    lines = [markdown_row(titles), "|" + "---|" * len(titles), *map(_line, zoo.names())]
    return "\n".join([head + mark, "", *lines, "", end + tail])


def _line(name: str) -> str:
    records = list(_records(zoo.folder(name), name, fingerprint_of_weights(load(zoo.PREFIX + name))).values())
    rows = [row for record in records if isinstance(record, Evaluation) for row in record.rows if row.noise]
    verdicts = [record.verdict for record in records if isinstance(record, Diagnosis)]
    size = sum(path.stat().st_size for path in zoo.folder(name).rglob("*") if path.is_file())
    numbers = [_number(rows, *wanted) for wanted in _COLUMNS.values()]
    return markdown_row([name, *numbers, ", ".join(verdicts), f"{size / 1000:.0f}"])


def _number(rows: Sequence[Row], kind: str | None, least: dict[str, int]) -> str:
    """Return the accuracy of the row of an attack: of all with at least these settings the one with the most images."""
    fitting = [row for row in rows if row.attack_type == kind and _reaches(row, least)]
    if not fitting and least.get("eot") and not any(row.stochastic for row in rows):
        return "as PGD-20"
    if not fitting:
        return ""
    row = max(fitting, key=lambda row: (row.n, row.parameters.get("eot", 1)))
    return f"{100 * row.accuracy:.1f} [{100 * row.interval.low:.1f}, {100 * row.interval.high:.1f}]"


def _reaches(row: Row, least: dict[str, int]) -> bool:
    one_draw = "eot" in least or row.parameters.get("eot", 1) == 1 or row.attack_type != "PGD"
    return one_draw and all(row.parameters.get(key, 1) >= value for key, value in least.items())


if __name__ == "__main__":
    sys.exit(main())
