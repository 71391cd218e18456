"""``--model``, ``--weights`` and ``--output``: any network in every verb, or one line that says what is missing."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
import torch

from learn2perturb.cli.main import main
from learn2perturb.models import build_model

MODULE = '''
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn


class Net(nn.Module):
    """Gives its logits in one of many ways."""

    def __init__(self, how="tensor"):
        super().__init__()
        self.how = how
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        h = self.body(x.flatten(1)).relu()
        return HOW[self.how](self.head(h), h)


@dataclass
class ModelOutput:
    logits: torch.Tensor
    hidden: torch.Tensor


HOW = {
    "tensor": lambda z, h: z,
    "tuple": lambda z, h: (h, z),
    "dict": lambda z, h: OrderedDict(logits=z, hidden=h),
    "output": ModelOutput,
}


def tensor(): return Net()
def tuple(): return Net("tuple")
def dict(): return Net("dict")
def output(): return Net("output")
def function(): return lambda x: x.flatten(1)[:, :10]
'''
QUICK = ["--limit", "8", "--draws", "2", "--attacks", "fgsm", "--eps", "0.1", "--device", "cpu", "--json"]
KEYS = {"tensor": [], "tuple": ["--output", "1"], "dict": ["--output", "logits"], "output": ["--output", "logits"]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the user's module ``own_nets`` and weights of it, saved from DataParallel."""
    (tmp_path / "own_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("own_nets", None)
    torch.manual_seed(0)
    net = importlib.import_module("own_nets").tensor()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, "w.pt")
    yield tmp_path
    sys.modules.pop("own_nets", None)


def rows(capsys):
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize("how", KEYS)
def test_evaluate_takes_a_network_by_name_whatever_it_gives(how, here, capsys):
    words = ["--model", f"own_nets:{how}", "--weights", "w.pt", "--dataset", "digits", *KEYS[how], *QUICK]
    assert main(["evaluate", *words]) == 0
    found = rows(capsys)
    assert main(["evaluate", *words]) == 0
    assert [row["accuracy"] for row in rows(capsys)] == [row["accuracy"] for row in found]
    assert main(["evaluate", "own_nets:tensor", "--weights", "w.pt", "--dataset", "digits", *QUICK]) == 0
    assert [row["accuracy"] for row in rows(capsys)] == [row["accuracy"] for row in found]


def test_weights_say_how_they_fit_and_the_record_of_what_it_is(here, capsys):
    words = ["evaluate", "--model", "own_nets:tensor", "--weights", "w.pt", "--dataset", "digits", *QUICK]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "weights w.pt: 4 tensors fit; 'module.' left out of the keys" in said.err
    assert json.loads(said.out)["model"] == "own_nets:tensor of w.pt"
    record = json.loads((here / json.loads(said.out)["record"]).read_text())
    assert record["metadata"]["model"] == "own_nets:tensor of w.pt"


def test_a_registered_network_with_weights_of_ones_own(here, capsys):
    torch.manual_seed(0)
    torch.save(build_model("digits_cnn", 10, input_shape=(1, 8, 8)).state_dict(), "cnn.pth")
    assert main(["evaluate", "--model", "digits_cnn", "--weights", "cnn.pth", "--dataset", "digits", *QUICK]) == 0
    assert len(rows(capsys)) == 2


def test_diagnose_and_certify_take_the_same_words(here, capsys):
    words = ["--model", "own_nets:dict", "--weights", "w.pt", "--output", "logits", "--dataset", "digits"]
    assert main(["certify", *words, "--sigma", "0.1", "--limit", "2", "--n0", "4", "--n", "8"]) in (0, 2)
    assert "learn2perturb: error: unknown option" not in capsys.readouterr().err


def test_train_takes_a_function_and_its_run_is_judged_with_it(here, capsys):
    settings = ["--dataset", "digits", "--recipe", "fast", "--epochs", "1", "--limit", "32", "--monitor", "0"]
    words = ["train", "--model", "own_nets:dict", "--output", "logits", "--defense", "none", *settings]
    assert main([*words, "--tensorboard", "false", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "next: learn2perturb evaluate run --model own_nets:dict --output logits" in said
    assert main(["evaluate", "run", *QUICK]) == 2
    assert "--model module:function" in capsys.readouterr().err
    assert main(["evaluate", "run", "--model", "own_nets:dict", "--output", "logits", *QUICK]) == 0
    assert len(rows(capsys)) == 2


REFUSED = {
    "nothing": ([], "no network given; give RUN .* or --model NAME"),
    "untrained": (["--model", "digits_cnn"], "digits_cnn is untrained as it is built; give its weights"),
    "untrained timm": (["timm:resnet18"], "is untrained as it is built; .*or timm:resnet18.pretrained"),
    "no data": (["--model", "own_nets:tensor"], "says nothing of images; give --dataset NAME"),
    "no name": (["--model", "digits_cnx", "--weights", "w.pt"], "unknown network 'digits_cnx'.*did you mean"),
    "weights alone": (["run", "--weights", "w.pt"], "are of a network that --model names; give --model"),
    "two weights": (["run", "--model", "own_nets:tensor", "--weights", "w.pt"], "run has its weights, and --weights"),
    "not its weights": (
        ["--model", "digits_cnn", "--weights", "w.pt", "--dataset", "digits"], "'module.body.weight', .*unexpected"
    ),
    "no key": (
        ["--model", "own_nets:dict", "--output", "logit", "--dataset", "digits"],
        "output is 'logit', and the network gives a OrderedDict with logits, hidden",
    ),
    "no place": (
        ["--model", "own_nets:tuple", "--output", "2", "--dataset", "digits"], "gives a tuple with 0, 1; name the one"
    ),
    "no field": (
        ["--model", "own_nets:output", "--output", "z", "--dataset", "digits"], "a ModelOutput with logits, hidden"
    ),
    "output of ours": (
        ["--model", "digits_cnn", "--weights", "w.pt", "--output", "0", "--dataset", "digits"], "gives its logits alone"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_missing_is_one_line(what, here, capsys):
    words, said = REFUSED[what]
    assert main(["evaluate", *words, *QUICK]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert "Traceback" not in error
