"""``learn2perturb compare``: two evaluations of the same images row by row, or two diagnoses check by check."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from learn2perturb import zoo
from learn2perturb.cli.options import add_json, print_json
from learn2perturb.cli.subject import is_record, records_of
from learn2perturb.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from learn2perturb.evaluation import Evaluation
    from learn2perturb.records import Saved

DESCRIPTION = (
    "Compare two records of `evaluate` on the same images: difference of accuracy, its interval,\n"
    "a test. Two records of `diagnose` in the same ball: verdicts, checks and lowest accuracies side by\n"
    "side. Records of different images are refused."
)
EXAMPLE = "learn2perturb compare runs/a/evaluation/test-seed0.json runs/b/evaluation/test-seed0.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add(
        "first",
        metavar="RECORD",
        help="a record of evaluate or diagnose; a run folder or zoo:NAME that holds one of evaluate",
    )
    add("second", metavar="RECORD", help="another, of the same images")
    add(
        "--pair", action="append", default=[], metavar="FIRST=SECOND",
        help="compare these rows, by attack, such as eot-pgd20=pgd20; may be repeated (default: equal settings)",
    )  # fmt: skip
    add("--out", metavar="FILE", help="write the comparison there, as JSON")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare; print what may be said."""
    pairs = [_pair(text) for text in arguments.pair]
    arguments.first, arguments.second = map(zoo.path_of, (arguments.first, arguments.second))
    kinds = [_is_diagnosis(path) for path in (arguments.first, arguments.second)]
    if any(kinds):
        return _diagnoses(arguments, kinds)

    from learn2perturb.evaluation import compare

    found = compare(_evaluation(arguments.first), _evaluation(arguments.second), pairs=pairs)
    _keep(found, arguments.out)
    if arguments.json:
        print_json(
            {
                "first": found.first,
                "second": found.second,
                "steps": found.metadata["steps"],
                "differences": [asdict(one) | {"sentence": one.sentence} for one in found.differences],
                "left_out": list(found.left_out),
                "notes": list(found.notes),
            }
        )
    else:
        print(found)
    return 0


def _diagnoses(arguments: argparse.Namespace, kinds: list[bool]) -> int:
    """Compare two diagnoses; print what may be said."""
    if not all(kinds):
        other = (arguments.first, arguments.second)[kinds.index(False)]
        raise ConfigError(f"one record is a diagnosis and {other} is none; give two of diagnose or two of evaluate")
    if arguments.pair:
        raise ConfigError("--pair names rows of evaluations, and these are diagnoses; leave it out")

    from learn2perturb.diagnosis import Diagnosis, compare_diagnoses

    found = compare_diagnoses(Diagnosis.load(arguments.first), Diagnosis.load(arguments.second))
    _keep(found, arguments.out)
    if arguments.json:
        rows = [asdict(one) | {"sentence": one.sentence} for one in found.accuracies]
        print_json(asdict(found) | {"accuracies": rows})
    else:
        print(found)
    return 0


def _is_diagnosis(path: str) -> bool:
    return Path(path).is_file() and is_record(Path(path), "diagnosis")


def _keep(found: Saved, out: str | None) -> None:
    """Save a comparison where the user wants it."""
    if out is None:
        return
    if Path(out).exists():
        raise ConfigError(f"--out {out} exists; give another name so that nothing is lost")
    found.save(out)


def _evaluation(path: str) -> Evaluation:
    """Read a record, or the only evaluation of the weights of a run folder."""
    from learn2perturb.evaluation import Evaluation
    from learn2perturb.runs.files import Weights

    if not Path(path).is_dir():
        return Evaluation.load(path)
    found: dict[Path, Evaluation] = {}
    left_out = []
    weights = Weights(path)
    for file in sorted(records_of(path).glob("*.json")):
        with contextlib.suppress(CheckpointError):  # other records lie there, too
            record = Evaluation.load(file)
            reason = weights.misfit(record.metadata)
            if reason is None:
                found[file] = record
            else:
                left_out.append(f"{file} is left out: {reason}")
    if not found:
        of = " of its weights" if left_out else ""
        raise ConfigError(
            "; ".join([f"{path} holds no evaluation{of}", *left_out, f"run: learn2perturb evaluate {path}"])
        )
    if weights.fault is not None:
        warnings.warn(f"nobody can tell whether records in {path} are of its weights: {weights.fault}", stacklevel=2)
    if len(found) > 1:
        raise ConfigError(f"{path} holds {len(found)} evaluations; give one: {', '.join(map(str, found))}")
    return next(iter(found.values()))


def _pair(text: str) -> tuple[str, str]:
    first, equals, second = text.partition("=")
    if not equals or not first or not second:
        raise ConfigError(f"--pair {text!r} is no FIRST=SECOND; write --pair eot-pgd20=pgd20")
    return first, second
