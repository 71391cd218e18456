"""Runs of several processes outlive what happens to them: signals, kills, hangs, another number of processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import pytest
import torch

from learn2perturb.defenses.pgd_at import PGDTraining
from learn2perturb.engine import ranks
from learn2perturb.engine.ranks import joined
from learn2perturb.errors import ElsewhereError, InputError, TrainingError
from learn2perturb.registry import DEFENSES
from learn2perturb.runs.checkpoint import read_model, read_resume
from learn2perturb.runs.files import checkpoints
from learn2perturb.training import read_metrics, train
from tests.distributed.processes import ended, free_port, outcome, started, together
from tests.distributed.test_as_one import DIGITS, check_alike, config, network, trained

WHERE = "LEARN2PERTURB_TEST_EVENT"


@dataclass(frozen=True, kw_only=True)
class Eventful(PGDTraining):
    """PGD training in which something happens to one process at one step, as the environment says."""

    def loss(self, model, x, y, clock, settings):
        event, rank, step = (os.environ.get(WHERE) or "nothing 0 -1").split()
        if os.environ.get("RANK", "0") == rank and clock.step == int(step):
            if event == "fails":
                raise InputError("the dog ate it; give it another")
            if event == "sleeps":
                time.sleep(60)
            os.kill(os.getpid(), getattr(signal, event))
        return super().loss(model, x, y, clock, settings)


@pytest.fixture(autouse=True)
def _eventful():
    DEFENSES.register("eventful", f"{__name__}:Eventful", "something happens")
    yield
    DEFENSES._entries.pop("eventful")


def settings(**changes):
    return config(defense="eventful", checkpoint_minutes=1e-5, epochs=2, **changes)


def run(event, count, out, tmp_path, work=None, **environment):
    """Train in ``count`` processes; return what each returned or raised."""
    work = work or (lambda rank: trained(settings(), out=out))
    return ended(started(count, work, tmp_path / "ranks", **{WHERE: event}, **environment), tmp_path / "ranks")


def state_of(run):
    newest = checkpoints(run)[-1]
    weights, resume = read_model(newest / "model.safetensors")[0], read_resume(newest)
    momenta = [slot["momentum_buffer"] for o in resume["optimizers"].values() for slot in o["state"].values()]
    lines = read_metrics(run) + read_metrics(run, "step")
    return newest.name, weights, momenta, [{k: v for k, v in one.items() if "second" not in k} for one in lines]


def check_same(run, reference):
    (name, weights, momenta, lines), expected = state_of(run), state_of(reference)
    assert (name, lines) == (expected[0], expected[3])
    assert all(torch.equal(weights[key], value) for key, value in expected[1].items())
    assert all(torch.equal(one, other) for one, other in zip(momenta, expected[2], strict=True))


@pytest.mark.parametrize("event", ["SIGTERM 1 3", "SIGINT 0 7"])
def test_a_signal_to_one_stops_all_after_the_same_step_and_saves_once(event, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    name, step = event.split()[0], int(event.split()[2])
    stopped = run(event, 2, out, tmp_path)
    assert [kind for kind, _ in stopped] == ["Interrupted"] * 2
    said = "Ctrl-C" if name == "SIGINT" else name
    assert all(f"stopped by {said}; the state is saved in {out} (step {step + 1})" in text for _, text in stopped)
    assert int(checkpoints(out)[-1].name) == step + 1
    assert [kind for kind, _ in run("", 2, out, tmp_path)] == ["returned"] * 2
    assert [kind for kind, _ in run("", 2, whole, tmp_path)] == ["returned"] * 2
    check_same(out, whole)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_at_another_number_of_processes(first, then, tmp_path):
    out = tmp_path / "run"
    stopped = run("SIGTERM 0 6", first, out, tmp_path)
    assert [kind for kind, _ in stopped] == ["Interrupted"] * first
    resumed = together(then, lambda rank: trained(settings(), out=out), tmp_path / "then")
    check_alike(trained(settings()), resumed)


def test_one_that_is_killed_is_named_and_a_restart_ends_as_if_nothing_had_been(tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    for rank, step in ((1, 4), (0, 8)):
        found = run(f"SIGKILL {rank} {step}", 2, out, tmp_path / str(step))
        assert found[rank] is None
        kind, text = found[1 - rank]
        assert kind == "ElsewhereError"
        if rank == 1:
            assert "process 1 of 2 (pid " in text
            assert "is gone without a word" in text
    assert all(kind == "returned" for kind, _ in run("", 2, out, tmp_path))
    assert all(kind == "returned" for kind, _ in run("", 2, whole, tmp_path))
    check_same(out, whole)


def test_one_that_hangs_is_named_within_the_timeout(tmp_path):
    begun = time.monotonic()
    children = started(
        3, lambda rank: trained(settings()), tmp_path, **{WHERE: "sleeps 1 2", "LEARN2PERTURB_RANK_TIMEOUT": "4"}
    )
    for child in (children[0], children[2]):
        os.waitpid(child, 0)
    assert time.monotonic() - begun < 45
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    for rank in (0, 2):
        kind, text = outcome(tmp_path, rank)
        assert kind == "ElsewhereError"
        assert f"process 1 of 3 (pid {children[1]} on " in text
        assert "has not answered for 4 s: it hangs" in text


def test_a_failure_of_one_is_told_to_the_others(tmp_path):
    found = run("fails 1 3", 2, tmp_path / "run", tmp_path)
    assert found[1] == ("InputError", "the dog ate it; give it another")
    assert found[0] == ("ElsewhereError", "process 1 of 2 failed: the dog ate it; give it another")


def test_what_the_first_refuses_before_any_work_is_told_to_the_others(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (first, said), other = run("", 2, out, tmp_path, LEARN2PERTURB_RANK_TIMEOUT="5")
    assert first == "ConfigError"
    assert "is no run folder" in said
    assert other == ("ElsewhereError", f"process 0 of 2 failed: {said}")


def test_one_that_is_killed_before_it_has_said_where_it_is_is_named(tmp_path):
    def work(rank):
        if rank == 1:
            ranks.platform.node = lambda: os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(ElsewhereError) as caught, ranks.joined():
            pass
        return str(caught.value), torch.distributed.is_initialized()

    (_, (said, left_open)), other = run("", 2, None, tmp_path, work, LEARN2PERTURB_RANK_TIMEOUT="5")
    assert other is None
    assert said.startswith("process 1 of 2 is gone without a word")
    assert not left_open


def test_processes_that_are_not_started_alike_are_refused(tmp_path):
    def work(rank):
        return train(settings(seed=rank), model=network(), data=DIGITS, progress=False)

    found = run("", 2, None, tmp_path, work)
    assert all(kind in ("TrainingError", "ElsewhereError") and "other settings" in text for kind, text in found)

    def elsewhere(rank):
        images, labels = DIGITS[0].images, DIGITS[0].labels
        return train(settings(), model=network(), data=(images.roll(rank, 0), labels), progress=False)

    found = run("", 2, None, tmp_path / "data", elsewhere)
    assert all("has read another batch than the others" in text for _, text in found)


SCRIPT = """
    import os, pathlib, signal, sys
    import torch
    import learn2perturb as l2p
    from tests.distributed.test_as_one import DIGITS, network
    from tests.distributed.test_outliving import DEFENSES, settings

    DEFENSES.register("eventful", "tests.distributed.test_outliving:Eventful", "something happens")
    events = sys.argv[2:]
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    os.environ["LEARN2PERTURB_TEST_EVENT"] = events[attempt] if attempt < len(events) else ""
    torch.set_default_dtype(torch.float64)
    l2p.train(settings(), model=network(), data=DIGITS, out=sys.argv[1], progress=False)
"""


def torchrun(script, *words, processes=2, restarts=0, **environment):
    """Run a script under torchrun; return its exit code and what it wrote."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts",
        str(restarts), "--monitor-interval", "0.1", "--master-port", str(free_port()), str(script), *map(str, words),
    ]  # fmt: skip
    path = os.pathsep.join([os.getcwd(), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_restarts_a_run_whose_processes_are_killed_ten_times(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    chance = random.Random(17)
    events = [f"SIGKILL {chance.randrange(2)} {step}" for step in range(10)]
    code, text = torchrun(script, tmp_path / "run", *events, restarts=10)
    assert code == 0, text[-3000:]
    code, text = torchrun(script, tmp_path / "whole")
    assert code == 0, text[-3000:]
    check_same(tmp_path / "run", tmp_path / "whole")


def test_meeting_after_meeting_whoever_leaves_first(tmp_path):
    def meet(leaves):
        with joined() as ranks:
            if leaves:  # at once, and is at the next meeting while the other still leaves this one
                raise TrainingError("the dog ate it")
            ranks.largest(0)

    def work(rank):
        for meeting in range(8):
            with pytest.raises(TrainingError):
                meet(rank == meeting % 2)
        return "done"

    found = ended(started(2, work, tmp_path), tmp_path, seconds=30)
    assert found == [("returned", "done")] * 2
