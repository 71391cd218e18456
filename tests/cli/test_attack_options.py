"""``learn2perturb evaluate``: gradients replaced by name, and what is said of a search that had not converged."""

from __future__ import annotations

import json

import pytest

from learn2perturb.cli.main import main
from learn2perturb.evaluation import Evaluation

TRAIN = (
    "train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu",
    "--epochs=1", "--limit=64", "--monitor=0", "--attack_steps=1", "--tensorboard=false", "--defense=none",
)  # fmt: skip
EVALUATE = ("--limit=6", "--device=cpu", "--json", "--eps=0.1")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "plain")
    assert main([*TRAIN, "--out", folder]) == 0
    return folder


def evaluated(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *words, *EVALUATE]) == 0
    return json.loads(capsys.readouterr().out)


def test_attacks_by_gradients_pass_the_submodules_named_and_say_so(network, capsys):
    words = ("--attacks=fgsm", "--attack=square:queries=3", "--bpda", "normalize")
    found = evaluated(capsys, network, *words)
    assert [row["attack"] for row in found["rows"]] == ["clean", "fgsm+bpda", "square:queries=3"]
    row = Evaluation.load(found["record"]).row("fgsm+bpda")
    assert row.parameters["modules"] == "normalize"
    assert row.backward_passes == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attacks=fgsm", "--bpda", "quantise"), "no submodule 'quantise'; it has: normalize"),
        (("--attack=square:queries=3", "--bpda", "normalize"), "no attack takes any"),
    ],
)
def test_gradients_that_cannot_be_replaced_are_refused(network, words, message, capsys):
    capsys.readouterr()
    assert main(["evaluate", network, *words, *EVALUATE]) != 0
    assert message in capsys.readouterr().err


def test_a_search_that_had_not_converged_is_told_of(network, capsys):
    found = evaluated(capsys, network, "--attack=cw:steps=5,search_steps=1,lr=1e-6")
    assert len(found["notes"]) == 1
    assert "no constant was large enough for" in found["notes"][0]
    assert "cw-strong" in found["notes"][0]
    quiet = evaluated(capsys, network, "--attacks=fgsm")
    assert quiet["notes"] == []
