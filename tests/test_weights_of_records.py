"""Records that lie by other weights than they are of are taken for nobody's: by the page, by compare."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import _TYPES, save_file
from torch import nn

import learn2perturb as l2p
from learn2perturb import zoo
from learn2perturb.cli.main import main
from learn2perturb.engine.identity import fingerprint_of_state, fingerprint_of_weights
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation
from learn2perturb.report import report
from learn2perturb.report.page import page
from learn2perturb.report.sources import gather
from learn2perturb.runs import files
from learn2perturb.runs.checkpoint import read_model, sealed
from learn2perturb.runs.files import MODEL, TYPES, Weights, locate, look
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
    assert look(zoo.weights(name)).fingerprint == fingerprint_of_weights(l2p.load(zoo.PREFIX + name))


@pytest.mark.parametrize("name", zoo.names())
def test_a_network_of_the_zoo_is_no_stranger_to_its_folder(name):
    folder = zoo.folder(name)
    found = gather([folder])
    assert not found.strangers
    assert len(found.records) == len(list((folder / "evaluation").glob("*.json"))) > 1


def test_every_type_is_known_that_safetensors_gives_to_torch():
    assert {key: f"torch.{name}" for key, name in TYPES.items()} == {key: str(kind) for key, kind in _TYPES.items()}


@pytest.mark.parametrize("kind", TYPES.values())
def test_tensors_of_every_type_have_the_fingerprint_that_torch_gives_them(kind, tmp_path):
    state = {"b": torch.arange(6).reshape(2, 3).to(getattr(torch, kind)), "a": torch.tensor(1).to(getattr(torch, kind))}
    (tmp_path / MODEL).write_bytes(sealed(state, {}))
    assert look(tmp_path / MODEL).fingerprint == fingerprint_of_state(read_model(tmp_path / MODEL)[0])


def test_what_a_module_keeps_beside_its_tensors_is_no_weight(tmp_path):
    class Keeping(nn.Linear):
        def get_extra_state(self):
            return {"seen": torch.ones(3), "names": ["a"]}

        def set_extra_state(self, state):
            pass

    network = nn.Sequential(Keeping(2, 3))
    (tmp_path / MODEL).write_bytes(sealed(network.state_dict(), {}))
    assert look(tmp_path / MODEL).fingerprint == fingerprint_of_weights(network)


def test_the_page_leaves_out_what_is_of_other_weights_and_says_so(run):
    assert rows_of(page(run))
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    with pytest.warns(UserWarning, match="is of other weights|of another network") as said:
        text = report(run, out=run / "page.html").read_text()
    assert len(said) == len(records(run)) + 1  # and the settings
    assert rows_of(text) == []
    assert "another network: its defense is &#39;madry&#39;" in text
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


@pytest.mark.filterwarnings("default")
def test_of_weights_that_cannot_be_read_it_is_said_that_nobody_can_tell(run, capsys):
    (run / zoo.WEIGHTS).write_bytes(b"torn")
    text = page(run)
    assert rows_of(text)
    assert "Nobody can tell whether the records" in text
    assert main(["compare", str(run), zoo.PREFIX + NAME]) == 0
    assert "nobody can tell" in capsys.readouterr().err


def test_the_folder_of_the_records_alone_is_asked_the_same(run):
    assert rows_of(page(run / "evaluation"))
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    with pytest.raises(CheckpointError, match="is of other weights"):
        page(run / "evaluation")


def test_a_record_that_is_shown_is_not_called_left_out(run):
    shutil.copy(zoo.weights(OTHER), run / zoo.WEIGHTS)
    text = page(evaluation(run), run)
    assert rows_of(text)
    assert f"{evaluation(run)} is left out" not in text


def test_weights_of_another_type_in_their_file_are_known_by_their_file(run):
    state, header = read_model(zoo.weights(NAME))
    (run / zoo.WEIGHTS).unlink()
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    (run / MODEL).write_bytes(sealed(half, header))
    for path in records(run):
        path.unlink()
    assert main(["evaluate", str(run), "--attacks", "none", "--limit", "20"]) == 0
    assert Evaluation.load(evaluation(run)).metadata["file"] == look(run / MODEL).fingerprint
    assert rows_of(page(run))


def test_a_pipe_in_place_of_weights_is_not_waited_for(run):
    (run / zoo.WEIGHTS).unlink()
    os.mkfifo(run / MODEL)
    assert "it is a pipe" in Weights(run).fault


@pytest.mark.parametrize("header", ["[]", "3", '"text"', "null", '{"extra_state": [1]}', "[" * 100_000, "{"])
def test_headers_that_nobody_writes_are_a_fault_in_a_line(header, tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / MODEL, metadata={"learn2perturb": header})
    weights = Weights(tmp_path)
    assert weights.misfit({"weights": "0"}) is None
    assert str(tmp_path) in weights.fault and "\n" not in weights.fault


def test_many_names_take_no_long_time(tmp_path):
    names = [f"n{number}" for number in range(50_000)]
    extra = json.dumps({"extra_state": dict.fromkeys(names)})
    save_file(dict.fromkeys(names, torch.ones(0)), tmp_path / MODEL, metadata={"learn2perturb": extra})
    started = time.process_time()
    assert look(tmp_path / MODEL).fingerprint
    assert time.process_time() - started < 10
    save_file({f"n{n}": torch.ones(0) for n in range(100_001)}, tmp_path / MODEL, metadata={"learn2perturb": "{}"})
    assert "more than 100,000 tensors" in Weights(tmp_path).fault


def test_a_checkpoint_that_is_dropped_meanwhile_is_looked_for_once_more(run, monkeypatch):
    located = iter([run / "gone.safetensors", run / zoo.WEIGHTS])
    monkeypatch.setattr(files, "locate", lambda _: next(located))
    weights = Weights(run)
    assert weights.misfit({"weights": "0" * 16}) is not None and weights.fault is None


@pytest.mark.parametrize("own", [True, False])
def test_maps_of_the_noise_are_shown_with_the_weights_they_are_of(own, run):
    maps = NoiseMaps.of({"theta/bn1": np.ones(3)}, look(zoo.weights(NAME if own else OTHER)).fingerprint)
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


@pytest.mark.parametrize("torn", [False, True])
def test_weights_are_read_once(torn, run, monkeypatch):
    if torn:
        (run / zoo.WEIGHTS).write_bytes(b"torn")
    read = []
    monkeypatch.setattr(files, "look", lambda path: read.append(path) or look(path))
    assert bool(gather([run]).strangers) is torn
    assert len(read) == 1
