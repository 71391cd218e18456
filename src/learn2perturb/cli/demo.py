"""``learn2perturb demo``: defenses on the digits, attacked, printed side by side; the usual three check themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from learn2perturb.cli import digits
from learn2perturb.cli.evaluate import summary
from learn2perturb.cli.options import add_json, print_json, print_table, typed, words
from learn2perturb.errors import ConfigError, Interrupted, MissingDependencyError, UnknownNameError
from learn2perturb.records import atomic_write, save
from learn2perturb.registry import DEFENSES
from learn2perturb.terminal import say

if TYPE_CHECKING:
    from learn2perturb.evaluation import Evaluation

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--defenses",
        default=",".join(USUAL),
        metavar="NAMES",
        help=f"comma-separated, or all (default {', '.join(USUAL)})",
    )
    parser.add_argument("--recipe", metavar="NAME", help="fast or common (default fast; common with --defenses all)")
    parser.add_argument(
        "--epochs", type=typed("int"), default=digits.EPOCHS, metavar="N", help=f"of training (default {digits.EPOCHS})"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the runs (default runs/demo, or runs/digits-common)")
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
    configs = {name: digits.config_of(name, recipe, arguments.epochs, arguments.seed) for name in names}
    out = Path(arguments.out or ("runs/demo" if recipe == "fast" else f"runs/digits-{recipe}"))
    out = _folder(out, fresh=arguments.fresh)
    results: dict[str, list[Evaluation]] = {}
    try:
        for name, config in configs.items():
            if not arguments.json:
                print(f"{name}: {config.epochs} epochs of training, then attacks", flush=True)
            results[name] = digits.run_one(config, out / name)
    except KeyboardInterrupt as stop:
        raise Interrupted.of(stop, f"what is trained is in {out}") from None
    record = digits.side_by_side(results, recipe, arguments.epochs, arguments.seed)
    save(out / "table.json", record)
    atomic_write(out / "table.md", record.markdown())
    page = _page(out, names)
    single = {name: evaluations[0] for name, evaluations in results.items()}
    # A check of the program on what is known to work, not of the defenses: those are reported as they are.
    checked = tuple(names) == USUAL and recipe == "fast"
    failures = check(single) if checked else []
    if arguments.json:
        print_json(
            {
                "folder": str(out),
                "eps": digits.EPS,
                "defenses": {
                    name: [row for one in evaluations for row in summary(one)] for name, evaluations in results.items()
                },
                "failures": failures,
                "page": None if page is None else str(page),
            }
        )
    else:
        print()
        print_table(*record.table(), title=record.title)
        print("\nWhat to look at:")
        for line in reading(single) if checked else comparison(single):
            print(f"- {line}")
        for failure in failures:
            print(f"NOT AS IT SHOULD BE: {failure}")
        print(f"\nruns and records: {out}")
        print("no page: its charts need learn2perturb[report]" if page is None else f"the same as a page: {page}")
    for failure in failures:
        say(f"learn2perturb: error: the demo failed its own check: {failure}; report it")
    return 1 if failures else 0


def _page(out: Path, names: Sequence[str]) -> Path | None:
    """Write a page of all runs; None where what draws its charts is not installed."""
    from learn2perturb.report.page import report

    try:
        return report(*(out / name for name in names), out=out / "page.html")
    except MissingDependencyError:
        return None


def _folder(out: Path, *, fresh: bool) -> Path:
    """Return where the demo goes: with ``fresh`` a folder that does not exist yet, so that nothing is lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    number, folder = 2, out
    while fresh and folder.exists():
        folder = out.with_name(f"{out.name}-{number}")
        number += 1
    return folder


def _worst(result: Evaluation, *, noise: bool = True) -> float:
    """Return the lowest accuracy under an attack."""
    return min(row.accuracy for row in result.rows if row.eps is not None and row.noise == noise)


def check(results: dict[str, Evaluation]) -> list[str]:
    """Return what is not as it should be: the undefended network falls, the defended ones stand."""
    failures = []
    pgd = results["none"].row(_pgd()).accuracy
    if pgd >= FALLEN:
        failures.append(f"the undefended network keeps {pgd:.1%} under PGD, it should fall below {FALLEN:.0%}")
    for name in USUAL[1:]:
        worst = _worst(results[name])
        if worst < pgd + MARGIN:
            failures.append(f"{name} keeps {worst:.1%} under attack, not well above the undefended {pgd:.1%}")
    return failures


def comparison(results: dict[str, Evaluation]) -> list[str]:
    """Return the defenses by what they keep of a single draw under their strongest attack, and which fall short."""
    worst = {name: _worst(result) for name, result in results.items()}
    order = sorted(worst, key=lambda name: -worst[name])
    lines = ["under the strongest of the attacks: " + ", ".join(f"{name} {worst[name]:.1%}" for name in order)]
    lines += [
        f"{name} falls short of any claim to robustness: {worst[name]:.1%}, where guessing gives about 10 %"
        for name in order
        if name != "none" and worst[name] < MARGIN
    ]
    for name, result in results.items():
        if any(row.attack == _eot() and row.stochastic for row in result.rows):
            gap = result.row(_pgd()).accuracy - result.row(_eot()).accuracy
            if gap > 0.02:
                lines.append(f"{name} loses another {gap:.1%} when the attack averages over {digits.EOT} draws")
    return [*lines, *_scope()]


def _pgd() -> str:
    return digits.attack_names()[2]


def _eot() -> str:
    return digits.attack_names()[3]


def _scope() -> Sequence[str]:
    return (
        f"scores of a noisy network are means over {digits.DRAWS} fresh draws, never those that the attack saw",
        "intervals are over the 500 images of one training; another --seed moves the numbers too",
    )


def reading(results: dict[str, Evaluation]) -> list[str]:
    """Return the few lines that say what the numbers mean; they follow the numbers."""
    pgd, eot = _pgd(), _eot()
    plain, trained, noisy = (results[name] for name in USUAL)
    single, averaged = noisy.row(pgd), noisy.row(eot)
    off = noisy.row(pgd, noise=False)
    gap = single.accuracy - averaged.accuracy
    spread = max(single.interval.high - single.interval.low, averaged.interval.high - averaged.interval.low) / 2
    if gap > spread:
        eot_line = "lower by more than the interval: part of what PGD saw was the noise of its own gradients"
    elif gap > 0:
        eot_line = "a little lower, within the interval: little of the robustness is noise in the gradients"
    else:
        eot_line = "not lower: the noise does not hide the gradient here"
    # Each is attacked with the gradients of what is scored: EOT where there is noise.
    difference = averaged.accuracy - off.accuracy
    if abs(difference) <= spread:
        off_line = "equal within the interval to EOT-PGD with noise: no sign that the draws themselves protect"
    elif difference > 0:
        off_line = "below EOT-PGD with noise: the draws themselves protect"
    else:
        off_line = "above EOT-PGD with noise: here the draws cost accuracy"
    return [
        f"without defense: {plain.row('clean').accuracy:.0%} of the digits, {plain.row(pgd).accuracy:.1%} under attack",
        f"adversarial training holds {trained.row(pgd).accuracy:.1%} under the same attack",
        f"EOT-PGD ({digits.EOT} draws a gradient): {averaged.accuracy:.1%} against {single.accuracy:.1%} for PGD, "
        + eot_line,
        f"Learn2Perturb with its noise switched off: {off.accuracy:.1%} under PGD, {off_line}",
        *_scope(),
    ]
