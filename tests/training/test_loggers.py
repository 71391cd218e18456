"""Loggers: each gets every epoch once, the settings, the noise; one that fails changes nothing of the training."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from learn2perturb.cli.main import main
from learn2perturb.errors import ConfigError, MissingDependencyError, UnknownNameError
from learn2perturb.training import Beginning, Logger, TrainConfig, read_metrics, train
from learn2perturb.training.loggers import LOGGERS, build_logger, flat, numbers

TINY = {
    "dataset": "digits", "model": "digits_cnn", "recipe": "fast", "epochs": 2, "limit": 16, "batch_size": 8,
    "attack_steps": 1, "eps": 0.1, "attack_step_size": 0.05, "monitor": 8, "log_every": 1, "tensorboard": False,
    "engine": "plain", "device": "cpu", "augment": False,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**(TINY | changes))


class Noting(Logger):
    """Notes all that it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.shown: dict[str, Tensor] = {}

    def begin(self, run: Beginning) -> None:
        self.heard.append(f"begin {run.step} {run.settings['defense']}")

    def step(self, line: Mapping[str, Any]) -> None:
        self.heard.append(f"step {line['step']}")

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        self.noise = dict(noise)
        self.heard.append(f"epoch {line['epoch']}")

    def images(self, name: str, images: Tensor, step: int) -> None:
        self.shown[name] = images

    def end(self) -> None:
        self.heard.append("end")


class Failing(Noting):
    """Fails at the first epoch."""

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        raise RuntimeError("the server is away")


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    noting = Noting()
    run = train(config(loggers=["csv"], tensorboard=True), out=out, progress=False, loggers=[noting])
    return run, noting


def test_a_logger_of_ones_own_hears_of_everything_once(heard):
    run, noting = heard
    assert noting.heard == [
        "begin 0 learn2perturb",
        "step 1",
        "step 2",
        "epoch 0",
        "step 3",
        "step 4",
        "epoch 1",
        "end",
    ]
    assert list(noting.noise) == [f"theta/{site}" for site in run.metrics[-1]["theta"]]
    clean, adversarial = noting.shown["images/clean"], noting.shown["images/adversarial"]
    assert clean.shape == adversarial.shape == (8, 1, 8, 8)
    assert 0 < float((clean - adversarial).abs().max()) <= 0.1 + 1e-6


def test_the_csv_has_a_row_an_epoch(heard):
    run, _ = heard
    with open(run.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["loss"]) == run.metrics[1]["loss"]
    assert any(key.startswith("theta/") for key in rows[0])


def test_tensorboard_has_scalars_histograms_images_and_settings(heard):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = heard
    found = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    tags = found.Tags()
    assert {"loss", "theta_mean", "lr"} <= set(tags["scalars"])
    assert [event.step for event in found.Scalars("loss")] == [2, 4]
    assert any(tag.startswith("noise/theta/") for tag in tags["histograms"])
    assert any("images/adversarial" in tag for tag in tags["images"])
    assert any("hparams" in tag for tag in found.summary_metadata)


@pytest.mark.filterwarnings("ignore:logger Failing failed")
def test_loggers_and_their_failures_change_nothing_of_the_training(heard, tmp_path):
    run, _ = heard
    failing = Failing()
    again = train(config(), out=tmp_path / "run", progress=False, loggers=[failing])
    assert failing.heard == ["begin 0 learn2perturb", "step 1", "step 2"]  # and then it was dropped
    for one, other in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_logger_that_fails_is_told_once(tmp_path):
    with pytest.warns(UserWarning, match="logger Failing failed at epoch .*the server is away.* the training goes on"):
        train(config(epochs=1), progress=False, loggers=[Failing()])


def test_a_training_that_goes_on_has_no_gap_and_no_double_row(tmp_path):
    noting = Noting()
    train(config(epochs=1, loggers=["csv"], schedule="constant"), out=tmp_path / "run", progress=False)
    train(
        config(epochs=2, loggers=["csv"], schedule="constant"), out=tmp_path / "run", progress=False, loggers=[noting]
    )
    assert noting.heard[0] == "begin 2 learn2perturb"
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    assert len(read_metrics(tmp_path / "run")) == 2


def test_loggers_are_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_logger.py").write_text(
        "from learn2perturb.training import Logger\n\n\nclass Mine(Logger):\n"
        "    def epoch(self, line, noise):\n        print('mine', line['epoch'])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = [f"--{key.replace('_', '-')}={str(value).lower()}" for key, value in (TINY | {"epochs": 1}).items()]
    assert main(["train", *words, "--loggers=csv,my_logger:Mine", "--out=run"]) == 0
    assert "mine 0" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_what_is_no_logger_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'csv'"):
        config(loggers=["cvs"])
    with pytest.raises(ConfigError, match="a list of names"):
        config(loggers="csv")
    with pytest.raises(ConfigError, match="cannot be made"):
        build_logger("no_such:Class")
    with pytest.raises(ConfigError, match="must be a learn2perturb"):
        build_logger("collections:OrderedDict")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named_before_anything_is_trained(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'learn2perturb\[track\]'"):
        train(config(loggers=[name]), out=tmp_path / "run", progress=False)
    assert read_metrics(tmp_path / "run") == []


def test_every_logger_is_built_by_its_name():
    assert [type(build_logger(name)).__name__ for name in LOGGERS] == ["TensorBoard", "CSV", "MLflow", "WandB"]
    line = {"kind": "epoch", "epoch": 1, "step": 2, "loss": 1, "theta": {"bn1": {"mean": 0.5}}, "theta_mean": 0.5}
    assert numbers(line) == {"loss": 1.0, "theta_mean": 0.5, "theta/bn1": 0.5}
    assert flat({"a": 1, "b": {"c": [1]}, "d": None}) == {"a": 1, "b.c": "[1]"}


@pytest.mark.filterwarnings("ignore")  # those packages' own
def test_mlflow_has_settings_and_every_epoch(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra track")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db" if _has("sqlalchemy") else (tmp_path / "mlruns").as_uri())
    train(config(loggers=["mlflow"]), out=tmp_path / "run", progress=False)
    client = mlflow.MlflowClient()
    run = client.get_run((tmp_path / "run" / "mlflow.txt").read_text())
    assert run.data.params["defense"] == "learn2perturb"
    assert [one.step for one in client.get_metric_history(run.info.run_id, "loss")] == [2, 4]
    assert run.info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")
def test_wandb_runs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra track")
    monkeypatch.chdir(tmp_path)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    train(config(loggers=["wandb"]), out=tmp_path / "run", progress=False)
    files = list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert len(files) == 1
    for _ in range(100):  # its service writes after the run has ended
        if os.path.getsize(files[0]) > 500:
            break
        time.sleep(0.1)
    assert os.path.getsize(files[0]) > 500
    assert len(list(files[0].parent.rglob("*.png"))) == 16


def _has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
