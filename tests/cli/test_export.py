"""``export``: what is written loads again, and says no more than the records do."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import learn2perturb as l2p
from learn2perturb.attacks import AutoAttack
from learn2perturb.cli.main import main
from learn2perturb.data import load_data
from learn2perturb.evaluation import Evaluation
from learn2perturb.evaluation.robustbench import FIELDS, model_info
from learn2perturb.records import plain

TRAIN = ("--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu", "--epochs=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run with records of all test images, of 20 of them, and of validation images."""
    folder = tmp_path_factory.mktemp("export") / "mine"
    settings = ("--limit=64", "--batch-size=32", "--monitor=0", "--attack-steps=1", "--eps=8/255", "--validation=0.5")
    assert main(["train", *TRAIN, *settings, "--data-dir", "/secret", "--out", str(folder)]) == 0
    common = ["--attacks=fgsm", "--draws=2"]
    assert main(["evaluate", str(folder), *common]) == 0
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
    record = whole(run)
    assert tuple(info) == FIELDS
    assert info["clean_acc"] == f"{100 * record.row('clean').accuracy:.2f}"
    assert info["dataset"] == "digits"
    assert info["eps"] == "8/255"
    assert info["name"] == "Learn2Perturb"
    assert info["authors"] == "Jeddi et al."
    nulls = [key for key in FIELDS if info[key] is None]
    assert nulls == ["link", "venue", "reported", "autoattack_acc", "external", "unreliable"]
    assert f"on {len(load_data('digits', 'test'))} images" in info["footnote"]
    assert "Randomised" in info["footnote"]
    said = capsys.readouterr().out
    assert all(f"note: {key} is null: " in said for key in nulls)
    assert "RobustBench wants deterministic networks" in said

    _, path = exported(run, tmp_path / "plain", "--without-noise")
    info = json.loads(path.read_text())
    assert info["clean_acc"] == f"{100 * record.row('clean', noise=False).accuracy:.2f}"
    assert "Randomised" not in info["footnote"]
    assert "deterministic" not in capsys.readouterr().out


def whole(run):
    """The record of all test images."""
    found = [Evaluation.load(path) for path in (run / "evaluation").glob("test-*.json")]
    return next(record for record in found if record.metadata["split"] == "test")


HEADER = {"dataset": "digits", "config": {"eps": 8 / 255}, "noise": [{}]}


@pytest.fixture(scope="module")
def attacked(run):
    """A record of all test images with a row such as AutoAttack's own."""
    record = whole(run)
    auto = dataclasses.replace(
        record.row("fgsm"), attack="autoattack", attack_type="AutoAttack", parameters=plain(AutoAttack())
    )
    return dataclasses.replace(record, rows=(*record.rows, auto))


def filled(record):
    return model_info(HEADER, [record], weights={record.metadata["weights"]: True})


def test_autoattack_in_full_fills_its_field(attacked):
    found = filled(attacked)
    assert found.info["autoattack_acc"] == f"{100 * attacked.row('autoattack').accuracy:.2f}"
    assert "AutoAttack standard, linf 8/255" in found.info["footnote"]
    assert not any("autoattack_acc" in note for note in found.notes)
    assert model_info({}, []).info["dataset"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eps": 4 / 255}, "eps is 4/255, not 8/255"),
        ({"eps": None}, "eps is not known"),
        ({"norm": "l2"}, "norm is l2, not linf"),
        ({"version": "rand"}, "version is 'rand', not 'standard'"),
        ({"steps": 50}, "steps is 50, not 100"),
        ({"targets": 3}, "targets is 3, not 9"),
        ({"queries": 1000}, "queries is 1000, not 5000"),
        ({"parameters": plain(AutoAttack(draws=1))}, "draws is 1, not 20"),
        ({"attack_type": "APGD"}, "no record has a row of AutoAttack"),
        ({"noise": False}, "noise was off"),
        ({"predictor": "vote"}, "predictor vote, not single"),
        ({"parameters": {}}, "norm is None"),
    ],
)
def test_another_attack_fills_nothing_and_says_why(changes, reason, attacked):
    row = attacked.rows[-1]
    own = {item.name for item in dataclasses.fields(row)}
    row = dataclasses.replace(
        row,
        **{"parameters": row.parameters | {key: value for key, value in changes.items() if key not in own}}
        | {key: value for key, value in changes.items() if key in own},
    )
    found = filled(dataclasses.replace(attacked, rows=(*attacked.rows[:-1], row)))
    assert found.info["autoattack_acc"] is None
    assert found.info["clean_acc"] is not None
    assert any(note.startswith("autoattack_acc is null") and reason in note for note in found.notes), found.notes


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"weights": "0123456789abcdef"}, "of other weights (0123456789abcdef"),
        ({"weights": None}, "no hash of the weights"),
        ({"data": "cifar10"}, "of cifar10, not of digits"),
        ({"split": "train"}, "not known to be all test images of digits"),
        ({"split": None}, "not known to be all test images of digits"),
    ],
)
def test_a_record_of_something_else_fills_nothing_and_says_why(metadata, reason, attacked):
    own = attacked.metadata["weights"]
    record = dataclasses.replace(attacked, metadata=attacked.metadata | metadata)
    found = model_info(HEADER, [record], weights={own: True})
    for field in ("clean_acc", "autoattack_acc"):
        assert found.info[field] is None
        assert any(note.startswith(f"{field} is null") and reason in note for note in found.notes), found.notes


def test_low_precision_and_fewer_images_than_cifar_has_fill_nothing(attacked):
    own = {attacked.metadata["weights"]: True}
    fast = dataclasses.replace(attacked, metadata=attacked.metadata | {"engine": "fast"})
    found = model_info(HEADER, [fast], weights=own)
    assert found.info["autoattack_acc"] is None
    assert found.info["clean_acc"] is not None
    cifar = dataclasses.replace(attacked, metadata=attacked.metadata | {"data": "cifar10"})
    found = model_info(HEADER | {"dataset": "cifar10"}, [cifar], weights=own)
    assert found.info["clean_acc"] is None
    assert any("the 10,000 test images of cifar10" in note for note in found.notes)


def test_an_ensemble_of_fewer_passes_and_other_images_fill_nothing(attacked):
    own = {attacked.metadata["weights"]: True}
    rows = tuple(dataclasses.replace(row, predictor="vote", members=5) for row in attacked.rows)
    vote, header = dataclasses.replace(attacked, rows=rows), HEADER | {"predictor": "vote"}
    assert model_info(header | {"members": 5}, [vote], weights=own).info["number_forward_passes"] == 5
    found = model_info(header | {"members": 10}, [vote], weights=own)
    assert found.info["clean_acc"] is found.info["autoattack_acc"] is None
    assert any("of 5 passes an answer, not 10" in note for note in found.notes)

    clean, rest = attacked.rows[:1], attacked.rows[1:]
    others = dataclasses.replace(attacked, rows=clean, metadata=attacked.metadata | {"images": "0123456789abcdef"})
    found = model_info(HEADER, [others, dataclasses.replace(attacked, rows=rest)], weights=own)
    assert found.info["autoattack_acc"] is not None
    assert found.info["clean_acc"] is None
    assert any("of other images than the attacked ones" in note for note in found.notes)


def test_a_limit_another_split_and_another_run_fill_nothing(run, tmp_path, capsys):
    records = {path: Evaluation.load(path) for path in (run / "evaluation").glob("*.json")}
    parts = [str(path) for path, record in records.items() if record.metadata["split"] != "test"]
    assert len(parts) == 2
    _, path = exported(run, tmp_path, *(word for part in parts for word in ("--evaluation", part)))
    assert json.loads(path.read_text())["clean_acc"] is None
    assert "it is of 20 images, not known to be all test images of digits" in capsys.readouterr().out

    other = tmp_path / "other" / "mine"
    settings = ("--limit=32", "--batch-size=32", "--monitor=0", "--attack-steps=1", "--eps=8/255", "--seed=1")
    assert main(["train", *TRAIN, *settings, "--out", str(other)]) == 0
    full = next(str(path) for path, record in records.items() if record.metadata["split"] == "test")
    _, path = exported(other, tmp_path / "two", "--evaluation", full)
    assert json.loads(path.read_text())["clean_acc"] is None
    assert "of other weights" in capsys.readouterr().out


def test_the_exported_plain_network_is_known_by_its_own_weights_too(run, tmp_path):
    path, info = exported(run, tmp_path, "--without-noise")
    before = json.loads(info.read_text())["clean_acc"]
    record = tmp_path / "plain.json"
    assert main(["evaluate", str(path), "--dataset=digits", "--attacks=none", "--out", str(record)]) == 0
    _, info = exported(run, tmp_path, "--without-noise", "--evaluation", str(record))
    assert json.loads(info.read_text())["clean_acc"] == before
    _, info = exported(run, tmp_path / "noisy", "--evaluation", str(record))
    assert json.loads(info.read_text())["clean_acc"] is None


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
        (["RUN", "--format", "onxx"], "unknown export format 'onxx': did you mean 'onnx'.*robustbench, safetensors"),
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
