"""Figure 4 from the metrics of real, tiny runs: the curve, the schedule beside it, the files, the refusals."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

import learn2perturb as l2p
from learn2perturb.defenses import build_defense

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "figure4.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two epochs: Learn2Perturb, Learn2Perturb-R, PNI, and one without noise."""
    folder = tmp_path_factory.mktemp("runs")
    for defense in ("learn2perturb", "learn2perturb_r", "pni", "none"):
        config = l2p.TrainConfig(
            defense=defense, model="digits_cnn", dataset="digits", recipe="fast", epochs=2, attack_steps=1, limit=96,
            batch_size=32, monitor=0, tensorboard=False, engine="plain", device="cpu",
        )  # fmt: skip
        l2p.train(config, out=folder / defense, progress=False)
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


def test_curve_schedule_picture_and_table(runs, tmp_path, monkeypatch, capsys):
    names = ("learn2perturb", "learn2perturb_r", "pni")
    assert run(monkeypatch, *(runs / name for name in names), "--out", tmp_path / "figure4") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((tmp_path / "figure4.csv").read_text().splitlines()))
    assert [(row["run"], row["epoch"]) for row in table] == [(name, epoch) for name in names for epoch in ("1", "2")]
    config = l2p.TrainConfig(defense="learn2perturb", recipe="fast", epochs=2).resolve()
    schedule = build_defense("learn2perturb", config.options).schedule_only(config, 3)
    alone = [next(schedule) for _ in range(6)][2::3]
    for name in names[:2]:
        rows = [row for row in table if row["run"] == name]
        assert [float(row["regulariser_only"]) for row in rows] == pytest.approx(alone)
    # Learn2Perturb-R is the schedule; Learn2Perturb is not; PNI has none.
    assert [float(row["mean"]) for row in table[2:4]] == pytest.approx(alone, rel=1e-5)
    assert float(table[1]["mean"]) != pytest.approx(alone[1], rel=1e-5)
    assert [(row["scale"], row["regulariser_only"]) for row in table[4:]] == [("alpha", "")] * 2
    assert "learn2perturb_r (learn2perturb_r): mean theta" in printed
    assert "the loss accounts for +0.0 %" in printed.replace("-0.0", "+0.0")
    assert "pni (pni): mean |alpha|" in printed


def test_a_run_without_learned_noise_or_without_metrics_is_refused(runs, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, runs / "none", "--out", tmp_path / "figure4") == 2
    assert "is not learned" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "nowhere", "--out", tmp_path / "figure4") == 2
    assert "no finished epoch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
