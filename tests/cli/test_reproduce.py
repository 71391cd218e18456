"""``learn2perturb reproduce`` on networks that are trained already: the cells of a table, once each."""

from __future__ import annotations

import json

import pytest

from learn2perturb import build_model, perturb
from learn2perturb.cli.main import main
from learn2perturb.cli.reproduce import with_model
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import build_study, read_source
from learn2perturb.runs.checkpoint import model_bytes

TINY = {
    "table1": ["--set", "cells.pgd.attack.steps=1"],
    "table3": ["--set", "steps=2", "--set", "search_steps=1"],
    "table5": ["--set", "population=4", "--set", "generations=1"],
    "table6": ["--set", "steps=1"],
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two untrained networks, the second with noise, said to be of the paper's defenses."""
    monkeypatch.chdir(tmp_path)
    shape = (1, 8, 8)
    plain = build_model("digits_cnn", input_shape=shape)
    noisy = perturb(build_model("digits_cnn", input_shape=shape), input_shape=shape)
    for name, model in (("pgd_at", plain), ("learn2perturb", noisy)):
        facts = {"defense": name, "dataset": "digits", "input_shape": shape, "config": {"eps": 0.1, "seed": 1}}
        (tmp_path / f"{name}.safetensors").write_bytes(model_bytes(model, facts))
    return ["pgd_at.safetensors", "learn2perturb.safetensors"]


def view(folder):
    return json.loads((folder / "table.json").read_text())


@pytest.mark.parametrize(("table", "cells"), [("table1", 6), ("table3", 15), ("table5", 6), ("table6", 4)])
def test_every_cell_once_and_never_twice(table, cells, runs, tmp_path, capsys):
    words = ["reproduce", table, *runs, *TINY[table], "--limit", "6", "--draws", "2", "--out", "there", "--store", "st"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    ended = [event for event in Store("st").events() if event["what"] == "ended"]
    assert len(ended) == len({event["address"] for event in ended}) == cells
    assert "pgd_at" in printed and "learn2perturb" in printed
    assert all(cell["paper"] is None for cell in view(tmp_path / "there")["cells"]), "the data are not the paper's"
    assert main(words) == 0
    assert len([event for event in Store("st").events() if event["what"] == "ended"]) == cells


def test_images_of_one_run_are_tried_on_the_other(runs, tmp_path):
    words = ["reproduce", "table6", *runs, *TINY["table6"], "--limit", "6", "--draws", "1", "--out", "there"]
    assert main(words) == 0
    assert {tuple(cell["row"]) for cell in view(tmp_path / "there")["cells"]} == {("pgd_at",), ("learn2perturb",)}


def test_a_factory_is_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_table5.py").write_text(
        "import torch\nimport learn2perturb as l\n\n"
        "def net():\n    torch.manual_seed(0)\n    return l.build_model('digits_cnn', input_shape=(1, 8, 8))\n"
    )
    words = ["reproduce", "table5", "mine_for_table5:net", "--dataset", "digits", "--limit", "4", "--out", "there"]
    words += TINY["table5"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 0
    assert main(words) == 0
    assert "mine_for_table5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table9"], "unknown table 'table9'"),
        (["table5", "nowhere"], "nowhere does not exist"),
        (["table5", "pgd_at.safetensors", "--set", "generation=3"], "no attack of this study has a setting generation"),
        (["table5", "pgd_at.safetensors", "--set", "steps"], "--set 'steps' is no KEY=VALUE"),
        (["table6", "pgd_at.safetensors"], "at least 2 runs"),
        (["table5", "pgd_at.safetensors", "pgd_at.safetensors"], "is given twice"),
        (["table5", "pgd_at.safetensors", "--level", "smoke"], "--level says how networks are trained"),
        (["table5", "--level", "smok"], "smoke"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(runs, capsys, words, said):
    assert main(["reproduce", *words]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and len(printed.splitlines()) == 1


def test_any_network_can_be_trained_in_place_of_the_papers(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for table in ("table1", "table4", "table6"):
        name, source = read_source(table)
        for level in source["levels"]:
            study = build_study(name, with_model(source, "digits_cnn"), level)
            assert {run.config.model for run in study.runs} == {"digits_cnn"}, level
            assert all("shortcut" not in run.config.model_options for run in study.runs)
            assert len(study.runs) >= 3
    tiny = ["--set", "train.dataset=digits", "--set", "train.limit=16", "--set", "train.engine=plain", "--limit", "4"]
    small = ["--set", "only.defense=pgd_at", "--set", "seeds=[1]", "--out", "there", "--store", "st"]
    words = ["--model", "digits_cnn", "--level", "smoke", *tiny, *small, "--set", "cells.pgd.attack.steps=1"]
    assert main(["reproduce", "table1", *words]) == 0
    assert {cell["row"][0] for cell in view(tmp_path / "there")["cells"]} == {"digits_cnn"}
    assert all(cell["paper"] is None for cell in view(tmp_path / "there")["cells"])
    for words, said in (
        (["--model", "resnet21"], "unknown network 'resnet21'"),
        (["run", "--model", "resnet20"], "--model says what is trained, and RUNs are trained"),
    ):
        assert main(["reproduce", "table1", *words]) == 2
        assert said in capsys.readouterr().err
