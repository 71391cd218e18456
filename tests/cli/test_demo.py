"""The demo on a small scale: it trains, reads its own table, and fails when the table is not as it should be."""

from __future__ import annotations

import dataclasses
import json

import pytest

from learn2perturb.cli import demo
from learn2perturb.cli.main import main
from learn2perturb.experiments.study_file import merged, read_source, read_study
from learn2perturb.experiments.view import View
from learn2perturb.registry import DEFENSES

SMALL = {
    "train": {"limit": 96, "attack_steps": 1},
    "evaluate": {"draws": 2, "members": 2, "limit": 100},
    "cells": {
        "PGD-20": {"attack": "pgd:steps=2,step_size=0.05"},
        "EOT-PGD-20": {"attack": "pgd:steps=2,step_size=0.05,eot=2"},
    },
}


@pytest.fixture(scope="module")
def small():
    """The demo of fewer images, steps and draws."""
    name, source = read_source("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "read_source", lambda _: (name, merged(source, SMALL)))
        yield


@pytest.fixture(scope="module")
def usual(small, tmp_path_factory):
    """The folder of a demo of one epoch: too little for its own check."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--epochs", "1", "--out", str(out), "--json"]) == 1
    return out


def test_an_unconvincing_demo_says_so_and_exits_1(usual, capsys):
    # Again: what is there is only read.
    events = (usual / "store" / "events.jsonl").read_bytes()
    assert main(["demo", "--epochs", "1", "--out", str(usual)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("learn2perturb: error: the demo failed its own check: ")
    for words in ("What to look at:", "pgd_at", "learn2perturb, noise off", "EOT-PGD-20", "eps 0.15", "100 digits"):
        assert words in said.out
    assert str(usual / "page.html") in said.out
    assert main(["demo", "--epochs", "1", "--out", str(usual), "--json"]) == 1
    again = capsys.readouterr()
    assert "loss" not in again.err
    found = json.loads(again.out)
    assert list(found["defenses"]) == ["none", "pgd_at", "learn2perturb"]
    rows = found["defenses"]["learn2perturb"]
    assert [(row["attack"], row["noise"]) for row in rows[:3]] == [("clean", True), ("clean", False), ("FGSM", True)]
    assert (usual / "store" / "events.jsonl").read_bytes() == events
    assert demo._folder(usual, fresh=True) == usual.with_name("demo-2")


def test_the_printed_table_is_that_of_the_records(usual, capsys):
    main(["demo", "--epochs", "1", "--out", str(usual)])
    printed = capsys.readouterr().out
    for name in ("table", "noise-off"):
        for cell in View.load(usual / f"{name}.json").cells:
            assert cell.value is not None and f"{cell.value:6.1%} [{100 * cell.interval.low:.1f}, " in printed


def test_noise_is_compared_with_pgd_training_under_eot_as_well(usual):
    view = View.load(usual / "table.json")
    compared = {one.column[0] for one in view.differences if one.row == ("learn2perturb",)}
    assert compared == {"clean", "FGSM", "PGD-20", "EOT-PGD-20"}
    same = [view.cell(("pgd_at",), (name,)).records for name in ("PGD-20", "EOT-PGD-20")]
    assert same[0] == same[1], "attacked once: without noise there is nothing to average"


def test_the_check_of_the_demo(usual):
    views = [View.load(usual / f"{name}.json") for name in ("table", "noise-off")]
    lines = demo.table_lines(demo.study_of(demo.USUAL, "fast", 1, 0), views)
    assert [line.name for line in lines] == ["none", "pgd_at", "learn2perturb", "learn2perturb, noise off"]

    def scored(accuracies):
        return [
            dataclasses.replace(
                line,
                cells={
                    name: cell if name == "clean" else dataclasses.replace(cell, value=accuracies[line.defense])
                    for name, cell in line.cells.items()
                },
            )
            for line in lines
        ]

    good = {"none": 0.05, "pgd_at": 0.7, "learn2perturb": 0.7}
    assert demo.check(scored(good)) == []
    assert "undefended" in demo.check(scored({**good, "none": 0.10}))[0]
    for name in ("pgd_at", "learn2perturb"):
        assert demo.check(scored({**good, name: 0.2}))[0].startswith(name)


def test_every_registered_defense_is_trained_by_its_common_recipe_with_milestones_where_they_belong():
    configs = {run.name: run.config for run in demo.study_of(DEFENSES.names(), "common", 20, 3).runs}
    assert len(configs) == len(list(DEFENSES)) >= 10
    assert {config.epochs for config in configs.values()} == {20}
    assert configs["pgd_at"].milestones == [15, 18]  # 75 and 90 of 100
    assert configs["trades"].objective == "trades"
    assert {(config.seed, config.eps) for config in configs.values()} == {(3, 0.15)}


def test_the_usual_demo_is_the_study_of_that_name():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "read_source", read_source)  # not the small one
        own, shipped = demo.study_of(demo.USUAL, "fast", 20, 0), read_study("demo")
    assert [run.config for run in own.runs] == [run.config for run in shipped.runs]
    assert (own.cells, own.views) == (shipped.cells, shipped.views)


@pytest.mark.parametrize("names", [["none"], ["pgd_at", "none"], ["rse"], ["pni", "none"], DEFENSES.names()], ids=str)
def test_any_defenses_make_a_study(names):
    study = demo.study_of(names, "common", 3, 0)
    assert [run.label("defense") for run in study.runs] == names
    drawn = any(DEFENSES.entry(name).fact("stochastic") for name in names)
    assert (demo.NOISE_OFF in [view.name for view in study.views]) == drawn


def test_other_defenses_give_a_table_with_the_predictor_of_their_paper_and_are_not_done_twice(
    small, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "table"
    words = ["demo", "--defenses", "madry,rse", "--recipe", "common", "--epochs", "1", "--out", str(out)]
    assert main(words) == 0  # nothing is checked here: what falls short is reported
    said = capsys.readouterr().out
    views = [View.load(out / f"{name}.json") for name in ("table", "noise-off", "predictor")]
    lines = demo.table_lines(demo.study_of(["madry", "rse"], "common", 1, 0), views)
    assert [line.name for line in lines] == ["madry", "rse", "rse, noise off", "rse, mean probability of 2"]
    assert [sorted(line.cells) for line in lines] == [
        ["FGSM", "PGD-20", "clean"],
        ["EOT-PGD-20", "FGSM", "PGD-20", "clean"],
        ["FGSM", "PGD-20", "clean"],
        ["EOT-PGD-20", "FGSM", "clean"],
    ]
    assert "rse, mean probability of 2" in said
    assert "as EOT-PGD" in said
    assert "under the strongest of the attacks: " in said
    written = (out / "README.md").read_text()
    assert written.count("| rse |") >= 3
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    monkeypatch.setattr("learn2perturb.experiments.tasks.evaluate", lambda *a, **k: pytest.fail("it attacked again"))
    assert main(words) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_runs_of_an_earlier_demo_are_left_alone_and_said(usual, capsys):
    old = usual / "pgd_at"
    old.mkdir()
    (old / "config.yaml").write_text("defense: pgd_at\n")
    assert main(["demo", "--epochs", "1", "--out", str(usual)]) == 1
    assert f"note: pgd_at in {usual}" in capsys.readouterr().err
    assert (old / "config.yaml").read_text() == "defense: pgd_at\n"


def test_what_fails_in_the_study_is_said_and_the_code_is_1(small, tmp_path, capsys, monkeypatch):
    from learn2perturb.errors import ConfigError

    def fails(*args, **settings):
        raise ConfigError("no such thing")

    monkeypatch.setattr("learn2perturb.experiments.tasks.evaluate", fails)
    words = ["demo", "--defenses", "none", "--epochs", "1", "--out", str(tmp_path / "bad")]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "failed: none, seed 0: clean: " in said.out and "no such thing" in said.err
    assert "its own check" not in said.err, "nothing is wrong with the program's numbers"


def test_a_recipe_whose_delays_outlast_the_demo_is_refused(capsys):
    assert main(["demo", "--recipe", "paper"]) == 2
    assert "unknown recipe of the demo" in capsys.readouterr().err
