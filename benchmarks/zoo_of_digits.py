"""Train a small network of the digits with every defense, attack and diagnose it, and put it into the zoo.

    python -m benchmarks.zoo_of_digits
    python -m benchmarks.zoo_of_digits pni rse --out runs/zoo

What is there is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.publish import publish
from learn2perturb import zoo
from learn2perturb.cli.main import main as learn2perturb
from learn2perturb.registry import DEFENSES

# As `learn2perturb demo --defenses all`: recipe common in 20 epochs, against l_inf 0.15.
TRAINING = [
    "--model=digits_cnn", "--dataset=digits", "--recipe=common", "--epochs=20", "--milestones=15,18", "--batch-size=64",
    "--eps=0.15", "--attack-step-size=0.0375", "--engine=plain", "--monitor=0", "--tensorboard=false", "--seed=1",
]  # fmt: skip
ATTACKS = [
    "fgsm", "pgd20=pgd:steps=20,step_size=0.01875", "eot-pgd20=pgd:steps=20,step_size=0.01875,eot=10",
    "eot-apgd=apgd:steps=50,eot=10",
]  # fmt: skip
# What images are transferred from in a diagnosis -> the defense of that network.
SOURCES = {"undefended": "none", "pgd_at": "pgd_at"}


def main(words: Sequence[str] | None = None) -> int:
    """Make what is missing; 0 is success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defenses", nargs="*", metavar="DEFENSE", help="default: all that are registered")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="run folders (default runs/zoo)")
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    given = parser.parse_args(words)
    wanted = [DEFENSES.entry(name).name for name in given.defenses] or DEFENSES.names()
    for defense in SOURCES.values():
        _train(defense, given.out)
    for defense in wanted:
        _train(defense, given.out)
        print(_asked(defense, given.out, given.zoo), flush=True)
    return 0


def _train(defense: str, out: Path) -> None:
    _verb("train", "--defense", defense, "--out", str(_run(out, defense)), *TRAINING)


def _run(out: Path, defense: str) -> Path:
    return out / f"{defense}-digits"


def _asked(defense: str, out: Path, into: Path) -> Path:
    """Attack, diagnose and publish one trained network."""
    run = _run(out, defense)
    evaluation, diagnosis = run / "evaluation" / "test-seed0.json", run / "evaluation" / "diagnosis-test-seed0.json"
    if not evaluation.exists():
        attacks = [word for attack in ATTACKS for word in ("--attack", attack)]
        _verb("evaluate", str(run), "--predictor=single", *attacks, "--out", str(evaluation))
    if not diagnosis.exists():
        others = {label: name for label, name in SOURCES.items() if name != defense}
        given = [word for label, name in others.items() for word in ("--source", f"{label}={_run(out, name)}")]
        _verb("diagnose", str(run), "--quick", *given, "--out", str(diagnosis))
    return publish(run, run.name, into=into)


def _verb(*words: str) -> None:
    code = learn2perturb(list(words))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
