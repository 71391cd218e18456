"""The norm of a threat in training and evaluation: a size is of one norm, and is never used in another."""

from __future__ import annotations

import json

import pytest

from learn2perturb.cli.main import main
from learn2perturb.evaluation import Evaluation

TRAIN = ["train", "--model", "digits_cnn", "--dataset", "digits", "--recipe", "fast", "--epochs", "1", "--limit", "16",
         "--monitor", "0", "--tensorboard", "false", "--attack-steps", "1", "--defense", "pgd_at"]  # fmt: skip
JUDGE = ["--attacks", "fgsm,pgd20,square,cw", "--draws", "2", "--limit", "4", "--json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("norms") / "run"
    assert main([*TRAIN, "--norm", "l2", "--eps", "0.7", "--out", str(out)]) == 0
    return out


def rows(capsys):
    """Return attack -> norm and size of the rows of a record."""
    said = json.loads(capsys.readouterr().out)
    record = Evaluation.load(said["record"])
    attacks = {}
    for row in record.rows:
        own = row.parameters or {}
        attacks[row.attack] = (own.get("norm"), own.get("eps"), own.get("step_size"))
    return attacks, said["notes"]


def test_a_run_trained_in_l2_is_attacked_in_l2_at_its_size(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), *JUDGE]) == 0
    attacks, notes = rows(capsys)
    assert {attacks[name][:2] for name in ("fgsm", "pgd20", "square")} == {("l2", 0.7)}
    assert attacks["pgd20"][2] == pytest.approx(0.7 * 0.01 / (8 / 255))  # not the step of l_inf
    assert "attacks are in l2, the norm of the run's training; --norm linf attacks it in l_inf" in notes


def test_its_size_is_never_one_of_l_inf(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--norm", "linf", *JUDGE]) == 0
    attacks, _ = rows(capsys)
    assert {attacks[name][:2] for name in ("fgsm", "pgd20")} == {("linf", 8 / 255)}


def test_another_norm_needs_its_size(run, tmp_path, capsys):
    assert main([*TRAIN, "--norm", "l2", "--out", str(tmp_path / "new")]) == 2
    assert "norm is 'l2' and no eps is given" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--norm", "l3", *JUDGE]) == 2
    assert "norm is 'l3'; allowed: linf, l2" in capsys.readouterr().err
