"""``bench scale``: the same step on one process and on several."""

from __future__ import annotations

import json

import pytest
import torch

from learn2perturb.cli.bench import scale
from learn2perturb.cli.main import main
from learn2perturb.engine.execution import has_native_bfloat16

WORDS = ("--dataset=digits", "--device=cpu", "--batch-size=16", "--rounds=2", "--model=digits_cnn", "--attack-steps=1")


def measured(settings, count):
    seconds = {1: 4.0, 2: 2.5, 4: 2.0}[count]
    return {
        "seconds": seconds, "milliseconds": 1000 * seconds, "images_per_second": 16 / seconds,
        "cpu_seconds": 4.0 + count, "overhead": 0.05, "slower": 0.2, "waiting_share": 0.1, "messages": 5,
    }  # fmt: skip


def test_efficiency_and_work_are_in_units_of_one_process(monkeypatch, capsys):
    monkeypatch.setattr(scale, "_timed", measured)
    assert main(["bench", "scale", *WORDS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["efficiency"] for row in found.values()] == [1.0, 0.8, 0.5]
    assert [row["work"] for row in found.values()] == pytest.approx([1.0, 1.2, 1.6])
    assert main(["bench", "scale", *WORDS]) == 0
    text = capsys.readouterr().out
    assert f"{'fast' if has_native_bfloat16(torch.device('cpu')) else 'fast32'} engine, 1 thread each" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["2", "processes", "2500.0", "6.4", "80%", "1.20", "5.0%", "20.0%", "10.0%", "5"] in lines


def test_what_means_nothing_there_is_refused(capsys):
    assert main(["bench", "scale", "--workers=2"]) == 2
    assert "--workers means nothing in 'bench scale'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_processes_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(scale, "COUNTS", (1, 2))
    assert main(["bench", "scale", *WORDS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["1 process"]["messages"] == 0
    assert found["2 processes"]["messages"] >= 4
    assert 0 < found["2 processes"]["waiting_share"] < 1
    assert found["1 process"]["overhead"] == found["1 process"]["slower"] == 0
    assert found["2 processes"]["overhead"] > 0
