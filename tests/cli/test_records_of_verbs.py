"""Records of the verbs: what they are of, under a name that says so, and never over one another."""

from __future__ import annotations

import argparse
import json
import os
import threading

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.certification import Certification, certify
from learn2perturb.cli.main import main
from learn2perturb.cli.subject import name_of, save_record
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation, evaluate
from learn2perturb.records import atomic_write

STEPS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs") / "mine"
    settings = ("--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu")
    few = ("--epochs=1", "--limit=64", "--batch-size=32", "--monitor=0", "--attack-steps=1", "--eps=8/255")
    assert main(["train", *settings, *few, "--out", str(folder)]) == 0
    return folder


def test_every_record_of_a_run_holds_its_step_and_weights(run, capsys):
    weights = fingerprint_of_weights(l2p.load(run))
    capsys.readouterr()
    found = []
    for words, kind in (
        (["evaluate", str(run), "--attacks=none", "--draws=2", "--limit=10"], Evaluation),
        (["certify", str(run), "--n=20", "--n0=5", "--limit=10", "--device=cpu"], Certification),
    ):
        assert main([*words, "--json"]) == 0
        path = json.loads(capsys.readouterr().out)["record"]
        found.append((os.path.basename(path), kind.load(path).metadata))
    assert [metadata["step"] for _, metadata in found] == [STEPS, STEPS]
    assert [metadata["weights"] for _, metadata in found] == [weights, weights]
    assert found[0][1]["images"] == found[1][1]["images"]
    assert [name for name, _ in found] == ["test-limit10-seed0.json", "mine-certification-test-limit10-seed0.json"]


def test_compare_shows_the_step(run, tmp_path, capsys):
    record = tmp_path / "one.json"
    assert main(["evaluate", str(run), "--attacks=none", "--draws=2", "--limit=10", "--out", str(record)]) == 0
    capsys.readouterr()
    assert main(["compare", str(record), str(record)]) == 0
    said = capsys.readouterr().out
    assert said.count(f", step {STEPS}\n") == 2
    assert main(["compare", str(record), str(record), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == [STEPS, STEPS]
    assert said["left_out"] == []
    assert "both are of the same weights" in said["notes"][0]


def test_weights_that_changed_since_are_of_no_known_step(run):
    network, data = l2p.load(run), (torch.rand(4, 1, 8, 8), torch.arange(4))
    assert evaluate(network, data, draws=2).metadata["step"] == STEPS
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    assert "step" not in evaluate(network, data, draws=2).metadata
    assert "step" not in certify(lambda x: network(x), data, sigma=9.0, n0=2, n=5).metadata


def test_the_step_of_a_run_of_before_is_that_of_its_checkpoint(run, monkeypatch):
    from learn2perturb.runs import loading

    read = loading.read_model
    monkeypatch.setattr(loading, "read_model", lambda path: (read(path)[0], {**read(path)[1], "step": None}))
    assert l2p.load(run).trained[0] == STEPS


@pytest.mark.parametrize("links", [True, False])
def test_records_that_are_saved_at_once_get_names_of_their_own(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    record = evaluate(
        lambda x: torch.cat([x.flatten(1), 0.5 - x.flatten(1)], 1), (torch.rand(4, 1, 1, 1), torch.zeros(4).long())
    )
    words = argparse.Namespace(out=None, run="zoo:some", split="test", limit=None, seed=0)
    barrier, saved = threading.Barrier(8), []

    def save() -> None:
        barrier.wait()
        saved.append(save_record(record, words, tmp_path, "evaluation"))

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {
        "some-evaluation-test-seed0.json",
        *(f"some-evaluation-test-seed0-{number}.json" for number in range(2, 9)),
    }
    assert {path.name for path in saved} == {path.name for path in tmp_path.iterdir()} == names
    assert all(Evaluation.load(path) == record for path in saved)


def test_a_new_file_never_replaces_one(tmp_path):
    atomic_write(tmp_path / "a", "first", new=True)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a", "second", new=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "first"
    with pytest.raises(CheckpointError, match="cannot write"):  # and does not look for a free name for ever
        atomic_write(tmp_path / "a" / "b", "third", new=True)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("zoo:l2p-resnet20", "l2p-resnet20"),
        ("hf-hub:owner/name", "owner-name"),
        ("models.mine:network", "models.mine-network"),
        ("a\x1b[31m b:c", "a-31m-b-c"),
        ("..", None),
    ],
)
def test_a_name_is_fit_for_a_file(run, name):
    assert name_of(run) == name if name else "/" not in name_of(run)
