"""``export``: what is written loads again, and says no more than the records do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import learn2perturb as l2p
from learn2perturb.cli.main import main
from learn2perturb.evaluation import Evaluation
from learn2perturb.evaluation.robustbench import FIELDS, model_info

TRAIN = ("--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu", "--epochs=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run with a record of 20 test images and one of validation images."""
    folder = tmp_path_factory.mktemp("export") / "mine"
    settings = ("--limit=64", "--batch-size=32", "--monitor=0", "--attack-steps=1", "--eps=8/255", "--validation=0.5")
    assert main(["train", *TRAIN, *settings, "--data-dir", "/secret", "--out", str(folder)]) == 0
    common = ["--attacks=fgsm", "--draws=2"]
    assert main(["evaluate", str(folder), "--limit=20", *common]) == 0
    assert main(["evaluate", str(folder), "--limit=30", "--split=validation", *common]) == 0
    return folder


def exported(run, out, *words):
    assert main(["export", str(run), "--out", str(out), *words]) == 0
    return out / "mine.safetensors", out / "mine.json"


def test_the_state_dict_is_that_of_the_network_and_loads_here_too(run, tmp_path):
    path, _ = exported(run, tmp_path, "--format=safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.safetensors"]
    state, original = load_file(path), l2p.load(run).state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[key], original[key]) for key in original)
    assert l2p.noise_sites(l2p.load(path)) == l2p.noise_sites(l2p.load(run))
    assert b"/secret" not in path.read_bytes()


def test_without_noise_it_is_the_state_dict_of_the_plain_network(run, tmp_path):
    path, _ = exported(run, tmp_path, "--without-noise")
    plain = l2p.build_model("digits_cnn", input_shape=(1, 8, 8))
    plain.load_state_dict(load_file(path), strict=True)
    assert l2p.noise_sites(l2p.load(path)) == []


def test_robustbench_gets_what_the_records_say_and_null_for_the_rest(run, tmp_path, capsys):
    _, path = exported(run, tmp_path)
    info = json.loads(path.read_text())
    record = Evaluation.load(next((run / "evaluation").glob("test-*.json")))
    assert tuple(info) == FIELDS
    assert info["clean_acc"] == f"{100 * record.row('clean').accuracy:.2f}"
    assert info["dataset"] == "digits"
    assert info["eps"] == "8/255"
    assert info["name"] == "Learn2Perturb"
    assert info["authors"] == "Jeddi et al."
    assert [key for key in FIELDS if info[key] is None] == [
        "link", "venue", "reported", "autoattack_acc", "external", "unreliable",
    ]  # fmt: skip
    assert "on 20 images" in info["footnote"]
    assert "Randomised" in info["footnote"]
    assert "autoattack_acc" in capsys.readouterr().out

    _, path = exported(run, tmp_path / "plain", "--without-noise")
    info = json.loads(path.read_text())
    assert info["clean_acc"] == f"{100 * record.row('clean', noise=False).accuracy:.2f}"
    assert "Randomised" not in info["footnote"]


def test_autoattack_fills_its_field_at_the_size_of_the_run_only(run):
    import dataclasses

    record = Evaluation.load(next((run / "evaluation").glob("test-*.json")))
    row = record.row("fgsm")

    def info(eps):
        auto = dataclasses.replace(row, attack="autoattack", attack_type="AutoAttack", eps=eps)
        header = {"dataset": "digits", "config": {"eps": 8 / 255}, "noise": [{}]}
        return model_info(header, [dataclasses.replace(record, rows=(auto,))])

    assert info(8 / 255)["autoattack_acc"] == f"{100 * row.accuracy:.2f}"
    assert info(4 / 255)["autoattack_acc"] is None
    assert model_info({}, [])["dataset"] is None


def test_a_damaged_record_is_left_out_and_said(run, tmp_path, capsys):
    bad = run / "evaluation" / "bad.json"
    bad.write_text("{")
    try:
        exported(run, tmp_path, "--format=robustbench", "--json")
        printed = json.loads(capsys.readouterr().out)
    finally:
        bad.unlink()
    assert any("bad.json" in note for note in printed["notes"])
    assert printed["files"] == {"robustbench": str(tmp_path / "mine.json")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "give a run folder"),
        (["RUN", "--format", "onnx"], "unknown export format 'onnx'.*robustbench, safetensors"),
        (["RUN", "--evaluation", "nowhere.json"], "check the path"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, run, capsys, tmp_path):
    import re

    assert main(["export", *[word.replace("RUN", str(run)) for word in words], "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(message, error[0])
    assert list(tmp_path.iterdir()) == []
