"""The demo on a small scale: it trains, reads its own table, and fails when the table is not as it should be."""

from __future__ import annotations

import dataclasses
import json

import pytest

from learn2perturb import records
from learn2perturb.cli import demo, digits
from learn2perturb.cli.main import main
from learn2perturb.evaluation import Evaluation
from learn2perturb.registry import DEFENSES


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of one epoch: too little for its own check."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "ATTACK_STEPS", 2)
        patch.setattr(digits, "EOT", 2)
        patch.setattr(digits, "DRAWS", 2)
        patch.setattr(digits, "SETTINGS", {**digits.SETTINGS, "limit": 192, "attack_steps": 1})
        yield out


def test_an_unconvincing_demo_says_so_and_exits_1(small, capsys):
    assert main(["demo", "--epochs", "1", "--out", str(small)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("learn2perturb: error: the demo failed its own check: ")
    for words in ("What to look at:", "pgd_at", "learn2perturb, noise off", "EOT-PGD-2", "eps 0.15"):
        assert words in said.out
    # Again: what is trained is only evaluated.
    assert main(["demo", "--epochs", "1", "--out", str(small), "--json"]) == 1
    again = capsys.readouterr()
    assert "loss" not in again.err
    assert list(json.loads(again.out)["defenses"]) == ["none", "pgd_at", "learn2perturb"]
    assert demo._folder(small, fresh=True) == small.with_name("demo-2")


def test_the_check_of_the_demo(small):
    results = {name: Evaluation.load(small / name / "evaluation" / "demo.json") for name in demo.USUAL}

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


def test_every_registered_defense_is_trained_by_its_common_recipe_with_milestones_where_they_belong():
    configs = {name: digits.config_of(name, "common", 20, 3).resolve() for name in DEFENSES.names()}
    assert len(configs) == len(list(DEFENSES)) >= 10
    assert {config.epochs for config in configs.values()} == {20}
    assert configs["pgd_at"].milestones == [15, 18]  # 75 and 90 of 100
    assert configs["trades"].objective == "trades"
    assert {(config.seed, config.eps) for config in configs.values()} == {(3, digits.EPS)}


def test_other_defenses_give_a_table_with_the_predictor_of_their_paper_and_are_not_done_twice(
    small, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "table"
    words = ["demo", "--defenses", "madry,rse", "--recipe", "common", "--epochs", "1", "--out", str(out)]
    assert main(words) == 0  # nothing is checked here: what falls short is reported
    said = capsys.readouterr().out
    record = records.load(out / "table.json", digits.SideBySide)
    assert [line.name for line in record.lines] == ["madry", "rse", "rse, noise off", "rse, mean probability of 2"]
    assert [sorted(line.cells) for line in record.lines] == [
        ["FGSM", "PGD-2", "clean"],
        ["EOT-PGD-2", "FGSM", "PGD-2", "clean"],
        ["FGSM", "PGD-2", "clean"],
        ["EOT-PGD-2", "FGSM", "clean"],
    ]
    written = (out / "table.md").read_text()
    assert written.count("\n| ") == 6
    for text in (said, written):
        assert "rse, mean probability of 2" in text
        assert "as EOT-PGD" in text
    assert "under the strongest of the attacks: " in said
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    monkeypatch.setattr("learn2perturb.evaluation.evaluate", lambda *a, **k: pytest.fail("it attacked again"))
    assert main(words) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_a_recipe_whose_delays_outlast_the_demo_is_refused(capsys):
    assert main(["demo", "--recipe", "paper"]) == 2
    assert "unknown recipe of the demo" in capsys.readouterr().err
