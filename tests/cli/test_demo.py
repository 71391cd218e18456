"""The demo on a small scale: it trains, reads its own table, and fails when the table is not as it should be."""

from __future__ import annotations

import dataclasses
import json

import pytest

from learn2perturb.cli import demo
from learn2perturb.cli.main import main
from learn2perturb.evaluation import Evaluation


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of one epoch: too little for its own check."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "ATTACK_STEPS", 2)
        patch.setattr(demo, "EOT", 2)
        patch.setattr(demo, "DRAWS", 2)
        patch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "epochs": 1, "limit": 192, "attack_steps": 1})
        yield out


def test_an_unconvincing_demo_says_so_and_exits_1(small, capsys):
    assert main(["demo", "--out", str(small)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("learn2perturb: error: the demo failed its own check: ")
    for words in ("What to look at:", "pgd_at", "learn2perturb, noise off", "EOT-PGD-2", "eps 0.15"):
        assert words in said.out
    # Again: what is trained is only evaluated.
    assert main(["demo", "--out", str(small), "--json"]) == 1
    again = capsys.readouterr()
    assert "loss" not in again.err
    assert list(json.loads(again.out)["defenses"]) == ["none", "pgd_at", "learn2perturb"]
    assert demo._folder(small, fresh=True) == small.with_name("demo-2")


def test_the_check_of_the_demo(small):
    results = {name: Evaluation.load(small / name / "evaluation" / "demo.json") for name in demo.DEFENSES}

    def scored(name: str, accuracy: float) -> Evaluation:
        rows = tuple(
            row if row.eps is None else dataclasses.replace(row, accuracy=accuracy) for row in results[name].rows
        )
        return dataclasses.replace(results[name], rows=rows)

    good = {
        "none": scored("none", 0.05),
        "pgd_at": scored("pgd_at", 0.7),
        "learn2perturb": scored("learn2perturb", 0.7),
    }
    assert demo.check(good) == []
    assert "undefended" in demo.check({**good, "none": scored("none", 0.10)})[0]
    for name in ("pgd_at", "learn2perturb"):
        assert demo.check({**good, name: scored(name, 0.2)})[0].startswith(name)
