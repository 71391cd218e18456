"""``learn2perturb demo``: defenses on the digits, attacked, printed side by side; the usual three check themselves.

It is the study ``demo`` of the package, of the defenses that are asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from learn2perturb.cli.evaluate import summary
from learn2perturb.cli.options import add_json, print_json, print_table, typed, words
from learn2perturb.cli.report import page_beside
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.experiments.study_file import build_study, merged, read_source
from learn2perturb.registry import DEFENSES
from learn2perturb.terminal import say
from learn2perturb.training.config import TrainConfig

if TYPE_CHECKING:
    from learn2perturb.experiments.results import Results
    from learn2perturb.experiments.spec import Study
    from learn2perturb.experiments.view import View, ViewCell

DESCRIPTION = (
    "Train a network without defense, with adversarial training and with Learn2Perturb on the embedded digits; attack\n"
    "all three at one size; print them side by side. Exits 1 unless the undefended falls and the defended stand.\n"
    "With --defenses all: every registered defense, under the recipe that is common to all."
)
EXAMPLE = "learn2perturb demo --defenses all"

USUAL = ("none", "pgd_at", "learn2perturb")
RECIPES = ("fast", "common")  # those of the papers have delays that are longer than this training
FALLEN = 0.10  # what the undefended network must not exceed under PGD
MARGIN = 0.20  # what a defended network must exceed that by
CLEAN, FGSM, PGD, EOT_PGD = "clean", "FGSM", "PGD-20", "EOT-PGD-20"  # cells of the study
ATTACKS = (FGSM, PGD, EOT_PGD)
OWN = ", own predictor"  # ends the name of a cell that is scored as the defense's paper predicts
TABLE, NOISE_OFF, PREDICTOR = "table", "noise-off", "predictor"  # views of the study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--defenses",
        default=",".join(USUAL),
        metavar="NAMES",
        help=f"comma-separated, or all (default {', '.join(USUAL)})",
    )
    parser.add_argument("--recipe", metavar="NAME", help="fast or common (default fast; common with --defenses all)")
    parser.add_argument("--epochs", type=typed("int"), default=20, metavar="N", help="of training (default 20)")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of tables, networks and records (default runs/demo, or runs/digits-common)"
    )
    parser.add_argument("--fresh", action="store_true", help="train anew, into a new folder")
    parser.add_argument("--seed", type=typed("int"), default=0, metavar="N", help="of training and attacks (default 0)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and attack what is not done yet, print the table; check it, or read it."""
    every = arguments.defenses.strip() == "all"
    names = (
        DEFENSES.names() if every else [DEFENSES.entry(name).name for name in words(arguments.defenses, "--defenses")]
    )
    recipe = arguments.recipe or ("common" if every else "fast")
    if recipe not in RECIPES:
        raise UnknownNameError.of("recipe of the demo", recipe, RECIPES)
    asked = study_of(names, recipe, arguments.epochs, arguments.seed)
    out = Path(arguments.out or ("runs/demo" if recipe == "fast" else f"runs/digits-{recipe}"))
    out = _folder(out, fresh=arguments.fresh)
    for line in _earlier(out):
        say(line)
    from learn2perturb.experiments.studying import Placing
    from learn2perturb.experiments.studying import study as run_study
    from learn2perturb.experiments.views import build_views
    from learn2perturb.experiments.writing import write

    store = out / "store"
    found = run_study(asked, store=store, placing=Placing(device="cpu"), progress=not arguments.json)
    views = build_views(found.results)
    write(found.results, views, out)
    page, told = page_beside(out)
    lines = table_lines(asked, views)
    # A check of the program on what is known to work, not of the defenses: those are reported as they are.
    checked = tuple(names) == USUAL and recipe == "fast" and not found.failures
    failures = check(lines) if checked else [f"{title}: {why}" for title, why in found.failures.items()]
    if arguments.json:
        print_json(
            {
                "folder": str(out), "eps": _eps(asked), "failures": failures,
                "defenses": {name: _rows(found.results, name) for name in names},
                "page": None if page is None else str(page),
            }
        )  # fmt: skip
    else:
        print()
        print_table(*texts(lines), title=_title(asked, lines))
        print("\nWhat to look at:")
        for line in reading(asked, lines) if checked else comparison(asked, lines):
            print(f"- {line}")
        for failure in failures:
            print(f"NOT AS IT SHOULD BE: {failure}" if checked else f"failed: {failure}")
        print(f"\ntables: {out / 'README.md'}, networks and records: {store}")
        print(told)
    for failure in failures:
        say(f"learn2perturb: error: {f'the demo failed its own check: {failure}; report it' if checked else failure}")
    return 1 if failures else 0


# --- the study


def study_of(names: Sequence[str], recipe: str, epochs: int, seed: int) -> Study:
    """Return the study ``demo`` of these defenses: ``recipe`` in so few epochs, its milestones moved accordingly."""
    name, source = read_source("demo")
    runs = {one: {"defense": one, "milestones": _milestones(one, recipe, epochs)} for one in names}
    whole = {
        **source, "runs": runs, "seeds": [seed], "levels": {},
        "train": {**source["train"], "recipe": recipe, "epochs": epochs},
        "evaluate": {**source["evaluate"], "seed": seed},
    }  # fmt: skip
    if not any(DEFENSES.entry(one).fact("stochastic") for one in names):
        whole = merged(whole, {"views": {NOISE_OFF: None}})
    if "pgd_at" not in names:
        whole = merged(whole, {"views": {TABLE: {"baseline": None}}})
    of_several = [one for one in names if _predictor(one) != "single"]
    return build_study(name, merged(whole, _own(whole, of_several)) if of_several else whole)


def _milestones(defense: str, recipe: str, epochs: int) -> list[int]:
    whole = TrainConfig(defense=defense, recipe=recipe).resolve()
    return [round(milestone * epochs / (whole.epochs or 1)) for milestone in whole.milestones or ()]


def _predictor(defense: str) -> str:
    predictor: str = DEFENSES.entry(defense).load().predictor
    return predictor


def _own(source: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return cells and a view of the defenses whose paper predicts by more than one draw, scored so, too."""
    # Against a mean over draws every attack averages over as many, so PGD is EOT-PGD.
    own = {"predictor": "own", "draws": 1, "noise_off": False, "only": {"defense": list(names)}}
    cells = {name + OWN: {**source["cells"][name], **own} for name in (CLEAN, FGSM, EOT_PGD)}
    view = {
        "title": f"{source['title']}, each predicting as in its paper", "rows": ["defense"], "columns": ["cell"],
        "where": {"predictor": "own"},
    }  # fmt: skip
    return {"cells": cells, "views": {PREDICTOR: view}}


def _folder(out: Path, *, fresh: bool) -> Path:
    """Return where the demo goes: with ``fresh`` a folder that does not exist yet, so that nothing is lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    number, folder = 2, out
    while fresh and folder.exists():
        folder = out.with_name(f"{out.name}-{number}")
        number += 1
    return folder


def _earlier(out: Path) -> Iterator[str]:
    """Say that run folders of an earlier version, which had one a defense beside the tables, are left alone."""
    names = sorted(path.parent.name for path in out.glob("*/config.yaml"))
    if names:
        yield f"note: {', '.join(names)} in {out} are runs of an earlier demo, left as they are; new ones are in store"


def _rows(results: Results, defense: str) -> list[dict[str, Any]]:
    """Return the rows of all records of a defense."""
    from learn2perturb.evaluation import Evaluation

    return [
        {**row, "attack": answer.pair.cell.name.removesuffix(OWN)}
        for answer in results.where({"defense": defense})
        if isinstance(answer.record, Evaluation) and (answer.pair.cell.name != EOT_PGD or answer.pair.run.stochastic)
        for row in summary(answer.record)
    ]


# --- the table that is printed


@final
@dataclass(frozen=True)
class Line:
    """A line of the table: a defense, how it is scored (empty: single draws), and its numbers by attack."""

    defense: str
    scored: str
    cells: Mapping[str, ViewCell]

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.defense}, {self.scored}" if self.scored else self.defense

    def accuracy(self, attack: str) -> float:
        """Return the accuracy under an attack."""
        value = self.cells[attack].value
        assert value is not None
        return value

    @property
    def worst(self) -> float:
        """The lowest accuracy under an attack."""
        return min(self.accuracy(attack) for attack in ATTACKS if attack in self.cells)

    def width(self, attack: str) -> float:
        """Return the width of an interval."""
        interval = self.cells[attack].interval
        assert interval is not None
        return interval.high - interval.low


def table_lines(study: Study, views: Sequence[View]) -> list[Line]:
    """Return the lines, defense by defense: single draws, with the noise off, as the defense's paper predicts."""
    lines = []
    for run in study.runs:
        name = str(run.label("defense"))
        for view in views:
            cells = {cell.column[0].removesuffix(OWN): cell for cell in view.cells if cell.row == (name,)}
            if not run.stochastic:
                cells.pop(EOT_PGD, None)
            found = {attack: cell for attack, cell in cells.items() if cell.value is not None}
            if found:
                lines.append(Line(name, _scored(study, view.name, name), found))
    return lines


def _scored(study: Study, view: str, defense: str) -> str:
    if view == PREDICTOR:
        return f"{_predictor(defense).replace('_', ' ')} of {study.cells[0].scoring.members}"
    return "noise off" if view == NOISE_OFF else ""


def texts(lines: Sequence[Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return head and rows as text. Without noise EOT averages equal gradients, and for a mean PGD is EOT."""
    rows = []
    for line in lines:
        shown = [_cell(line.cells[name]) if name in line.cells else "" for name in (CLEAN, *ATTACKS)]
        rows.append((line.name, *(text or ("as EOT-PGD" if shown[-1] else "as PGD") for text in shown)))
    return ("defense", CLEAN, *ATTACKS), rows


def _cell(cell: ViewCell) -> str:
    bounds = "" if cell.interval is None else f" [{100 * cell.interval.low:.1f}, {100 * cell.interval.high:.1f}]"
    return f"{cell.value:6.1%}{bounds}"


def _eps(study: Study) -> float:
    config = study.runs[0].config
    assert config is not None and isinstance(config.eps, float)
    return config.eps


def _title(study: Study, lines: Sequence[Line]) -> str:
    """Say what the numbers are, in a line."""
    config = study.runs[0].config
    assert config is not None
    images = next((cell.n for line in lines for cell in line.cells.values()), 0)
    return (
        f"Accuracy on {images} digits and its 95 % interval; l_inf attacks of eps {config.eps}, "
        f"pixels in [0, 1]; recipe {config.recipe}, {config.epochs} epochs"
    )


# --- what it says


def _single(lines: Sequence[Line]) -> dict[str, Line]:
    return {line.defense: line for line in lines if not line.scored}


def check(lines: Sequence[Line]) -> list[str]:
    """Return what is not as it should be: the undefended network falls, the defended ones stand."""
    results = _single(lines)
    failures = []
    pgd = results["none"].accuracy(PGD)
    if pgd >= FALLEN:
        failures.append(f"the undefended network keeps {pgd:.1%} under PGD, it should fall below {FALLEN:.0%}")
    for name in USUAL[1:]:
        worst = results[name].worst
        if worst < pgd + MARGIN:
            failures.append(f"{name} keeps {worst:.1%} under attack, not well above the undefended {pgd:.1%}")
    return failures


def comparison(study: Study, lines: Sequence[Line]) -> list[str]:
    """Return the defenses by what they keep of a single draw under their strongest attack, and which fall short."""
    results = {name: line for name, line in _single(lines).items() if set(ATTACKS) & set(line.cells)}
    worst = {name: line.worst for name, line in results.items()}
    order = sorted(worst, key=lambda name: -worst[name])
    said = ["under the strongest of the attacks: " + ", ".join(f"{name} {worst[name]:.1%}" for name in order)]
    said += [
        f"{name} falls short of any claim to robustness: {worst[name]:.1%}, where guessing gives about 10 %"
        for name in order
        if name != "none" and worst[name] < MARGIN
    ]
    for name, line in results.items():
        if PGD in line.cells and EOT_PGD in line.cells:
            gap = line.accuracy(PGD) - line.accuracy(EOT_PGD)
            if gap > 0.02:
                said.append(f"{name} loses another {gap:.1%} when the attack averages over {_eot(study)} draws")
    return [*said, *_scope(study, lines)]


def _eot(study: Study) -> int:
    return next(int(cell.label("eot")) for cell in study.cells if cell.name == EOT_PGD)


def _scope(study: Study, lines: Sequence[Line]) -> Sequence[str]:
    images = next((cell.n for line in lines for cell in line.cells.values()), 0)
    draws = study.cells[0].scoring.draws
    return (
        f"scores of a noisy network are means over {draws} fresh draws, never those that the attack saw",
        f"intervals are over the {images} images of one training; another --seed moves the numbers too",
    )


def reading(study: Study, lines: Sequence[Line]) -> list[str]:
    """Return the few lines that say what the numbers mean; they follow the numbers."""
    plain, trained, noisy = (_single(lines)[name] for name in USUAL)
    single, averaged = noisy.accuracy(PGD), noisy.accuracy(EOT_PGD)
    off = next(line for line in lines if line.scored == "noise off").accuracy(PGD)
    spread = max(noisy.width(PGD), noisy.width(EOT_PGD)) / 2
    gap = single - averaged
    if gap > spread:
        eot_line = "lower by more than the interval: part of what PGD saw was the noise of its own gradients"
    elif gap > 0:
        eot_line = "a little lower, within the interval: little of the robustness is noise in the gradients"
    else:
        eot_line = "not lower: the noise does not hide the gradient here"
    # Each is attacked with the gradients of what is scored: EOT where there is noise.
    difference = averaged - off
    if abs(difference) <= spread:
        off_line = "equal within the interval to EOT-PGD with noise: no sign that the draws themselves protect"
    elif difference > 0:
        off_line = "below EOT-PGD with noise: the draws themselves protect"
    else:
        off_line = "above EOT-PGD with noise: here the draws cost accuracy"
    return [
        f"without defense: {plain.accuracy(CLEAN):.0%} of the digits, {plain.accuracy(PGD):.1%} under attack",
        f"adversarial training holds {trained.accuracy(PGD):.1%} under the same attack",
        f"EOT-PGD ({_eot(study)} draws a gradient): {averaged:.1%} against {single:.1%} for PGD, {eot_line}",
        f"Learn2Perturb with its noise switched off: {off:.1%} under PGD, {off_line}",
        *_scope(study, lines),
    ]
