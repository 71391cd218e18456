"""``learn2perturb study``: run, plan, show, list, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from learn2perturb.cli.main import main
from tests.experiments.conftest import TINY


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {**TINY, "seeds": [1], "runs": {"all": {"defense": "learn2perturb"}}, "notes": ["of digits"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(source))
    return tmp_path / "mine.yaml"


def test_a_study_is_planned_run_and_shown(study_file, tmp_path, capsys):
    assert main(["study", "mine.yaml", "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "to be trained" in planned and "0 of 2" in planned and "about" in planned and "of digits" in planned
    assert not (tmp_path / "runs" / "store" / "events.jsonl").exists(), "a plan does nothing"
    assert main(["study", "mine.yaml"]) == 0
    printed = capsys.readouterr()
    assert "---  ---" in printed.out and "runs/studies/mine" in printed.out
    assert "1 left, about" in printed.err
    assert (tmp_path / "runs" / "studies" / "mine" / "README.md").exists()
    assert main(["study", "mine.yaml", "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"] == 0 and plan["runs"][0]["records"] == "2 of 2"


def test_show_computes_nothing(study_file, tmp_path, capsys):
    assert main(["study", "mine.yaml", "--show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["missing"] == 2
    assert not (tmp_path / "runs" / "store" / "events.jsonl").exists()


def test_settings_go_over_the_file(study_file, capsys):
    words = ["study", "mine.yaml", "--plan", "--json", "--set", "seeds=[1, 2, 3]", "--set", "train.epochs=1"]
    assert main(words) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 3


def test_the_list_names_studies_and_levels(capsys):
    assert main(["study", "--list"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["study", "--list", "--json"]) == 0
    assert {"smoke", "laptop"} <= set(json.loads(capsys.readouterr().out)[0]["levels"])


@pytest.mark.parametrize(
    "words",
    [
        [], ["no_such"], ["no_such.yaml"], ["mine.yaml", "other.yaml"], ["mine.yaml", "--level", "smoke"],
        ["mine.yaml", "--set", "train"], ["mine.yaml", "--set", "train.epoch=1"], ["mine.yaml", "--jobs", "0"],
        ["mine.yaml", "--minutes", "-1"], ["mine.yaml", "--engine", "cloud"], ["mine.yaml", "--address", "auto"],
        ["mine.yaml", "--out", "mine.yaml"], ["mine.yaml", "--store", "mine.yaml"], ["clean"],
        ["mine.yaml", "--engine", "slurm", "--slurm", "partition"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_wrong_is_one_line(study_file, capsys, words):
    assert main(["study", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_failed_cell_is_told_and_the_code_is_1(study_file, capsys):
    words = ["study", "mine.yaml", "--set", "cells.bad={certify: {n: 10, n0: 5, method: pixeldp}}"]
    assert main(words) == 1
    assert "failed: all, seed 1: bad" in capsys.readouterr().out


def test_clean_says_first_and_removes_then(study_file, tmp_path, capsys):
    assert main(["study", "mine.yaml"]) == 0
    assert main(["study", "mine.yaml", "--set", "seeds=[9]"]) == 0
    capsys.readouterr()
    assert main(["study", "clean", "mine.yaml"]) == 0
    assert capsys.readouterr().out.strip().endswith("3 not needed by these studies; --yes removes them")
    assert main(["study", "clean", "mine.yaml", "--yes"]) == 0
    assert len(list((tmp_path / "runs" / "store" / "runs").glob("*"))) == 1
