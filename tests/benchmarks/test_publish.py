"""A trained network in the zoo: loaded by name, its card with every number; and trainings of before, adopted."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace

import pytest
import yaml

import learn2perturb as l2p
from benchmarks import adopt, publish
from learn2perturb import zoo
from learn2perturb.cli.main import main
from learn2perturb.data import load_data
from learn2perturb.diagnosis import diagnose
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import Evaluation
from learn2perturb.experiments.study_file import read_study
from learn2perturb.training import TrainConfig, train
from tests.experiments.conftest import TINY
from tests.laboratories.fixtures import TINY as BUDGET

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def study_file(tmp_path):
    source = {**TINY, "seeds": [1], "runs": {"it": {"defense": ["learn2perturb"]}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(source))
    return tmp_path / "tiny.yaml"


def test_a_published_network_is_loaded_by_name_with_a_card_that_has_every_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = pathlib.Path("runs/fits")
    config = TrainConfig.from_dict({**TINY["train"], "defense": "learn2perturb", "epochs": 1})
    trained = train(config, out=run, progress=False)
    words = [str(run), "mine", "--zoo", str(tmp_path / "zoo")]
    assert publish.main(words) == 2
    assert "no attack was run on runs/fits" in capsys.readouterr().err
    asked = [
        "evaluate",
        str(run),
        "--limit=20",
        "--draws=2",
        "--attack=pgd:steps=2,step_size=0.05",
        "--out=runs/fits/evaluation/it.json",
    ]
    assert main(asked) == 0
    assert publish.main(words) == 2
    assert "has no diagnosis" in capsys.readouterr().err
    found = diagnose(trained.model, load_data("digits", "test", limit=6), budget=BUDGET, eps=0.1, engine="plain")
    told = {"run": True, "command": ["learn2perturb", "diagnose", str(run), "--source", f"pgd_at={run}"]}
    replace(found, metadata=found.metadata | told).save(run / "evaluation" / "diagnosis.json")
    assert publish.main(words) == 0
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    assert fingerprint_of_weights(l2p.load("zoo:mine")) == fingerprint_of_weights(trained.model)
    card, places = zoo.card("mine"), sorted(zoo.folder("mine").glob("evaluation/*.json"))
    assert len(places) == 2
    (record,) = [Evaluation.load(path) for path in places if path.name == "it.json"]
    for row in record.rows:
        assert f"{100 * row.accuracy:.2f}" in card and row.label in card
    assert record.metadata["model"] == "zoo:mine"
    assert record.metadata["command"][:3] == ["learn2perturb", "evaluate", "zoo:mine"]
    assert "learn2perturb diagnose zoo:mine" in card and "device:" not in card and str(run) not in card
    monkeypatch.setattr(zoo, "MOST_BYTES", 1000)
    assert publish.main(words) == 2
    assert "takes at most 1,000" in capsys.readouterr().err


def test_a_record_of_other_weights_is_not_published(tmp_path, capsys):
    runs = [tmp_path / "runs" / f"seed{seed}" for seed in (1, 2)]
    for seed, run in enumerate(runs):
        train(
            TrainConfig.from_dict({**TINY["train"], "defense": "none", "epochs": 1, "seed": seed}),
            out=run,
            progress=False,
        )
        assert main(["evaluate", str(run), "--limit=10", "--attacks=fgsm"]) == 0
    capsys.readouterr()
    words = [str(runs[0]), "mine", "--zoo", str(tmp_path / "zoo")]
    assert publish.main([*words, "--records", str(runs[1] / "evaluation")]) == 2
    assert "is of other weights than" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


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


def test_the_page_of_the_zoo_has_the_numbers_of_its_records():
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert publish.with_table(page) == page, "run: python -m benchmarks.publish --table docs/zoo.md"
    assert all(f"| {name} |" in page for name in zoo.names())
    with pytest.raises(ConfigError, match="no place for the table"):
        publish.with_table("# A page")
