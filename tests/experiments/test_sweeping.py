"""Searches: what they may see, that they find the better setting, that they go on, and fresh seeds after them."""

from __future__ import annotations

import pytest

from learn2perturb.errors import ConfigError, MissingDependencyError
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import build_study
from learn2perturb.experiments.sweeping import RandomSampler, SweepPlan, Trials, read_sweep
from tests.experiments.working import ended, run


@pytest.fixture
def searched(tiny):
    """A study that looks for a learning rate, one of which learns nothing."""
    return {
        **{key: value for key, value in tiny.items() if key != "seeds"},
        "train": {**tiny["train"], "validation": 0.2, "limit": 320, "epochs": 4, "attack_steps": 1},
        "runs": {"it": {"defense": "none"}},
        "cells": {"held": {"split": "validation", "limit": 60}, "test": {}},
        "sweep": {
            "run": "it", "over": {"lr": [1e-9, 0.05]}, "objective": ["held"], "trials": 4, "seeds": [11, 12], "seed": 2,
        },
    }  # fmt: skip


def changed(source, **sweep):
    return {**source, "sweep": {key: value for key, value in {**source["sweep"], **sweep}.items() if value is not None}}


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_the_better_setting_is_chosen_and_trained_on_fresh_seeds(searched, tmp_path, sampler):
    if sampler == "optuna":
        pytest.importorskip("optuna")
    found = run(changed(searched, sampler=sampler), tmp_path)
    assert found.complete and found.trials.chosen == {"lr": 0.05}
    assert {one.settings["lr"] for one in found.trials.tried} == {1e-9, 0.05}, "both were tried"
    assert [one.config.seed for one in found.results.study.runs] == [11, 12]
    assert {one.config.lr for one in found.results.study.runs} == {0.05}
    titles = [event["title"] for event in Store(tmp_path).events() if event["what"] == "ended"]
    assert not any("trial" in title and "test" in title for title in titles), "no trial has seen a test image"
    again = run(changed(searched, sampler=sampler), tmp_path)
    assert again.computed == 0 and again.trials == found.trials and max(ended(tmp_path).values()) == 1
    path = found.trials.save(tmp_path / "sweep.json")
    assert Trials.load(path) == found.trials


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": ["test"]}, "may only see what the trainings hold out"),
        ({"objective": ["none"]}, "unknown cell"),
        ({"run": "that"}, "unknown run"),
        ({"over": {"lr": {"low": 1.0, "high": 0.1}}}, "low must be below high"),
        ({"over": {"lr": {"low": 0.0, "high": 0.1, "log": True}}}, "above 0 with log"),
        ({"over": {"lr": {"from": 0.0, "high": 0.1}}}, "list of choices"),
        ({"over": {"lr": {"low": "a", "high": 0.1}}}, "give numbers"),
        ({"over": ["lr"]}, "over is"),
        ({"trials": 0}, "trials"),
        ({"trials": 1.5}, "trials"),
        ({"seeds": [0, 1]}, "needs fresh seeds"),
        ({"seeds": None}, "seeds is missing"),
        ({"sampler": "grid"}, "grid"),
        ({"goal": 1}, "unknown setting of sweep"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_before_any_work(searched, tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        run(changed(searched, **change), tmp_path)
    assert not Store(tmp_path).events()


def test_a_range_is_drawn_evenly_in_its_logarithm():
    study = build_study("x", {"runs": {"a": {"defense": "none"}}, "cells": {"c": {"split": "validation"}}, "sweep": {
        "run": "a", "over": {"lr": {"low": 1e-4, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 1.0}},
        "objective": "c", "trials": 5, "seeds": [1],
    }})  # fmt: skip
    plan = read_sweep(study)
    assert isinstance(plan, SweepPlan)
    drawn = RandomSampler(plan).ask(4000)
    small = sum(one["lr"] < 1e-2 for one in drawn) / 4000
    assert 0.45 < small < 0.55 and all(1e-4 <= one["lr"] <= 1 for one in drawn)
    assert 0.45 < sum(one["momentum"] < 0.5 for one in drawn) / 4000 < 0.55
    assert RandomSampler(plan).ask(3) == drawn[:3]


def test_optuna_that_is_not_installed_is_named(searched, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"learn2perturb\[sweep\]"):
        run(changed(searched, sampler="optuna"), tmp_path)


def test_a_search_whose_time_is_up_goes_on(searched, tmp_path):
    searched["train"]["epochs"] = 3000
    found = run(searched, tmp_path, minutes=3 / 60)
    assert found.trials is None and not found.complete and not found.failures
