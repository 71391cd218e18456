"""Options of a data set reach every verb: a folder of images of mixed sizes is read at the size that is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import learn2perturb as l2p
from learn2perturb.cli.main import main
from learn2perturb.training.config import TrainConfig

TRAIN = ["train", "--model", "digits_cnn", "--defense", "none", "--recipe", "fast", "--epochs", "1", "--monitor", "0",
         "--tensorboard", "false", "--dataset", "folder", "--data-dir", ".", "--out", "run"]  # fmt: skip
JUDGE = ["--attacks", "none", "--draws", "2", "--json"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve images of mixed sizes of two classes, dark and bright, in a train and a test folder."""
    for split in ("train", "test"):
        for number in range(12):
            place = tmp_path / split / ("dark", "bright")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            size = (9 + number, 14 - number % 3)
            Image.new("L", size, 200 * (number % 2) + number).save(place / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_keeps_the_size_and_is_judged_at_it(folder, capsys):
    assert main([*TRAIN]) == 2
    assert "make all images one size, or give size=" in capsys.readouterr().err
    assert main([*TRAIN, "--dataset-options.size", "10"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", *JUDGE]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["n"] == 12
    assert main(["evaluate", "run", "--dataset-options.size", "12", *JUDGE]) == 2
    assert "was trained on images (1, 10, 10) and folder has (1, 12, 12)" in capsys.readouterr().err


def test_a_network_by_name_is_judged_at_the_size_that_is_given(folder, capsys):
    torch.save(l2p.build_model("digits_cnn", 2, input_shape=(1, 10, 10)).state_dict(), "w.pt")
    words = ["--model", "digits_cnn", "--weights", "w.pt", "--dataset", "folder", "--data-dir", "."]
    assert main(["evaluate", *words, "--dataset-options.size", "10", *JUDGE]) == 0
    assert main(["evaluate", *words, "--dataset-options.sise", "10", *JUDGE]) == 2
    assert "data set 'folder' has no option 'sise'; its options: cache, labels, size" in capsys.readouterr().err


def test_held_out_images_are_read_at_the_size_too(folder):
    config = TrainConfig(
        model="digits_cnn", defense="none", recipe="fast", epochs=1, dataset="folder", data_dir=".", validation=0.5,
        dataset_options={"size": [10, 8]}, tensorboard=False,
    )  # fmt: skip
    l2p.train(config, out="held", progress=False)
    assert main(["evaluate", "held", "--split", "validation", *JUDGE]) == 0
