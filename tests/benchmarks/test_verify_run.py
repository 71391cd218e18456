"""The script that checks a run's noise passes on honest noise and fails on noise that is shared by a batch."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import learn2perturb as l2p

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "verify_run.py"


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "code", "answer"), [("per_example", 0, "yes"), ("per_batch", 1, "NO ")])
def test_shared_noise_is_caught(sharing, code, answer, tmp_path, monkeypatch, capsys):
    config = l2p.TrainConfig(
        defense="learn2perturb",
        model="digits_cnn",
        dataset="digits",
        recipe="fast",
        epochs=1,
        eps=0.1,
        attack_steps=1,
        attack_step_size=0.1,
        limit=64,
        monitor=0,
        tensorboard=False,
        options={"sharing": sharing},
    )
    l2p.train(config, out=tmp_path / "run", progress=False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "run"), "--images", "4", "--repeats", "48"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == code, printed
    assert f"{answer}  two rows of a batch, same image, get different noise" in printed
    assert "yes  noise off equals the plain network bit for bit" in printed
    assert "largest departure" in printed
