"""The paper-scale driver at a tiny scale: slices cut and carried reach the same weights, and nothing is made up."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import learn2perturb as l2p
from benchmarks.paper_scale import packing, work
from benchmarks.paper_scale.__main__ import main
from benchmarks.paper_scale.plan import read_plan
from benchmarks.paper_scale.publish import publish
from benchmarks.paper_scale.report import status, write_report
from benchmarks.paper_scale.rounding import rounded
from benchmarks.paper_scale.state import State
from benchmarks.paper_scale.tasks import TRAIN, ReleasedScores, Task, perform, ready, share_draws
from learn2perturb import zoo
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.evaluation import Evaluation
from learn2perturb.noise import noise_modules
from learn2perturb.runs.checkpoint import checkpoints
from learn2perturb.training import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A checkpoint after every step, so that a slice can be cut anywhere.
PLAN = """
training: {dataset: digits, model: digits_cnn, recipe: fast, epochs: 2, attack_steps: 1, limit: 128, batch_size: 32,
  monitor: 0, tensorboard: false, engine: plain, device: cpu, checkpoint_minutes: 1.0e-9}
runs:
  ours: {defense: learn2perturb, seed: 1}
  pgd: {defense: pgd_at, seed: 1}
evaluate: [--eps, "0.1", --draws, "2", --batch-size, "25", --limit, "50"]
cells:
  pgd7: {attack: "pgd:steps=2,step_size=0.05"}
  eot5: {attack: "pgd:steps=2,step_size=0.05,eot=2", noisy: true, noise_off: false}
  from-twin: {attack: "pgd:steps=2,step_size=0.05", source: twin, noisy: true}
  from-pgd_at: {attack: "pgd:steps=2,step_size=0.05", source: pgd_at, noisy: true}
  released: {attack: "pgd:steps=2,step_size=0.05", released: 25}
paper: {digits_cnn: {pgd_at: {clean: 83.8, pgd7: 39.1}}}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(PLAN)
    return read_plan(path)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A state that was never cut: everything trained and evaluated in this process."""
    state = State(tmp_path_factory.mktemp("whole"))
    before = os.getcwd()
    os.chdir(state.folder)
    try:
        for _ in range(20):
            task = next(ready(plan, state), None)
            if task is None:
                break
            perform(plan, state, task, "cpu")
    finally:
        os.chdir(before)
    return state


LONG = 12  # epochs: seconds of training, so that a process which looks five times a second is sure to be cut inside


@pytest.fixture
def long_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("epochs: 2", f"epochs: {LONG}"))
    return read_plan(path)


def until(condition, seconds=200.0):
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.timeout(600)  # processes that start beside other work
def test_slices_killed_carried_and_gone_on_reach_the_same_weights(long_plan, tmp_path):
    plan, whole = long_plan, State(tmp_path / "whole")
    for run in plan.runs:
        perform(plan, whole, Task(TRAIN, run), "cpu")
    first = State(tmp_path / "first")
    first.folder.mkdir()
    first.floors.write_text("{}")
    words = [sys.executable, "-m", "benchmarks.paper_scale", "work", "--device", "cpu"]
    words += ["--state", str(first.folder), "--plan", str(plan.path)]
    cut = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    until(lambda: first.position("ours") >= 1)
    cut.send_signal(signal.SIGKILL)
    cut.wait()

    def free():
        with first.held("ours") as mine:
            return mine

    until(free)  # the orphan saves and ends by itself
    assert not first.is_finished("ours")
    assert packing.pack(first, tmp_path / "carried", part=20_000)[2:]  # several parts
    second = State(tmp_path / "second")
    packing.unpack(tmp_path / "carried", second)
    assert 1 <= second.position("ours") == first.position("ours")
    rest = work.Slice(plan, second, side=2, device="cpu", data_dir=None, limit_runs=[])
    for run in plan.runs:  # trainings only: their evaluations are tested elsewhere
        for cell in plan.cells:
            second.cell(run, cell.name).parent.mkdir(parents=True, exist_ok=True)
            second.cell(run, cell.name).write_bytes(b"{}")
    rest.work(5, None)
    for run in plan.runs:
        assert second.weights(run).read_bytes() == whole.weights(run).read_bytes()
        ours, theirs = (
            [
                {key: value for key, value in line.items() if "second" not in key}
                for line in read_metrics(state.run(run))
            ]
            for state in (second, whole)
        )
        assert ours == theirs
        assert len(ours) == LONG
        assert not (second.run(run) / "checkpoints").exists()
    (line,) = second.slices()
    assert {task["task"] for task in line["tasks"]} == {"train ours", "train pgd"}
    assert line["side"] == 2


def test_a_slice_too_short_to_get_anywhere_leaves_nothing_broken(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_TOO_LATE", 0.0)
    state = State(tmp_path / "state")
    state.folder.mkdir()
    state.floors.write_text("{}")
    part = work.Slice(plan, state, side=1, device="cpu", data_dir=None, limit_runs=["pgd"])
    part.work(0.3 / 60, tmp_path / "out")
    assert [task["task"] for task in state.slices()[0]["tasks"]] == ["train pgd"]
    assert part.failures == {}
    assert packing.unpack(tmp_path / "out", State(tmp_path / "other")) == []


def test_a_task_that_fails_is_tried_twice_and_named(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_TRIES", 1)
    state = State(tmp_path / "state")
    state.run("pgd").mkdir(parents=True)
    state.floors.write_text("{}")
    (state.run("pgd") / "something else").touch()  # no run folder: the training refuses it
    part = work.Slice(plan, state, side=1, device="cpu", data_dir=None, limit_runs=["pgd"])
    with pytest.raises(l2p.errors.TrainingError, match="train pgd failed 1 times"):
        part.work(1, None)
    assert "is no run folder" in state.log("train-pgd").read_text()


# --- packing


def test_unpacking_never_goes_back(plan, whole, tmp_path):
    state = State(tmp_path / "state")
    perform(plan, state, Task(TRAIN, "pgd"), "cpu")
    packing.pack(state, tmp_path / "old")
    record = state.cell("pgd", "pgd7")
    record.parent.mkdir(parents=True)
    record.write_text("here")
    packing.pack(whole, tmp_path / "new")
    assert packing.unpack(tmp_path / "new", state) == ["ours"]
    assert record.read_text() == "here"
    assert state.weights("ours").read_bytes() == whole.weights("ours").read_bytes()
    assert packing.unpack(tmp_path / "old", state) == []
    assert len(read_metrics(state.run("ours"))) == 2


def test_weights_left_out_are_missing_not_trained_again(plan, whole, tmp_path):
    packing.pack(whole, tmp_path / "light", leave=["pgd"])
    state = State(tmp_path / "state")
    packing.unpack(tmp_path / "light", state)
    assert state.is_finished("pgd")
    assert state.weights("pgd") is None
    assert list(ready(plan, state)) == []
    packing.pack(whole, tmp_path / "all")
    packing.unpack(tmp_path / "all", state)  # they may come later
    assert state.weights("pgd").read_bytes() == whole.weights("pgd").read_bytes()


def test_parts_that_lack_or_are_damaged_are_refused_and_older_whole_ones_used(whole, tmp_path):
    old = packing.pack(whole, tmp_path / "old")
    new = packing.pack(whole, tmp_path / "new", part=10_000)
    assert all(path.stat().st_size <= 10_000 for path in new)
    assert packing.pack(whole, tmp_path / "old") != old
    assert len(list((tmp_path / "old").iterdir())) == 1  # what was there before is gone
    new[1].unlink()
    with pytest.raises(CheckpointError, match="no whole archive"):
        packing.unpack(tmp_path / "new", State(tmp_path / "state"))
    (older,) = (tmp_path / "old").iterdir()
    (tmp_path / "new" / older.name).write_bytes(older.read_bytes())
    assert packing.unpack(tmp_path / "new", State(tmp_path / "state"))
    (tmp_path / "new" / older.name).write_bytes(older.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        packing.unpack(tmp_path / "new", State(tmp_path / "again"))


@pytest.mark.parametrize(("bits", "error"), [(24, 2.0**-16), (16, 2.0**-8)])
def test_rounding_keeps_so_many_bits_and_every_special_value(bits, error):
    values = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
    near = rounded(values, bits)
    assert ((near - values).abs() <= error * values.abs()).all()
    assert not torch.equal(near, values)
    assert (near.view(torch.int32) & ((1 << (32 - bits)) - 1) == 0).all()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(torch.float32).max])
    assert torch.equal(rounded(special, bits).view(torch.int32), special.view(torch.int32))
    assert rounded(torch.tensor([torch.nan]), bits).isnan().all()
    assert torch.equal(rounded(torch.arange(3), bits), torch.arange(3))


def test_a_large_checkpoint_is_carried_rounded_and_goes_on(plan, tmp_path, monkeypatch):
    state, folder = State(tmp_path / "state"), tmp_path / "other"
    config = plan.config("ours")
    real = l2p.training.state.Training.run_step

    def stop(self, x, y):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, x, y)

    monkeypatch.setattr(l2p.training.state.Training, "run_step", stop)
    with pytest.raises(KeyboardInterrupt):
        l2p.train(config, out=state.run("ours"), progress=False)
    monkeypatch.setattr(l2p.training.state.Training, "run_step", real)
    exact = sum(path.stat().st_size for path in packing.pack(state, tmp_path / "exact"))
    monkeypatch.setattr(packing, "LARGE_CHECKPOINT", 0)
    small = sum(path.stat().st_size for path in packing.pack(state, tmp_path / "small"))
    assert small < 0.75 * exact
    other = State(folder)
    packing.unpack(tmp_path / "small", other)
    mine, theirs = (l2p.load(place.run("ours")).state_dict() for place in (state, other))
    assert all(torch.allclose(mine[key], theirs[key], rtol=2**-16, atol=0) for key in mine)
    assert any(not torch.equal(mine[key], theirs[key]) for key in mine)
    perform(plan, other, Task(TRAIN, "ours"), "cpu")
    assert len(read_metrics(other.run("ours"))) == 2
    assert checkpoints(other.run("ours")) == []


# --- evaluation


def test_every_cell_is_there_and_one_is_recomputed_by_the_verb(plan, whole, tmp_path, monkeypatch):
    assert "ours" in status(plan, whole)
    assert "cells 5/5" in status(plan, whole).splitlines()[0]
    assert "cells 2/2" in status(plan, whole).splitlines()[1]
    from learn2perturb.cli.main import main as learn2perturb

    cell = next(cell for cell in plan.cells if cell.name == "pgd7")
    out = tmp_path / "again.json"
    words = ["evaluate", str(whole.run("ours")), *plan.words(cell), "--device", "cpu", "--out", str(out)]
    assert learn2perturb(words) == 0
    again, stored = Evaluation.load(out), whole.evaluation("ours", "pgd7")
    assert [row.predictions for row in again.rows] == [row.predictions for row in stored.rows]
    assert {row.noise for row in stored.rows} == {True, False}
    for run in plan.runs:
        for path in whole.cell(run, "x").parent.iterdir():
            assert str(whole.folder) not in path.read_text()


def test_released_scoring_uses_the_statistics_of_the_batch_and_one_map_for_all(whole):
    model = l2p.load(whole.run("ours"))
    x = l2p.load_data("digits", "test", limit=8).images.float() / 255
    with torch.no_grad():
        same = x[:1].expand(8, -1, -1, -1)
        assert not torch.equal(*model(same)[:2])
        share_draws(model)
        assert all(module.sharing == "per_batch" for module in noise_modules(model))
        assert torch.equal(*model(same)[:2])
        with l2p.noise_disabled(model):
            evaluated, scored = model(x), ReleasedScores(model)(x)
            model.train()
            trained = model(x)
    assert torch.equal(scored, trained)
    assert not torch.allclose(scored, evaluated)


# --- report, zoo


def test_the_report_shows_what_is_there_and_calls_the_rest_missing(plan, whole, tmp_path):
    text = write_report(plan, whole, tmp_path / "report").read_text()
    row = whole.evaluation("ours", "eot5").rows[1]
    assert f"{100 * row.accuracy:.2f}" in text.split("## Draws")[1].split("##")[0]
    quiet = whole.evaluation("ours", "pgd7").row("pgd:steps=2,step_size=0.05", noise=False)
    (line,) = [line for line in text.splitlines() if line.startswith("| pgd7, noise off |")]
    assert f"| {100 * quiet.accuracy:.2f} [{100 * quiet.interval.low:.2f}" in line
    assert "on 50 test images" in text
    assert "| pgd_at | 1 | 83.8 |" in text
    assert "the regulariser alone gives" in text
    assert (tmp_path / "report" / "theta.png").read_bytes().startswith(b"\x89PNG")
    assert "missing" in text.split("## Draws")[1].split("##")[0]  # 20 and 80 draws are not in this plan
    empty = write_report(plan, State(tmp_path / "nothing"), tmp_path / "empty").read_text()
    assert "| digits_cnn | pgd_at | 1 | 83.8 | missing |" in empty
    assert "%" not in empty.split("## Time")[1]


def test_a_published_network_is_loaded_by_name_with_a_card_that_has_every_number(plan, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    card = publish(plan, whole, "ours").read_text()
    model = l2p.load("zoo:ours")
    trained = l2p.load(whole.run("ours"))
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())
    assert zoo.card("ours") == card
    for cell in plan.cells:
        row = whole.evaluation("ours", cell.name).rows[1]
        assert f"{100 * row.accuracy:.2f}" in card
        assert cell.name in card
    publish(plan, whole, "pgd")
    words = ["cell", "zoo:ours", "from-pgd_at", "--out", str(tmp_path / "cell.json"), "--plan", str(plan.path)]
    assert main([*words, "--device", "cpu"]) == 0
    again, stored = Evaluation.load(tmp_path / "cell.json"), whole.evaluation("ours", "from-pgd_at")
    assert [row.predictions for row in again.rows] == [row.predictions for row in stored.rows]
    with pytest.raises(CheckpointError, match=r"no network 'our' in the zoo: did you mean 'ours'"):
        l2p.load("zoo:our")
    whole_but_one = State(tmp_path / "state")
    packing.pack(whole, tmp_path / "carried")
    packing.unpack(tmp_path / "carried", whole_but_one)
    whole_but_one.cell("ours", "eot5").unlink()
    with pytest.raises(CheckpointError, match="lacks eot5"):
        publish(plan, whole_but_one, "ours")
    monkeypatch.setattr(zoo, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="at most 1000"):
        publish(plan, whole, "ours")


# --- the plan itself


def test_the_plan_of_the_paper_is_sound():
    plan = read_plan()
    for run, config in plan.runs.items():
        assert config.resolve().epochs >= 100
        for cell in plan.cells:
            plan.source_of(run, cell)
    assert next(iter(plan.runs)) == "learn2perturb-resnet20-cifar10"
    assert {cell.name for cell in plan.cells} >= {
        "fgsm",
        "pgd7",
        "pgd20",
        "pgd100",
        "eot5",
        "eot20",
        "eot80",
        "released",
    }


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["status", "--plan", str(tmp_path / "none.yaml")]) == 2
    assert main(["unpack", str(tmp_path), "--state", str(tmp_path / "state")]) == 2
    assert main(["publish", "nothing", "--state", str(tmp_path / "state")]) == 2
    (tmp_path / "plan.yaml").write_text(json.dumps({"runs": {}}))
    assert main(["status", "--plan", str(tmp_path / "plan.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
