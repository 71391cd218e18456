"""``learn2perturb demo``: three defenses on the digits, attacked and printed side by side; it checks itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.cli.evaluate import summary
from learn2perturb.cli.options import add_json, print_json, print_table, typed
from learn2perturb.errors import ConfigError
from learn2perturb.training.config import TrainConfig

if TYPE_CHECKING:
    from learn2perturb.evaluation import Evaluation, Row

DESCRIPTION = (
    "Train a network without defense, with adversarial training and with Learn2Perturb on the embedded digits; attack\n"
    "all three at one size; print them side by side. Exits 1 unless the undefended falls and the defended stand."
)
EXAMPLE = "learn2perturb demo --out runs/demo"

DEFENSES = ("none", "pgd_at", "learn2perturb")
# Fixed before anything was trained for the table: the undefended network falls below 10 % under PGD-20.
EPS = 0.15
ATTACK_STEPS = 20
EOT = 10
DRAWS = 10
FALLEN = 0.10  # what the undefended network must not exceed under PGD
MARGIN = 0.20  # what a defended network must exceed that by
SETTINGS: dict[str, Any] = {
    "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "engine": "plain", "device": "cpu",
    "epochs": 20, "batch_size": 64, "eps": EPS, "attack_step_size": EPS / 4, "monitor": 0, "tensorboard": False,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the runs (default runs/demo)")
    parser.add_argument("--fresh", action="store_true", help="train anew, into a new folder")
    parser.add_argument("--seed", type=typed("int"), default=0, metavar="N", help="of training and attacks (default 0)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train what is not trained yet, evaluate, print, check."""
    configs = {name: TrainConfig(defense=name, seed=arguments.seed, **SETTINGS) for name in DEFENSES}
    out = _folder(Path(arguments.out), fresh=arguments.fresh)
    results = {}
    try:
        for name, config in configs.items():
            if not arguments.json:
                print(f"{name}: {config.epochs} epochs of training, then attacks", flush=True)
            results[name] = _one(config, out / name, arguments.seed)
    except KeyboardInterrupt:
        print(f"learn2perturb: stopped; what is trained is in {out}: type the command again to go on", file=sys.stderr)
        return 130
    failures = check(results)
    if arguments.json:
        print_json(
            {
                "folder": str(out),
                "eps": EPS,
                "defenses": {name: summary(result) for name, result in results.items()},
                "failures": failures,
            }
        )
    else:
        _show(results)
        for failure in failures:
            print(f"NOT AS IT SHOULD BE: {failure}")
        print(f"\nruns and records: {out}")
    for failure in failures:
        print(f"learn2perturb: error: the demo failed its own check: {failure}; report it", file=sys.stderr)
    return 1 if failures else 0


def _folder(out: Path, *, fresh: bool) -> Path:
    """Return where the demo goes: with ``fresh`` a folder that does not exist yet, so that nothing is lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    number, folder = 2, out
    while fresh and folder.exists():
        folder = out.with_name(f"{out.name}-{number}")
        number += 1
    return folder


def _one(config: TrainConfig, folder: Path, seed: int) -> Evaluation:
    from learn2perturb.attacks import FGSM, PGD
    from learn2perturb.data import load_data
    from learn2perturb.evaluation import evaluate
    from learn2perturb.noise import is_stochastic
    from learn2perturb.progress import Reporter
    from learn2perturb.training.loop import train

    model = train(config, out=folder).model
    step = 2.5 * EPS / ATTACK_STEPS
    # Without noise EOT averages equal gradients, so its row would be the one of PGD.
    attacks = {"FGSM": FGSM(EPS), f"PGD-{ATTACK_STEPS}": PGD(EPS, step, ATTACK_STEPS)}
    if is_stochastic(model):
        attacks[f"EOT-PGD-{ATTACK_STEPS}"] = PGD(EPS, step, ATTACK_STEPS, eot=EOT)
    with Reporter() as reporter:
        result = evaluate(
            model, load_data("digits", "test"), attacks, draws=DRAWS, seed=seed, batch_size=500, name=config.defense,
            progress=reporter,
        )  # fmt: skip
    result.save(folder / "evaluation" / "demo.json")
    return result


def _worst(result: Evaluation, *, noise: bool = True) -> float:
    """Return the lowest accuracy under an attack."""
    return min(row.accuracy for row in result.rows if row.eps is not None and row.noise == noise)


def check(results: dict[str, Evaluation]) -> list[str]:
    """Return what is not as it should be: the undefended network falls, the defended ones stand."""
    failures = []
    pgd = results["none"].row(f"PGD-{ATTACK_STEPS}").accuracy
    if pgd >= FALLEN:
        failures.append(f"the undefended network keeps {pgd:.1%} under PGD, it should fall below {FALLEN:.0%}")
    for name in DEFENSES[1:]:
        worst = _worst(results[name])
        if worst < pgd + MARGIN:
            failures.append(f"{name} keeps {worst:.1%} under attack, not well above the undefended {pgd:.1%}")
    return failures


def _cell(row: Row) -> str:
    return f"{row.accuracy:6.1%} [{100 * row.interval.low:.1f}, {100 * row.interval.high:.1f}]"


def _show(results: dict[str, Evaluation]) -> None:
    head = ("defense", "clean", "FGSM", f"PGD-{ATTACK_STEPS}", f"EOT-PGD-{ATTACK_STEPS}")
    rows = []
    for name, result in results.items():
        for noise in (True, False):
            found = {row.attack: _cell(row) for row in result.rows if row.noise == noise}
            if found:
                cells = [found.get("clean" if column == "clean" else column, "as PGD") for column in head[1:]]
                if not noise:  # EOT without noise is PGD; the evaluation ran it as such
                    cells[-1] = "as PGD"
                rows.append((name + ("" if noise else ", noise off"), *cells))
    images = next(iter(results.values())).rows[0].n
    print()
    print_table(
        head,
        rows,
        title=f"Accuracy on {images} digits and its 95 % interval; l_inf attacks of eps {EPS}, pixels in [0, 1]",
    )
    print("\nWhat to look at:")
    for line in _reading(results):
        print(f"- {line}")


def _reading(results: dict[str, Evaluation]) -> list[str]:
    """Return the few lines that say what the numbers mean; they follow the numbers."""
    pgd, eot = f"PGD-{ATTACK_STEPS}", f"EOT-PGD-{ATTACK_STEPS}"
    plain, trained, noisy = (results[name] for name in DEFENSES)
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
        f"EOT-PGD ({EOT} draws a gradient): {averaged.accuracy:.1%} against {single.accuracy:.1%} for PGD, {eot_line}",
        f"Learn2Perturb with its noise switched off: {off.accuracy:.1%} under PGD, {off_line}",
        f"scores of a noisy network are means over {DRAWS} fresh draws, never those that the attack saw",
        "intervals are over the 500 images of one training; another --seed moves the numbers too",
    ]
