"""``learn2perturb evaluate`` scores a run as its defense predicts, says so, and takes another predictor by name."""

from __future__ import annotations

import json

import pytest

from learn2perturb.cli.main import main

TRAIN = (
    "train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu",
    "--epochs=1", "--limit=64", "--monitor=0", "--attack_steps=1", "--tensorboard=false",
)  # fmt: skip
EVALUATE = ("--attacks=fgsm", "--draws=2", "--limit=5", "--no-noise-off", "--device=cpu", "--json")


def rows_of(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *words, *EVALUATE]) == 0
    found = json.loads(capsys.readouterr().out)
    return {(row["predictor"], row["members"]) for row in found["rows"]}, " ".join(found["notes"])


@pytest.fixture(scope="module")
def rse(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "rse")
    assert main([*TRAIN, "--defense=rse", "--out", folder]) == 0
    return folder


def test_a_run_is_scored_as_its_defense_predicts_and_told_so(rse, capsys):
    rows, notes = rows_of(capsys, rse)
    assert rows == {("mean_probability", 50)}
    assert "mean_probability of 50 passes, as the paper of rse predicts" in notes
    assert "--predictor single" in notes


def test_another_predictor_is_had_by_name(rse, capsys):
    assert rows_of(capsys, rse, "--predictor=single") == ({("single", 1)}, "")
    rows, notes = rows_of(capsys, rse, "--members=3")
    assert rows == {("mean_probability", 3)}
    assert "of 3 passes" in notes
    assert rows_of(capsys, rse, "--predictor=vote,single", "--members=3")[0] == {("vote", 3), ("single", 1)}


def test_a_defense_that_predicts_by_a_single_draw_is_scored_so(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main([*TRAIN, "--defense=learn2perturb", "--out", folder]) == 0
    assert rows_of(capsys, folder) == ({("single", 1)}, "")
