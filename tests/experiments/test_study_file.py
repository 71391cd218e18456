"""Studies as they are written: matrices, seeds, levels, sources, and what is refused."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest

from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.experiments.study_file import build_study, merged, read_source, read_study, shipped
from learn2perturb.registry import DATASETS

BASE = {
    "title": "a study",
    "train": {"dataset": "digits", "model": "digits_cnn", "recipe": "common", "epochs": 3},
    "seeds": [1, 2],
    "runs": {"all": {"defense": ["none", "pgd_at", "learn2perturb"]}},
    "cells": {
        "clean": {},
        "pgd": {"attack": "pgd20", "eps": ["2/255", "8/255"]},
        "eot": {"attack": "eot-pgd20", "only": {"stochastic": True}},
    },
}


def changed(**changes):
    return merged(copy.deepcopy(BASE), changes)


def test_a_list_makes_a_run_of_each_value_the_first_seed_of_all_first():
    study = build_study("x", BASE)
    assert [run.title for run in study.runs] == [
        f"{defense}, seed {seed}" for seed in (1, 2) for defense in ("none", "pgd_at", "learn2perturb")
    ]
    assert all(run.config.epochs == 3 and not run.config.missing() for run in study.runs)


def test_cells_are_asked_of_the_runs_that_they_are_for():
    study = build_study("x", BASE)
    asked = {run.title: [pair.cell.title for pair in study.pairs(run)] for run in study.runs}
    assert asked["none, seed 1"] == ["clean", "pgd, eps 0.007843", "pgd, eps 0.03137"]
    assert asked["learn2perturb, seed 2"][-1] == "eot"


def test_a_value_that_is_a_list_itself_is_no_axis():
    one = build_study("x", changed(train={"milestones": [1, 2]}))
    assert len(one.runs) == 6 and one.runs[0].config.milestones == [1, 2]
    two = build_study("x", changed(train={"milestones": [[1], [2]]}))
    assert len(two.runs) == 12 and {tuple(run.config.milestones) for run in two.runs} == {(1,), (2,)}


def test_options_by_dotted_keys_are_axes():
    runs = {"all": None, "gamma": {"defense": "learn2perturb", "options.gamma": ["1e-4", 1e-3], "options.init": 0.5}}
    study = build_study("x", changed(runs=runs))
    assert [run.config.options["gamma"] for run in study.runs] == [1e-4, 1e-3, 1e-4, 1e-3]
    assert {run.config.options["init"] for run in study.runs} == {0.5}
    assert study.runs[0].label("options.gamma") == 1e-4


def test_levels_replace_and_null_takes_away():
    levels = {"smoke": {"train": {"epochs": 1}, "seeds": [7], "cells": {"pgd": None}, "only": {"defense": "pgd_at"}}}
    study = build_study("x", changed(levels=levels), "smoke")
    assert [run.title for run in study.runs] == ["pgd_at, seed 7"]
    assert [cell.name for cell in study.cells] == ["clean", "eot"]
    assert study.runs[0].config.epochs == 1


def test_the_level_is_laptop_where_there_is_one():
    levels = {"smoke": {"train": {"epochs": 1}}, "laptop": {"train": {"epochs": 2}}}
    assert build_study("x", changed(levels=levels)).level == "laptop"
    assert build_study("x", BASE).level is None


def test_changes_go_over_the_level():
    changes = {"train.epochs": 9, "evaluate.limit": 50, "seeds": [4], "cells.pgd.attack.steps": 3}
    study = build_study("x", BASE, None, changes)
    assert study.cells[1].attack[1]["steps"] == 3
    assert {run.config.epochs for run in study.runs} == {9} and study.cells[0].scoring.limit == 50
    assert {run.config.seed for run in study.runs} == {4}


@pytest.mark.parametrize("attack", ["pgd20:steps=9", {"name": "pgd20", "steps": 9}, {"name": "pgd20:steps=9"}])
def test_a_cell_may_replace_settings_of_a_preset(attack):
    study = build_study("x", changed(cells={"new": {"attack": attack}}))
    cell = next(one for one in study.cells if one.name == "new")
    assert cell.attack == ("pgd", {"steps": 9, "step_size": 2 / 255}) and cell.preset_step


def test_others_are_the_runs_beside_it_of_the_same_seed():
    study = build_study("x", changed(cells={"from": {"attack": "pgd7", "source": "others"}}))
    first = study.runs[0]
    pairs = [pair for pair in study.pairs(first) if pair.cell.name == "from"]
    assert [list(pair.sources) for pair in pairs] == [["pgd_at"], ["learn2perturb"]]
    assert {run.config.seed for pair in pairs for run in pair.sources.values()} == {1}


def test_a_source_by_labels_is_of_the_same_seed():
    study = build_study("x", changed(cells={"from": {"attack": "pgd7", "source": {"defense": "pgd_at"}}}))
    for run in study.runs:
        (pair,) = (pair for pair in study.pairs(run) if pair.cell.name == "from")
        assert pair.sources["pgd_at"].config.seed == run.config.seed


def test_titles_tell_runs_of_several_names_apart():
    runs = {"all": None, "one": {"defense": "pgd_at"}, "two": {"defense": "pgd_at", "alpha": 0.0}}
    titles = [run.title for run in build_study("x", changed(runs=runs)).runs]
    assert titles == ["one, seed 1", "two, seed 1", "one, seed 2", "two, seed 2"], "one seed of all comes first"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cels": {}}, "cels"),
        ({"runs": {"all": {"defence": "none"}}}, "defence"),
        ({"runs": {"all": {"defense": "nine"}}}, "nine"),
        ({"runs": {"all": {"defense": []}}}, "empty list"),
        ({"runs": None}, "no runs"),
        ({"cells": {"clean": None, "pgd": None, "eot": None}}, "no cells"),
        ({"cells": {"new": {"attack": "pgd21"}}}, "pgd21"),
        ({"cells": {"new": {"atack": "pgd20"}}}, "atack"),
        ({"cells": {"new": {"attack": "pgd21:steps=3"}}}, "pgd21': did you mean 'pgd20'"),
        ({"cells": {"new": {"attack": "pgd20", "draws": 0}}}, "draws"),
        ({"cells": {"new": {"attack": "pgd20", "draws": "many"}}}, "many"),
        ({"cells": {"new": {"attack": {"steps": 3}}}}, "no name"),
        ({"cells": {"new": {"attack": "pgd20", "certify": {"n": 10}}}}, "a cell of its own"),
        ({"cells": {"new": {"attack": "pgd20", "source": "twins"}}}, "twins"),
        ({"cells": {"new": {"attack": "pgd20", "source": {"defense": "rse"}}}}, "rse"),
        ({"cells": {"new": {"attack": "pgd20", "eps": -1}}}, "eps"),
        ({"evaluate": {"drws": 3}}, "drws"),
        ({"seeds": 3}, "seeds"),
        ({"views": {"v": {"kind": "pie"}}}, "pie"),
        ({"views": {"v": {"row": ["run"]}}}, "row"),
        ({"train": [1]}, "mapping"),
        ({"notes": "one"}, "lists"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(change, said):
    with pytest.raises(ConfigError, match=said):
        build_study("x", changed(**change))


def test_an_unknown_level_lists_those_there_are():
    with pytest.raises(UnknownNameError, match="smoke"):
        build_study("x", changed(levels={"smoke": {}}), "smok")
    with pytest.raises(ConfigError, match="no levels"):
        build_study("x", BASE, "smoke")


def test_an_unknown_study_lists_those_there_are():
    with pytest.raises(UnknownNameError, match="demo"):
        read_study("dem")


def test_a_study_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "runs: {a: {defense: none, dataset: digits, model: digits_cnn}}\ncells: {clean: {}}\ntitle: base\n"
    )
    (tmp_path / "own.yaml").write_text("extends: base.yaml\ntitle: own\ncells: {fgsm: {attack: fgsm}}\n")
    study = read_study(tmp_path / "own.yaml")
    assert study.title == "own" and [cell.name for cell in study.cells] == ["clean", "fgsm"]


def test_a_study_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_study(tmp_path / "own.yaml")


FOLDER = Path(__file__).parents[2] / "benchmarks" / "search"
SEARCH = sorted(map(str, FOLDER.glob("*.yaml")))


@pytest.mark.parametrize("name", [*shipped(), *SEARCH], ids=lambda name: Path(name).stem)
def test_shipped_studies_are_right_at_every_level(name, monkeypatch):
    """Those of the search, too: one level of it could not be read, and nobody had asked for it."""
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    runpy.run_path(str(FOLDER / "cifar16.py"), run_name="cifar16")
    levels = read_source(name)[1].get("levels") or [None]
    for level in levels:
        study = read_study(name, level)
        assert study.runs and list(study.all_pairs()) and study.views
