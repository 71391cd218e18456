"""The studies that come with the package: each is read at every level, and asks for what the paper's tables hold."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.experiments.facts import published
from learn2perturb.experiments.levels import level_notes
from learn2perturb.experiments.spec import Scoring, Study, ViewPlan, matches
from learn2perturb.experiments.study_file import _CELL, _TOP, build_study, merged, read_source, read_study, shipped
from learn2perturb.experiments.views import build_views
from tests.experiments.hand_made import evaluation, results

LEVELS = ("smoke", "laptop", "paper")
TABLES = [f"table{number}" for number in range(1, 7)]
FIGURES = [f"figure{number}" for number in range(2, 7)]
CLAIMS = ["convergence", "distribution", "objective", "placement", "pni-epochs", "sharing", "steps", "tuning"]
# Of one seed at the paper's level: trainings, and numbers asked of them.
COUNTS = {
    "table1": (4 * 3, 36), "table2": (3 * 8, 72), "table3": (5 * 2, 50 + 30), "table4": (6, 12), "table5": (5 * 2, 30),
    "table6": (4 * 2, 48), "eot": (4, 12), "figure2": (4, 28), "figure3": (4, 28), "figure4": (2, 2),
    "figure5": (4, 28), "figure6": (4, 28), "claim-convergence": (3, 9), "claim-distribution": (3, 9),
    "claim-objective": (4, 12), "claim-placement": (2, 6), "claim-pni-epochs": (12, 36), "claim-sharing": (2, 6),
    "claim-steps": (3, 9), "claim-tuning": (12, 36),
}  # fmt: skip
OF_THE_PAPER = [*TABLES, "eot", *FIGURES, *(f"claim-{claim}" for claim in CLAIMS)]
SMALL = {"resnet20", "resnet32", "resnet44", "resnet20_x1.5"}  # three quarters of an hour a training on a CPU core


def counts(study: Study) -> tuple[int, int]:
    return len(study.runs), sum(1 for _ in study.all_pairs())


def test_every_table_figure_and_claim_of_the_paper_is_a_study():
    assert set(OF_THE_PAPER) <= set(shipped())
    assert set(COUNTS) == set(OF_THE_PAPER)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_study_has_the_papers_matrix_at_the_papers_level_and_three_seeds(name):
    study = read_study(name, "paper")
    trainings, numbers = COUNTS[name]
    assert counts(study) == (3 * trainings, 3 * numbers)
    assert {run.label("seed") for run in study.runs} == {1, 2, 3}
    assert {run.config.dataset for run in study.runs} == {"cifar100" if name in ("figure5", "figure6") else "cifar10"}


@pytest.mark.parametrize("name", OF_THE_PAPER)
@pytest.mark.parametrize("level", ["smoke", "laptop"])
def test_a_smaller_level_is_smaller_and_says_in_what(name, level):
    study, paper = read_study(name, level), read_study(name, "paper")
    assert counts(study) <= counts(paper)
    for run in study.runs:
        assert run.config.epochs <= 12
        assert run.config.dataset == "digits" if level == "smoke" else run.config.model in SMALL
    assert any(note.startswith(f"Level {level} beside the paper's: ") for note in level_notes(study))


def test_what_a_level_changes_of_a_defense_is_said_by_its_name():
    (note,) = level_notes(read_study("figure6", "laptop"))
    assert "defense pgd_at, learn2perturb (pgd_at, pni, adv_bnn, learn2perturb)" in note
    assert "gamma of `learn2perturb` 0.0065 (as is usual)" in note
    assert "of `adv_bnn`" not in note  # left out at this level, so none of its options changed
    (note,) = level_notes(read_study("table4", "laptop"))
    assert "restarts of `rse` as is usual (true)" in note
    assert "gamma of `learn2perturb_r`" in "".join(level_notes(read_study("paper-scale", "laptop")))


@pytest.mark.parametrize("name", [*TABLES, "eot"])
def test_every_number_of_a_table_finds_its_place(name):
    """At the paper's level each published number stands beside exactly one of ours (two where no network is stated)."""
    study = read_study(name, "paper")
    made = evaluation(50)
    noisy = evaluation(50, 50)
    found = results(study, lambda pair: noisy if pair.run.stochastic else made)
    (table,) = [view for view in build_views(found) if view.name == "table"]
    beside = [cell.paper for cell in table.cells if cell.paper is not None]
    times = 2 if name == "table3" else 1
    assert len(beside) == len(table.cells) == times * len(published(name).cells)
    assert sorted(number.mean for number in beside) == sorted(
        number.mean for number in published(name).cells.values() for _ in range(times)
    )


@pytest.mark.parametrize("level", ["laptop", "paper"])
def test_tables_share_their_trainings(level):
    """The same network is trained once for all tables: whatever differs in a config would train it again."""
    configs = {}
    for name in (*TABLES, "eot", "figure2", "figure4"):
        for run in read_study(name, level).runs:
            key = run.config.defense, run.config.model, run.config.seed, bool(run.config.model_options)
            assert configs.setdefault(key, run.config) == run.config, (name, key)
    assert len(configs) > 5


@pytest.mark.parametrize("name", [name for name in OF_THE_PAPER if name.startswith("claim-")])
def test_a_claim_varies_what_it_is_about_and_nothing_else(name):
    study = read_study(name, "paper")
    configs = [run.config.to_dict() for run in study.runs if run.config.seed == 1]
    varied = {key for config in configs for key in config if config[key] != configs[0][key]}
    allowed = {
        "claim-convergence": {"defense"}, "claim-pni-epochs": {"defense", "epochs"},
        "claim-objective": {"defense", "alpha", "beta"},
    }.get(name, {"options"})  # fmt: skip
    assert varied - {"options"} <= allowed
    assert varied


def test_a_study_of_four_defenses_three_attacks_and_three_seeds_is_a_file_of_fifteen_lines():
    path = Path(__file__).parents[2] / "examples" / "study.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 15
    study = read_study(path)
    assert counts(study) == (4 * 3, 4 * 3 * 4)
    view, noise_off = build_views(results(study, lambda pair: None))
    assert view.missing == noise_off.missing == 48
    assert list(view.column_labels) == [("clean",), ("fgsm",), ("pgd20",), ("eot-pgd20",)]


def test_what_a_study_extends_is_changed_key_by_key_and_at_every_level():
    study = read_study("figure5", "smoke")
    assert [cell.eps for cell in study.cells if cell.name == "attacked"] == [0.05, 0.1, 0.15]
    assert study.views[0].paper == {"facts": "figure5"}
    assert study.views[0].x == "eps"
    assert read_source("table6")[1]["cells"].keys() == {"fgsm", "pgd"}


def test_a_run_is_called_by_all_but_its_seed():
    source = {"runs": {"a": {"defense": ["pni", "rse"]}}, "seeds": [1, 2], "cells": {"clean": {}}}
    study = build_study("t", source)
    assert {run.label("run") for run in study.runs} == {"pni", "rse"}
    assert {run.title for run in study.runs} == {"pni, seed 1", "pni, seed 2", "rse, seed 1", "rse, seed 2"}
    assert {run.label("name") for run in study.runs} == {"a"}


def test_clean_images_have_no_size_and_eot_is_a_label():
    source = {"runs": {"a": {"defense": "pni"}}, "cells": {"clean": {}, "pgd": {"attack": "pgd20", "eot": [2, 3]}}}
    labels = [(pair.label("eps"), pair.label("eot")) for pair in build_study("t", source).all_pairs()]
    eps = labels[1][0]
    assert labels == [(None, None), (eps, 2), (eps, 3)]
    assert eps is not None


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"eps": "8/255"}, 1), ({"eps": ["4/255", 8 / 255]}, 2), ({"eps": "0.5"}, 0), ({"eps": "big"}, 0),
        ({"defense": "vanilla"}, 2), ({"defense": ["none", "vanilla"]}, 2), ({"defense": "none"}, 0),
        ({"seed": "0"}, 2), ({"stochastic": False}, 2), ({"stochastic": "0"}, 0),
    ],
)  # fmt: skip
def test_labels_are_chosen_as_settings_are_written(wanted, found):
    source = {"runs": {"a": {"defense": "pgd_at"}}, "cells": {"pgd": {"attack": "pgd20", "eps": ["4/255", "8/255"]}}}
    pairs = list(build_study("t", source).all_pairs())
    assert sum(matches(pair, wanted) for pair in pairs) == found


@pytest.mark.parametrize(
    "reasons", [["why"], [{"where": "pni", "why": "x"}], [{"where": {}}], [{"why": "x", "who": "y"}]]
)
def test_a_reason_that_is_none_is_refused(reasons):
    source = {"runs": {"a": {"defense": "pni"}}, "cells": {"clean": {}}, "reasons": reasons}
    with pytest.raises(ConfigError, match="study t: reasons"):
        build_study("t", source)


def test_every_study_of_the_docs_is_read_and_every_key_is_in_them():
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for number, block in enumerate(blocks):
        source = yaml.safe_load(block)
        base = source.pop("extends", None)
        whole = source if base is None else merged(read_source(base)[1], source)
        for level in source.get("levels") or [None]:
            assert build_study(f"docs{number}", whole, level).runs
    example = Path(__file__).parents[2] / "examples" / "study.yaml"
    assert yaml.safe_load(blocks[0]) == yaml.safe_load(example.read_text())
    for name in (*_TOP, "extends", *_CELL, *(item.name for kind in (Scoring, ViewPlan) for item in fields(kind))):
        assert f"`{name}" in page or f"`{name}`" in page, name
    for name in OF_THE_PAPER:
        assert f"`{name}`" in page, name


def test_what_is_said_of_a_defense_holds_wherever_it_is_trained_but_where_the_run_says_otherwise():
    source = {
        "train": {"epochs": 5},
        "defenses": {"learn2perturb": {"options": {"gamma": 0.5}, "epochs": 7}, "vanilla": {"eps": "4/255"}},
        "runs": {
            "all": {"defense": ["pgd_at", "learn2perturb"]},
            "own": {"defense": "learn2perturb", "epochs": 3, "options.gamma": 0.25},
        },
        "cells": {"clean": {}},
    }
    vanilla, ours, own = (run.config for run in build_study("t", source).runs)
    assert (vanilla.epochs, vanilla.eps) == (5, pytest.approx(4 / 255))
    assert (ours.epochs, ours.options["gamma"]) == (7, 0.5)
    assert (own.epochs, own.options["gamma"]) == (3, 0.25)
    with pytest.raises(UnknownNameError, match="defense"):
        build_study("t", {**source, "defenses": {"learn2pertrub": {}}})


@pytest.mark.parametrize("level", ["laptop", "forty"])
@pytest.mark.parametrize("name", ["table1", "table6", "figure3", "figure4", "eot"])
def test_the_networks_of_a_shorter_level_are_those_of_the_study_at_paper_scale(name, level):
    trained = {str(run.config) for run in read_study("paper-scale", level).runs}
    wanted = read_study(name, level).runs
    assert wanted
    assert {str(run.config) for run in wanted} <= trained
