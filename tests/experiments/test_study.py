"""The loop: nothing twice, whatever stops it, wherever it is done; the same table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from learn2perturb.errors import CheckpointError, ConfigError, Interrupted, MissingDependencyError, UnknownNameError
from learn2perturb.experiments import tasks
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.store import MODEL, Store
from learn2perturb.experiments.study_file import build_study
from learn2perturb.experiments.studying import Placing
from tests.experiments.working import ended, run, start, table, training_worker


def test_a_study_is_done_once(tiny, tmp_path):
    first = run(tiny, tmp_path)
    assert first.complete and first.computed == 12 and not first.failures
    assert set(ended(tmp_path).values()) == {1}
    second = run(tiny, tmp_path)
    assert second.computed == 0 and table(second.results) == table(first.results)


def test_what_a_defense_refuses_is_refused_before_anything_is_trained(tiny, tmp_path):
    tiny["runs"]["bad"] = {"defense": "mart", "awp": 0.01}
    with pytest.raises(ConfigError, match="run bad, seed 1: awp is 0.01"):
        run(tiny, tmp_path)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UnknownNameError, match=r"run bad, seed 1: .*'gama'.*did you mean 'gamma'"):
        run({**tiny, "runs": {"bad": {"defense": "learn2perturb", "options.gama": 1}}}, tmp_path)


def test_another_study_takes_what_is_there(tiny, tmp_path):
    run(tiny, tmp_path)
    renamed = {
        **tiny, "runs": {"mine": {"defense": "learn2perturb"}},
        "cells": {"again": {"attack": {"name": "pgd", "steps": 2, "step_size": 0.05}}, "new": {"attack": "fgsm"}},
    }  # fmt: skip
    found = run(renamed, tmp_path)
    assert found.computed == 2, "only the new cell of two seeds"
    assert max(ended(tmp_path).values()) == 1


def test_what_says_the_same_has_one_address(one, tmp_path):
    one["cells"] = {
        "a": {"attack": "pgd:steps=20,step_size=2/255"}, "b": {"attack": "pgd20"},
        "c": {"attack": {"name": "pgd", "steps": 20, "step_size": 2 / 255, "eot": 1}},
        "d": {"attack": "pgd20", "eps": 0.15},
    }  # fmt: skip
    assert run(one, tmp_path).computed == 2
    assert len(list((tmp_path / "cells").rglob("*.json"))) == 1


def test_without_noise_draws_and_eot_are_one(tiny, tmp_path):
    tiny = {**tiny, "seeds": [1], "runs": {"all": {"defense": "pgd_at"}}}
    tiny["cells"] = {
        "pgd": {"attack": "pgd:steps=2,step_size=0.05", "draws": [1, 5]},
        "eot": {"attack": "pgd:steps=2,step_size=0.05,eot=3", "noise_off": True},
    }
    assert run(tiny, tmp_path).computed == 2


@pytest.mark.parametrize(
    "change",
    [
        {"cells": {"pgd": {"attack": "pgd:steps=3,step_size=0.05"}}},
        {"cells": {"pgd": {"attack": "pgd:steps=2,step_size=0.04"}}},
        {"cells": {"pgd": {"attack": "pgd:steps=2,step_size=0.05,eot=2"}}},
        {"cells": {"pgd": {"attack": "pgd:steps=2,step_size=0.05", "eps": 0.1}}},
        {"cells": {"pgd": {"attack": "pgd:steps=2,step_size=0.05", "source": "twin"}}},
        {"cells": {"pgd": {"attack": "pgd:steps=2,step_size=0.05", "released": 10}}},
        {"evaluate": {"limit": 10}},
        {"evaluate": {"draws": 3}},
        {"evaluate": {"seed": 1}},
        {"evaluate": {"predictor": "vote"}},
        {"evaluate": {"batch_size": 10}},
        {"evaluate": {"noise_off": True}},
        {"evaluate": {"split": "train"}},
    ],
    ids=str,
)
def test_another_question_has_another_address(one, tmp_path, change):
    one["cells"] = {"pgd": one["cells"]["pgd"]}
    run(one, tmp_path)
    changed = {**one, **{key: {**one[key], **value} for key, value in change.items()}}
    assert run(changed, tmp_path).computed == 1


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 3},
        {"lr": 0.05},
        {"limit": 96},
        {"eps": 0.1},
        {"seed": 9},
        {"options": {"init": 0.3}},
        {"augment": True},
    ],
    ids=str,
)
def test_another_training_has_another_address(one, tmp_path, change):
    plain = Ledger(build_study("x", one), Store(tmp_path))
    own = {**one, "train": {**one["train"], **change}}
    if "seed" in change:
        own["seeds"] = [change["seed"]]
    other = Ledger(build_study("x", own), Store(tmp_path))
    assert plain.address(plain.study.runs[0]) != other.address(other.study.runs[0])


def test_where_it_is_done_is_no_part_of_an_address(one, tmp_path):
    plain = Ledger(build_study("x", one), Store(tmp_path))
    own = {**one, "train": {**one["train"], "device": "cpu", "log_every": 3, "checkpoint_minutes": 1.0}}
    other = Ledger(build_study("x", own), Store(tmp_path))
    assert plain.address(plain.study.runs[0]) == other.address(other.study.runs[0])


def test_a_changed_numeric_version_is_another_address(one, tmp_path, monkeypatch):
    before = Ledger(build_study("x", one), Store(tmp_path))
    key = before.address(before.study.runs[0])
    monkeypatch.setattr("learn2perturb.experiments.store.NUMERICS", 2)
    after = Ledger(build_study("x", one), Store(tmp_path))
    assert after.address(after.study.runs[0]) != key


def test_a_damaged_record_is_computed_again(one, tmp_path):
    first = run(one, tmp_path)
    path = next((tmp_path / "cells").rglob("PGD*.json"))
    path.write_text(path.read_text()[:-40])
    second = run(one, tmp_path)
    assert second.computed == 1 and table(second.results) == table(first.results)


def test_weights_that_were_exchanged_are_noticed(one, tmp_path):
    run(one, tmp_path)
    run({**one, "seeds": [5]}, tmp_path)
    (mine,) = (tmp_path / "runs").glob("*seed1*")
    (theirs,) = (tmp_path / "runs").glob("*seed5*")
    (mine / MODEL).write_bytes((theirs / MODEL).read_bytes())
    with pytest.raises(CheckpointError, match="not those that were trained"):
        run(one, tmp_path)


def test_an_attack_that_is_wrong_is_refused_before_any_work(tiny, tmp_path):
    tiny["cells"]["bad"] = {"attack": "pgd:steps=2,step_size=0.05,no_such=3"}
    with pytest.raises(ConfigError, match="no_such"):
        run(tiny, tmp_path)
    assert not Store(tmp_path).events()


def test_a_failure_is_told_and_the_rest_is_done(tiny, tmp_path):
    tiny["cells"]["radius"] = {"certify": {"n": 50, "n0": 10, "method": "first_noise"}, "limit": 4}
    found = run(tiny, tmp_path)
    assert sorted(found.failures) == ["pgd_at, seed 1: radius", "pgd_at, seed 2: radius"]
    assert all("noise" in text for text in found.failures.values())
    assert found.results.missing == 2 and not found.complete


def test_a_training_that_fails_takes_nothing_else_along(tiny, tmp_path):
    tiny["runs"]["all"] = {"defense": ["learn2perturb", "pgd_at"]}
    tiny["runs"]["broken"] = {"defense": "none", "lr": 1e30}
    found = run(tiny, tmp_path)
    assert [title.partition(",")[0] for title in found.failures] == ["train broken", "train broken"]
    assert sum(answer.record is not None for answer in found.results.answers) == 8


def test_networks_that_are_trained_elsewhere(one, tmp_path):
    run(one, tmp_path)
    (folder,) = (tmp_path / "runs").glob("*")
    given = {**one, "seeds": None, "runs": {"theirs": {"weights": str(folder / MODEL)}}, "train": {}}
    given.pop("seeds")
    found = run(given, tmp_path)
    assert found.complete and found.computed == 0, "the same weights, asked the same: nothing is computed"


def test_weights_that_are_missing_are_refused_before_any_work(one, tmp_path):
    given = {**one, "runs": {"all": {"defense": "pgd_at"}, "theirs": {"weights": "no/where"}}}
    with pytest.raises(Exception, match="no/where"):
        run(given, tmp_path)
    assert not Store(tmp_path).events()


def test_what_another_process_holds_is_waited_for(one, tmp_path):
    ledger = Ledger(build_study("tiny", one), Store(tmp_path))
    key = ledger.address(ledger.study.runs[0])
    hold = (
        "import time\nfrom learn2perturb.experiments.store import Store\n"
        f"with Store({str(tmp_path)!r}).held({key!r}):\n print('held', flush=True)\n time.sleep(4)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "held"
        began = time.monotonic()
        found = run(one, tmp_path)
    assert found.complete and time.monotonic() - began > 1


def test_time_that_is_up_stops_at_a_checkpoint_and_goes_on(one, tmp_path, monkeypatch):
    one["train"]["epochs"] = 400
    monkeypatch.setattr("learn2perturb.experiments.studying._TOO_LATE", 0.01)
    found = run(one, tmp_path, minutes=2 / 60)
    assert not found.complete and not found.failures
    (folder,) = (tmp_path / "runs").glob("*")
    assert list((folder / "checkpoints").glob("*")), "it saved"
    assert [event["what"] for event in Store(tmp_path).events()] == ["begun", "stopped"]


def test_ctrl_c_is_the_users(one, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "_train", stopped)
    with pytest.raises(Interrupted, match="what is done is in"):
        run(one, tmp_path)


def test_a_store_that_is_a_file_is_refused(one, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run(one, tmp_path / "file")


@pytest.mark.parametrize("settings", [{"engine": "cloud"}, {"jobs": 0}, {"address": "auto"}, {"cpus": 0.0}], ids=str)
def test_placing_is_checked(settings):
    with pytest.raises(ConfigError):
        Placing(**settings)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_is_named(one, tmp_path, monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"learn2perturb\[cluster\]"):
        run(one, tmp_path, placing=Placing(engine))


@pytest.mark.timeout(500)
def test_processes_give_the_same_table(tiny, tmp_path):
    alone = run(tiny, tmp_path / "alone")
    both = run(tiny, tmp_path / "both", placing=Placing(jobs=2))
    assert both.complete and table(both.results) == table(alone.results)
    assert set(ended(tmp_path / "both").values()) == {1}
    assert len({event["process"] for event in Store(tmp_path / "both").events()}) == 2


@pytest.mark.timeout(500)
def test_two_studies_at_once_share_the_work(tiny, tmp_path):
    tiny["train"]["epochs"] = 8
    with start(tiny, tmp_path / "store") as process:
        while not Store(tmp_path / "store").events() and process.poll() is None:
            time.sleep(0.05)
        found = run(tiny, tmp_path / "store")
        assert process.wait() == 0
    assert found.complete and set(ended(tmp_path / "store").values()) == {1}


@pytest.mark.slow  # a minute of processor time; twenty kills of the whole are in test_study_engines.py
@pytest.mark.timeout(500)  # processes start slowly on a machine that is busy
def test_a_worker_that_is_killed_costs_nothing(tiny, tmp_path):
    """Of two workers the one that trains is killed by SIGKILL; the study ends complete, equal, nothing twice."""
    tiny["train"]["epochs"] = 12
    alone = run(tiny, tmp_path / "alone")
    with start(tiny, tmp_path / "store", '{"jobs": 2}') as process:
        os.kill(training_worker(tmp_path / "store", process), signal.SIGKILL)
        assert process.wait() == 0
    found = run(tiny, tmp_path / "store")
    assert found.computed == 0 and found.complete and table(found.results) == table(alone.results)
    assert set(ended(tmp_path / "store").values()) == {1}


@pytest.mark.parametrize("kind", ["train", "cell"])
def test_a_worker_that_reads_other_data_does_not_answer_for_them(one, tmp_path, monkeypatch, kind):
    """As on a node whose data_dir holds other images: what comes of it must not stand under the study's address."""
    run(one, tmp_path)
    whole = build_study("tiny", one)
    ledger = Ledger(whole, Store(tmp_path))
    (trained,) = whole.runs
    task = ledger.training(trained) if kind == "train" else ledger.task(next(iter(whole.all_pairs())))
    task.path.unlink() if kind == "cell" else (task.path / MODEL).unlink()
    monkeypatch.setattr(tasks, "data_address", lambda *of: "other")
    outcome = tasks.perform(tmp_path, task)
    assert outcome.state == tasks.FAILED and "compare data_dir" in outcome.message
    assert not (task.path.exists() if kind == "cell" else (task.path / MODEL).exists())


def test_options_of_a_data_set_are_not_those_of_another():
    trained = {"dataset": "folder", "dataset_options": {"size": 8}}
    assert tasks.options_of(trained, "folder") == {"size": 8}
    assert tasks.options_of(trained, "digits") == {}
