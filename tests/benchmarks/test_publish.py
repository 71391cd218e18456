"""A network of a study in the zoo: loaded by name, its card with every number; and trainings of before, adopted."""

from __future__ import annotations

import sys

import pytest
import yaml

import learn2perturb as l2p
from benchmarks import adopt, publish
from learn2perturb import zoo
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import read_study
from learn2perturb.training import TrainConfig, train
from tests.experiments.conftest import TINY


@pytest.fixture
def study_file(tmp_path):
    source = {**TINY, "seeds": [1], "runs": {"it": {"defense": ["learn2perturb"]}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(source))
    return tmp_path / "tiny.yaml"


def test_a_published_network_is_loaded_by_name_with_a_card_that_has_every_number(
    study_file, tmp_path, monkeypatch, capsys
):
    words = ["learn2perturb, seed 1", "mine", "--study", str(study_file), "--store", str(tmp_path / "store")]
    words += ["--zoo", str(tmp_path / "zoo")]
    assert publish.main(words) == 2
    assert "is not trained" in capsys.readouterr().err
    found = l2p.study(study_file, store=tmp_path / "store", progress=False)
    assert publish.main(words) == 0
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    weights = Ledger(read_study(study_file), Store(tmp_path / "store")).network(found.results.study.runs[0]).weights
    assert fingerprint_of_weights(l2p.load("zoo:mine")) == weights
    card = zoo.card("mine")
    for answer in found.results.answers:
        for row in answer.record.rows:
            assert f"{100 * row.accuracy:.2f}" in card and row.label in card
    assert "learn2perturb reproduce tiny zoo:mine" in card and "device:" not in card
    record = found.results.answers[1].path
    record.unlink()
    assert publish.main(words) == 2
    assert "lacks pgd" in capsys.readouterr().err
    assert publish.main(["that", "mine", *words[2:]]) == 2


def test_trainings_of_before_are_adopted(study_file, tmp_path, monkeypatch, capsys):
    (run,) = read_study(study_file).runs
    train(run.config, out=tmp_path / "old" / "runs" / "fits", progress=False)
    other = TrainConfig.from_dict({**run.config.to_dict(), "seed": 9})
    train(other, out=tmp_path / "old" / "runs" / "other", progress=False)
    store = tmp_path / "store"
    words = ["adopt", str(tmp_path / "old"), "--study", str(study_file), "--store", str(store)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr("benchmarks.adopt.read_study", lambda name, level: read_study(name))
    adopt.main()
    said = capsys.readouterr().out
    assert "fits: taken" in said and "other: the study trains nothing of its settings" in said
    found = l2p.study(study_file, store=store, progress=False)
    assert found.complete and found.computed == 2, "only its records are computed"
    adopt.main()
    assert "fits: is there" in capsys.readouterr().out
