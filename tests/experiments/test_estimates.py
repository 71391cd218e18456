"""What a plan says of time: measured in seconds, whatever the study; data are read once."""

from __future__ import annotations

import pytest
import yaml

from learn2perturb.experiments import estimates, studying
from learn2perturb.experiments.estimates import Estimates
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.spec import Study
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import read_study


@pytest.fixture
def study(tiny, tmp_path) -> Study:
    whole = {**tiny, "train": {**tiny["train"], "monitor": 10, "limit": None}, "evaluate": {"draws": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
    return read_study(str(tmp_path / "mine.yaml"))


def planned(study: Study, tmp_path, monkeypatch) -> tuple[dict[str, float], list[int], list[str]]:
    """Return the seconds of each training and cell, the epochs of what was trained for them, and the sets read."""
    ledger = Ledger(study, Store(tmp_path / "store"))
    epochs, read = [], []

    def train(config, **more):
        epochs.append(config.epochs)
        return learned(config, **more)

    def load(name, split, **more):
        read.append(split)
        return loaded(name, split, **more)

    learned, loaded = estimates.train, estimates.load_data
    monkeypatch.setattr(estimates, "train", train)
    monkeypatch.setattr(estimates, "load_data", load)
    found = Estimates(ledger, "cpu")
    seconds = {run.title: found.training(run) for run in study.runs}
    seconds |= {pair.title: found.cell(pair) for pair in study.all_pairs()}
    return seconds, epochs, read


def test_each_kind_is_measured_once_and_each_split_read_once(study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 1e6)  # whatever else this machine does
    seconds, epochs, read = planned(study, tmp_path, monkeypatch)
    assert len(seconds) == 4 + 8 and min(seconds.values()) > 0
    assert epochs == [0, 2, 0, 2], "two defenses: each built, then two steps of each"
    assert sorted(read) == ["test", "train"]


def test_where_steps_would_take_long_none_is_trained(study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 0.0)
    seconds, epochs, _ = planned(study, tmp_path, monkeypatch)
    assert epochs == [0, 0]
    assert min(seconds.values()) > 0


def test_a_step_is_so_many_passes_as_that_of_the_same_training(study, tmp_path, monkeypatch):
    config = study.runs[0].config
    found = Estimates(Ledger(study, Store(tmp_path / "store")), "cpu")
    defense, _, *rest = estimates._kind(config)
    other = (defense, "resnet20", *rest)
    found._paces[other] = estimates.Pace(step=700.0, forward=1.0, both=100.0)
    found._left = 0.0
    pace = found.pace(config)
    assert pace.step == pytest.approx(7 * pace.both)
    assert estimates._passes_of_a_step(config.closed()) == 2 + 2


def test_what_is_to_begin_is_guessed_before_it_begins(study, tmp_path, monkeypatch):
    """Guessed once it was done, a training had nothing left, and the rest seemed to take hundreds of times longer."""
    begun = []

    def training(self, run) -> float:
        begun.append(self.ledger.epochs(run))
        return 1000.0

    monkeypatch.setattr(Estimates, "training", training)
    monkeypatch.setattr(Estimates, "cell", lambda self, pair: 1.0)
    studying.study(study, store=tmp_path / "store")
    assert begun == [0] * len(study.runs)
