"""``learn2perturb list``: what can be named, with its options."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import inspect
from typing import TYPE_CHECKING, Any

from learn2perturb import zoo
from learn2perturb.cli.options import add_json, field_help, print_json
from learn2perturb.cli.subject import is_record
from learn2perturb.errors import UnknownNameError
from learn2perturb.plugins import told
from learn2perturb.registry import ATTACKS, DATASETS, DEFENSES, MODELS, NOISES, Entry, Registry

if TYPE_CHECKING:
    from learn2perturb.diagnosis.checks import CheckSpec

DESCRIPTION = (
    "Show what can be named: networks, attacks, defenses, noise laws, data sets, recipes, checks of a diagnosis, with\n"
    "paper, year, options; and the trained networks that come with the package (zoo), with their numbers."
)
EXAMPLE = "learn2perturb list defenses 'learn2perturb*'"

KINDS: dict[str, Registry] = {
    "models": MODELS, "attacks": ATTACKS, "defenses": DEFENSES, "noises": NOISES, "datasets": DATASETS,
}  # fmt: skip
_OTHERS = ("recipes", "checks", "zoo")
# Arguments of builders and loaders that the package gives itself.
_GIVEN = ("num_classes", "input_shape", "split", "root", "download", "shape", "place", "others")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("kind", metavar="KIND", help=f"{', '.join((*KINDS, *_OTHERS[:-1]))} or {_OTHERS[-1]}")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="a name or glob, such as 'resnet*'")
    add_json(parser)


def options_of(entry: Entry) -> dict[str, Any]:
    """Return the options of a registered thing and their defaults."""
    target = entry.load()
    if dataclasses.is_dataclass(target):
        found = {
            item.name: item.default if item.default is not dataclasses.MISSING else None
            for item in dataclasses.fields(target)
            if item.init
        }
    else:
        found = {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in inspect.signature(target).parameters.items()
            if name not in _GIVEN
        }
    return {**found, **entry.arguments}


def _rows(kind: str, pattern: str) -> list[dict[str, Any]]:
    if kind == "recipes":
        from learn2perturb.training.config import RECIPES, load_recipe

        return [
            {"name": name, "summary": RECIPE_SUMMARIES.get(name, ""), "options": load_recipe(name)["settings"]}
            for name in RECIPES
            if fnmatch.fnmatch(name, pattern)
        ]
    if kind == "checks":
        from learn2perturb.diagnosis.checks import CHECKS

        return [_check_row(check) for check in CHECKS.values() if fnmatch.fnmatch(check.name, pattern)]
    if kind == "zoo":
        return [_zoo_row(name) for name in zoo.names() if fnmatch.fnmatch(name, pattern)]
    rows = []
    for name in KINDS[kind].names(pattern):
        entry = KINDS[kind].entry(name)
        target = entry.load()
        rows.append(
            {
                "name": name,
                "summary": entry.about,
                "paper": entry.paper,
                "year": entry.year,
                "options": options_of(entry),
                "help": field_help(target) if inspect.isclass(target) else {},
                **({"source": entry.source()} if entry.own else {}),
            }
        )
    return rows


def _zoo_row(name: str) -> dict[str, Any]:
    """Return what a trained network is, and how much each attack and the diagnosis left of it."""
    from learn2perturb.diagnosis import Diagnosis
    from learn2perturb.evaluation import Evaluation, Row

    rows: dict[str, Row] = {}
    verdicts: dict[str, str] = {}
    for path in sorted(zoo.folder(name).glob("evaluation/*.json")):
        if is_record(path, "evaluation"):
            for row in Evaluation.load(path).rows:  # of an attack in several records the one of the most images
                if row.label not in rows or rows[row.label].n < row.n:
                    rows[row.label] = row
        elif is_record(path, "diagnosis"):
            verdicts["diagnosis"] = Diagnosis.load(path).verdict
    numbers = {label: f"{100 * row.accuracy:.1f} % of {row.n}" for label, row in rows.items()}
    return {"name": zoo.PREFIX + name, "summary": zoo.summary(name), "options": {**verdicts, **numbers}}


def _check_row(check: CheckSpec) -> dict[str, Any]:
    options = {"number": check.number, "needs": ", ".join(check.needs), "threshold": check.allowed}
    return {"name": check.name, "summary": check.question, "options": options}


RECIPE_SUMMARIES = {
    "paper": "as the Learn2Perturb paper, sections 4 and A.4",
    "released": "what the released Learn2Perturb code does, less what makes it stop",
    "common": "one protocol for all defenses: equal epochs, schedule, adversary",
    "fast": "few epochs: one learning-rate cycle, noise and adversary on from the start",
    "laptop": "an evening on two cores: the fast one in 10 epochs, against three larger steps",
}


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    kind = arguments.kind if arguments.kind in (*KINDS, *_OTHERS) else arguments.kind + "s"
    if kind not in (*KINDS, *_OTHERS):
        raise UnknownNameError.of("kind", arguments.kind, (*KINDS, *_OTHERS))
    rows = _rows(kind, arguments.pattern)
    if not rows:
        known = [row["name"] for row in _rows(kind, "*")]
        raise UnknownNameError.of(f"name among {kind}:", arguments.pattern, known)
    if arguments.json:
        from learn2perturb.records import plain

        print_json(plain(rows))
        return 0
    for row in rows:
        own = row.get("source")
        place = [f"from {told(own)}"] if own else [row.get("paper"), row.get("year")]
        source = ", ".join(str(part) for part in place if part)
        print(f"{row['name']}: {row['summary']}" + (f"  [{source}]" if source else ""))
        for name, value in row["options"].items():
            note = row.get("help", {}).get(name, "").replace("%%", "%")
            print(f"    {name} = {_shown(value)}" + (f"    {note.rstrip('.')}" if note and len(rows) == 1 else ""))
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, float):
        steps = value * 255
        return f"{round(steps)}/255" if 1 <= steps < 255 and abs(steps - round(steps)) < 1e-6 else f"{value:g}"
    return str(value)
