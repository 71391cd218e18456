"""What was computed is not lost: places are tried first, a record that cannot be written is still printed."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from learn2perturb.attacks.base import Attack
from learn2perturb.certification import Certification
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import Diagnosis, budget
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation
from learn2perturb.records import Saved, check_writable

MADE = (
    "--dataset=digits --model=digits_cnn --recipe=fast --engine=plain --device=cpu --epochs=1 --limit=128 --monitor=0"
)
VERBS = {
    "evaluate": (["--attacks=fgsm", "--limit=20", "--draws=2"], Evaluation, "accuracy %"),
    "certify": (["--n0=5", "--n=20", "--limit=4"], Certification, "certified accuracy %"),
    "diagnose": (["--limit=6"], Diagnosis, "lowest accuracy"),
}


TINY = dataclasses.replace(
    budget.QUICK, images=6, some=6, scorings=2, eot=2, sweep_eot=1, steps=4, unbounded_steps=5, samples=2,
    finalists=1, judge_draws=2, draw_curve=(1, 4), step_curve=(2, 4), restarts=1, square_queries=5, square_draws=1,
    slope_images=2, slope_repeats=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving") / "run"
    assert main(["train", *MADE.split(), "--attack-steps=1", "--out", str(folder)]) == 0
    return folder


def nothing_can_be_made(monkeypatch, folder):
    """Make ``folder`` unwritable, for the administrator too."""
    real = open

    def refusing(path, mode="r", *more, **named):
        if "x" in mode and str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *more, **named)

    monkeypatch.setattr("builtins.open", refusing)


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    verb, trained, tmp_path, capsys, monkeypatch
):
    nothing_can_be_made(monkeypatch, tmp_path)
    monkeypatch.setattr(Attack, "run", lambda *_: pytest.fail("an attack was run"))
    monkeypatch.setattr("learn2perturb.certification.certifying.votes_of", lambda *_: pytest.fail("votes were counted"))
    assert main([verb, str(trained), *VERBS[verb][0], "--device=cpu", "--out", str(tmp_path / "record.json")]) == 2
    assert "Permission denied; nothing was computed" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_record_that_cannot_be_written_is_printed_all_the_same(verb, words, trained, tmp_path, capsys, monkeypatch):
    options, kind, heading = VERBS[verb]
    monkeypatch.setitem(budget.BUDGETS, "quick", TINY)
    full = CheckpointError("cannot write it: No space left on device; free the disk")
    real = Saved.save
    monkeypatch.setattr(
        Saved, "save", lambda self, *a, **k: _raise(full) if type(self) is kind else real(self, *a, **k)
    )
    out = tmp_path / "record.json"
    assert main([verb, str(trained), *options, "--device=cpu", "--out", str(out), *words]) == 1
    said = capsys.readouterr()
    assert next(line for line in said.err.splitlines() if "No space left" in line).startswith("learn2perturb: error: ")
    assert not out.exists()
    if words:
        assert json.loads(said.out)["record"] is None
    else:
        assert heading in said.out.lower()
        assert "record:" not in said.out


def _raise(error):
    raise error


def test_trying_a_place_leaves_nothing_and_harms_nothing(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("mine")
    check_writable(path)
    check_writable(tmp_path / "new" / "record.json")
    assert path.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["new", "record.json"]
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(CheckpointError, match="nothing was computed"):
        check_writable(path / "below")
