"""Records that lie by other weights than they are of are taken for nobody's: by the page, by compare."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import learn2perturb as l2p
from learn2perturb import zoo
from learn2perturb.cli.main import main
from learn2perturb.engine.identity import fingerprint_of_state, fingerprint_of_weights
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation
from learn2perturb.report import report
from learn2perturb.report.page import page
from learn2perturb.runs.checkpoint import read_model, sealed
from learn2perturb.runs.files import _TYPES, MODEL, Weights, fingerprint_of_file, locate
from learn2perturb.runs.noise_maps import FILE, NoiseMaps

NAME, OTHER = "madry-digits", "trades-digits"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(zoo.folder(NAME), tmp_path / NAME)


def records(folder):
    return sorted((folder / "evaluation").glob("*.json"))


def evaluation(folder):
    return next(path for path in records(folder) if '"learn2perturb.evaluation"' in path.read_text()[:200])


def rows_of(text):
    return json.loads(text.split('id="data">')[1].split("</script>")[0])["rows"]


@pytest.mark.parametrize("name", zoo.names())
def test_a_file_has_the_fingerprint_of_its_network_without_torch(name):
    assert fingerprint_of_file(zoo.weights(name)) == fingerprint_of_weights(l2p.load(zoo.PREFIX + name))


@pytest.mark.parametrize("kind", _TYPES.values())
def test_tensors_of_every_type_have_the_fingerprint_that_torch_gives_them(kind, tmp_path):
    state = {"b": torch.arange(6).reshape(2, 3).to(getattr(torch, kind)), "a": torch.tensor(1).to(getattr(torch, kind))}
    (tmp_path / MODEL).write_bytes(sealed(state, {}))
    assert fingerprint_of_file(tmp_path / MODEL) == fingerprint_of_state(read_model(tmp_path / MODEL)[0])


def test_what_a_module_keeps_beside_its_tensors_is_no_weight(tmp_path):
    class Keeping(nn.Linear):
        def get_extra_state(self):
            return {"seen": torch.ones(3), "names": ["a"]}

        def set_extra_state(self, state):
            pass

    network = nn.Sequential(Keeping(2, 3))
    (tmp_path / MODEL).write_bytes(sealed(network.state_dict(), {}))
    assert fingerprint_of_file(tmp_path / MODEL) == fingerprint_of_weights(network)


def test_the_page_leaves_out_what_is_of_other_weights_and_says_so(run):
    assert rows_of(page(run))
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    with pytest.warns(UserWarning, match="is of other weights") as said:
        text = report(run, out=run / "page.html").read_text()
    assert len(said) == len(records(run)) and "--claim" not in text
    assert rows_of(text) == []
    assert "No accuracy was measured here." in text
    for path in records(run):
        assert f"{path} is left out" in text


def test_a_record_that_is_given_itself_is_shown(run):
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    assert rows_of(page(evaluation(run)))


def test_a_folder_with_nothing_else_is_refused(run):
    for path in ("config.yaml", "metrics.jsonl"):
        (run / path).unlink()
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    with pytest.raises(CheckpointError, match="is of other weights"):
        page(run)


def test_a_later_checkpoint_makes_strangers_of_records_of_an_earlier_one(run):
    step = run / "checkpoints" / "0000000900"
    step.mkdir(parents=True)
    (step / MODEL).write_bytes(sealed(*read_model(zoo.weights(OTHER))))
    (step / "resume.pt").touch()
    assert locate(run) == step / MODEL
    assert rows_of(page(run)) == []


@pytest.mark.parametrize("what", ["no weights", "weights of somebody else's format", "records that name none"])
def test_where_nobody_can_tell_records_are_shown(what, run):
    if what == "no weights":
        (run / zoo.WEIGHTS).unlink()
    elif what == "records that name none":
        shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
        for path in records(run):
            value = json.loads(path.read_text())
            del value["metadata"]["weights"], value["checksum"]
            path.write_text(json.dumps(value))
    else:
        (run / zoo.WEIGHTS).unlink()
        save_file({"weight": torch.ones(2)}, run / MODEL)
    assert rows_of(page(run))


def test_weights_that_cannot_be_read_vouch_for_nothing(run):
    (run / zoo.WEIGHTS).write_bytes(b"torn")
    text = page(run)
    assert rows_of(text) == []
    assert "cannot be read" in text


@pytest.mark.parametrize("own", [True, False])
def test_maps_of_the_noise_are_shown_with_the_weights_they_are_of(own, run):
    maps = NoiseMaps.of({"theta/bn1": np.ones(3)}, fingerprint_of_file(zoo.weights(NAME if own else OTHER)))
    maps.save(run / FILE)
    text = page(run)
    assert ("noise-0-0" in text) is own
    assert ("noise.json, the maps of the noise, is left out: it is of other weights" in text) is not own


def test_compare_takes_a_folder_for_its_own_weights_alone(run, capsys):
    good = zoo.PREFIX + NAME
    assert main(["compare", str(run), good]) == 0
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    capsys.readouterr()
    assert main(["compare", str(run), good]) == 2
    told = capsys.readouterr().err
    assert str(evaluation(run)) in told
    assert "is of other weights" in told
    assert main(["compare", str(evaluation(run)), good]) == 0


def test_of_two_evaluations_compare_takes_that_of_the_weights(run):
    record = Evaluation.load(evaluation(run))
    stranger = Evaluation(**{**vars(record), "metadata": {**record.metadata, "weights": "0" * 16}})
    stranger.save(run / "evaluation" / "a-stranger.json")
    assert main(["compare", str(run), zoo.PREFIX + NAME]) == 0


def test_weights_are_read_once(run, monkeypatch):
    from learn2perturb.runs import files

    read = []
    monkeypatch.setattr(files, "fingerprint_of_file", lambda path: read.append(path) or "0" * 16)
    weights = Weights(run)
    assert weights.misfit({"weights": "0" * 16}) is None
    assert "other weights" in weights.misfit({"weights": "1" * 16})
    assert len(read) == 1
