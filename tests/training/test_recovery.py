"""Damaged run folders: a whole checkpoint serves, what is lost is said, and nothing damaged is resumed quietly."""

from __future__ import annotations

import shutil

import pytest
import torch

from learn2perturb.errors import CheckpointError
from learn2perturb.runs import load
from learn2perturb.runs.checkpoint import read_model, read_resume
from learn2perturb.runs.files import checkpoints
from learn2perturb.training import train
from tests.training.test_resume import small, snapshot, state_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(), out=run, progress=False)
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def flipped(path, value):
    """Flip one bit of the stored bytes of a tensor."""
    content, stored = bytearray(path.read_bytes()), value.contiguous().view(torch.uint8).numpy().tobytes()
    at = bytes(content).find(stored[:64])
    assert at > 0
    content[at + 2] ^= 1
    path.write_bytes(content)


def damage(checkpoint, kind):
    path = checkpoint / ("model.safetensors" if kind == "weight" else "resume.pt")
    if kind == "weight":
        flipped(path, next(value for value in read_model(path)[0].values() if value.numel() > 20))
    elif kind == "momentum":
        slots = read_resume(checkpoint)["optimizers"]["weights"]["state"].values()
        flipped(path, next(s["momentum_buffer"] for s in slots if s["momentum_buffer"].numel() > 20))
    else:
        path.write_bytes({"empty": b"", "half": path.read_bytes()[:900], "text": b"no pickle at all"}[kind])


@pytest.mark.parametrize("kind", ["weight", "momentum", "empty", "half", "text"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(run, whole, kind, capsys):
    newest = checkpoints(run)[-1]
    damage(newest, kind)
    train(small(), out=run, progress=False)
    assert "going on from the one before" in "".join(capsys.readouterr())
    name, weights, momenta, lines = state_of(run)
    expected_name, expected_weights, expected_momenta, expected_lines = state_of(whole)
    assert name == expected_name == newest.name
    assert lines == expected_lines
    for ours, theirs in ((weights, expected_weights), (momenta, expected_momenta)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert newest.with_name(f"{newest.name}.damaged").is_dir()


def test_without_a_whole_checkpoint_one_line_says_the_fix_and_nothing_changes(run):
    for checkpoint in checkpoints(run):
        damage(checkpoint, "momentum")
    before = snapshot(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint of .* can be read.*give another --out"):
        train(small(), out=run, progress=False)
    assert snapshot(run / "checkpoints") == before


def test_a_flipped_weight_is_not_loaded(run):
    damage(checkpoints(run)[-1], "weight")
    with pytest.raises(CheckpointError, match="not what was written"):
        load(run)


def test_a_full_disk_under_the_metrics_is_one_line(tmp_path, monkeypatch):
    from learn2perturb.training.metrics import MetricsFile

    file = MetricsFile(tmp_path / "metrics.jsonl")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        file.sync()
    file.close()
