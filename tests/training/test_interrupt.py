"""Signals during a training: nothing is lost, nothing is swallowed, and what is said is true."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from learn2perturb.errors import Interrupted
from learn2perturb.runs.files import checkpoints
from learn2perturb.training import TrainConfig, state, train
from learn2perturb.training.interrupt import SIGNALS, Interrupt


def config(**changes):
    values = {
        "defense": "none", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 2, "limit": 24,
        "batch_size": 8, "monitor": 8, "tensorboard": False, "engine": "plain", "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def after(monkeypatch, method, calls, *numbers):
    """Send signals to this process when ``method`` of a training has been called so many times."""
    real, seen = getattr(state.Training, method), []

    def counted(self, *arguments):
        result = real(self, *arguments)
        seen.append(method)
        if len(seen) == calls:
            for number in numbers:
                os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(state.Training, method, counted)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_in_the_scoring_stops_behind_it_also_in_the_last(tmp_path, monkeypatch, capsys, number, epoch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        after(patch, "monitor_scores", epoch, number)
        with pytest.raises(Interrupted, match=rf"saved in .*run \(step {3 * epoch}\)") as stop:
            train(config(), out=run, progress=False)
    assert stop.value.exit_code == 128 + number
    assert "finishing the scores of this epoch, then saving" in capsys.readouterr().err
    assert [int(path.name) for path in checkpoints(run)][-1] == 3 * epoch
    assert len(train(config(), out=run, progress=False).metrics) == 2


def test_the_first_signal_says_that_it_stops_after_the_step(tmp_path, monkeypatch, capsys):
    after(monkeypatch, "run_step", 2, signal.SIGHUP)
    with pytest.raises(Interrupted, match=r"stopped by SIGHUP; the state is saved in .*\(step 2\)"):
        train(config(), out=tmp_path / "run", progress=False)
    assert "SIGHUP: finishing this step, then saving; or Ctrl-C to stop at once" in capsys.readouterr().err


def test_the_second_signal_stops_at_once_and_says_what_is_saved(tmp_path, monkeypatch):
    after(monkeypatch, "run_step", 5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Interrupted, match=r"the state is saved in .*\(step 3\)"):
        train(config(), out=tmp_path / "run", progress=False)
    assert [int(path.name) for path in checkpoints(tmp_path / "run")] == [3]


def test_without_a_folder_nothing_is_said_to_be_saved(monkeypatch, capsys):
    after(monkeypatch, "run_step", 1, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; nothing is saved"):
        train(config(), progress=False)
    assert "nothing is saved" in capsys.readouterr().err


def test_a_loop_over_seeds_ends_with_ctrl_c(tmp_path, monkeypatch):
    after(monkeypatch, "monitor_scores", 2, signal.SIGINT)
    begun = []

    def sweep():
        for seed in range(3):
            begun.append(seed)
            try:
                train(config(seed=seed), out=tmp_path / str(seed), progress=False)
            except Exception:
                pytest.fail("an except of Exception must not hold up Ctrl-C")

    with pytest.raises(KeyboardInterrupt):
        sweep()
    assert begun == [0]


def test_handlers_are_put_back_and_an_ignored_sighup_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after(monkeypatch, "run_step", 1, signal.SIGHUP)
        train(config(), out=tmp_path / "run", progress=False)  # as under nohup
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_off_the_main_thread_a_training_runs_and_touches_no_handler(tmp_path):
    before, found = [signal.getsignal(number) for number in SIGNALS], []
    thread = threading.Thread(target=lambda: found.append(train(config(epochs=1), out=tmp_path / "r", progress=False)))
    thread.start()
    thread.join()
    assert len(found) == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_forked_worker_neither_speaks_nor_stops(monkeypatch):
    said = []
    interrupt = Interrupt(said.append, saves=True)
    with interrupt.listening():
        monkeypatch.setattr(os, "getpid", lambda: -1)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert not said
