"""Killed at any moment and resumed, a training ends bit for bit as if it had never stopped."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import time
import traceback

import pytest
import sklearn.datasets  # noqa: F401 - imported once here rather than in every child
import torch

from learn2perturb.engine import compiling, execution
from learn2perturb.engine.execution import has_native_bfloat16
from learn2perturb.models import build_model
from learn2perturb.runs import load
from learn2perturb.runs.checkpoint import read_model, read_resume
from learn2perturb.runs.files import checkpoints
from learn2perturb.training import TrainConfig, read_metrics, train

FAST = "fast" if has_native_bfloat16(torch.device("cpu")) else "fast32"
OLD_PROCESSORS = pytest.mark.skipif(FAST == "fast32", reason="they compile the passes that train for many minutes")
TIMED = ("seconds", "images_per_second", "compile_seconds")
KILLS = 10


def config(**changes):
    """Return a config of about two seconds: three epochs, delays inside them, a last smaller batch."""
    values = {
        "defense": "learn2perturb", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 3,
        "limit": 76, "batch_size": 8, "attack_steps": 1, "monitor": 20, "log_every": 3, "tensorboard": False,
        "checkpoint_minutes": 1e-4, "engine": "plain", "device": "cpu", "adversarial_delay": 1,
    }  # fmt: skip
    options = {"noise_delay": 1, **changes.pop("options", {})}
    return TrainConfig(**{**values, **changes}, options=options)


def in_child(config, out, kill_from_step=None, jitter=0.0):
    """Train in a forked child, SIGKILLed ``jitter`` seconds after its checkpoint of a step; tell whether it finished.

    Forked, not started anew: importing torch takes longer than the whole training. The parent has one thread of its own
    computations (see conftest), so the child inherits no lock that another thread holds. The moment is counted from a
    checkpoint, not from the start, so that the test gets on at the same pace on a slow machine.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            train(config, out=out, progress=False)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    while kill_from_step is not None:
        # By the names alone: the child may be writing or deleting any of the folders.
        steps = [int(name) for name in _names(out / "checkpoints") if name.isdigit()]
        if max(steps, default=0) >= kill_from_step:
            time.sleep(jitter)
            os.kill(child, signal.SIGKILL)
            break
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.002)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def _names(folder):
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def state_of(run):
    """Return everything that a run left: weights, theta, momenta, position, metrics without what the clock decides.

    With an average, ``weights`` is that, and the weights it is of are among the momenta.
    """
    newest = checkpoints(run)[-1]
    weights, _ = read_model(newest / "model.safetensors")
    resume = read_resume(newest)
    momenta = {
        f"{name}.{index}": value
        for name, optimizer in resume["optimizers"].items()
        for index, slot in optimizer["state"].items()
        for value in [slot["momentum_buffer"]]
    }
    momenta |= {f"last.{key}": value for key, value in resume.get("weights", {}).items()}
    if "average" in resume:
        momenta |= {f"average.{key}": value for key, value in resume["average"]["values"].items()}
        momenta["updates"] = torch.tensor(resume["average"]["updates"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in TIMED:
            line.pop(key, None)
    return newest.name, weights, momenta, lines


def check_same(run, reference):
    name, weights, momenta, lines = state_of(run)
    expected_name, expected_weights, expected_momenta, expected_lines = state_of(reference)
    assert name == expected_name
    assert list(weights) == list(expected_weights)
    assert any("theta" in key for key in weights)
    assert any("running_mean" in key for key in weights)
    for key, value in expected_weights.items():
        assert torch.equal(weights[key], value), key
    assert len(momenta) == len(expected_momenta) > 3
    for key, value in expected_momenta.items():
        assert torch.equal(momenta[key], value), key
    assert lines == expected_lines


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_ten_times_at_random_moments_it_ends_bit_for_bit_as_if_never_stopped(tmp_path):
    settings = config()
    assert in_child(settings, tmp_path / "whole")
    moments = random.Random(time.time_ns())
    # One kill while the folder is made; the others anywhere in the first 20 of 30 steps (within a step, a write, an
    # epoch's end), so that the last one comes before the end on a fast machine too.
    targets = [0, *sorted(moments.sample(range(1, 20), KILLS - 1))]
    finished = [in_child(settings, tmp_path / "killed", target, moments.uniform(0, 0.06)) for target in targets]
    assert finished == [False] * KILLS, targets
    assert in_child(settings, tmp_path / "killed")
    check_same(tmp_path / "killed", tmp_path / "whole")
    steps = [line["step"] for line in state_of(tmp_path / "whole")[3] if line["kind"] == "step"]
    assert steps == list(range(3, 31, 3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(600)  # a slow machine compiles for minutes
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=OLD_PROCESSORS)])
def test_in_the_fast_mode_a_stopped_run_ends_bit_for_bit_too(tmp_path, monkeypatch, compiled):
    settings = config(engine=FAST, epochs=2, limit=24, options={"noise_delay": 0}, adversarial_delay=0)
    if compiled:  # as a long training is: its attack and the passes that train
        torch._dynamo.reset()  # what another test compiled would serve here, too
        monkeypatch.setattr(execution, "_COMPILED_PIXELS", 0)
        monkeypatch.setattr(execution, "_COMPILED_TRAINING_PIXELS", 0)
        made = []
        compiler = compiling._compile
        monkeypatch.setattr(compiling, "_compile", lambda *given: made.append(1) or compiler(*given))
    train(settings, out=tmp_path / "whole", progress=False)
    # Stopped at two moments: its folder is what a kill after the second step, then after the fourth, leaves behind.
    from learn2perturb.training import state

    for stop in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            real = state.Training.run_step

            def killed(self, x, y, stop=stop, real=real):
                if self.step == stop:
                    raise MemoryError  # nothing is saved on the way out, as with SIGKILL
                real(self, x, y)

            patch.setattr(state.Training, "run_step", killed)
            with pytest.raises(MemoryError):
                train(settings, out=tmp_path / "killed", progress=False)
    train(settings, out=tmp_path / "killed", progress=False)
    check_same(tmp_path / "killed", tmp_path / "whole")
    if compiled:
        assert made
        first = next(line for line in read_metrics(tmp_path / "whole") if line["kind"] == "epoch")
        assert 0 < first["compile_seconds"] < first["seconds"]


# --- averaged weights


def test_with_averaged_weights_a_stopped_run_ends_bit_for_bit_and_the_average_is_what_is_saved_and_returned(
    tmp_path, monkeypatch
):
    settings = small(weight_average=0.9, monitor=50, options={"noise_delay": 0}, adversarial_delay=0)
    whole = train(settings, out=tmp_path / "whole", progress=False)
    for step in (1, 2, 4):  # within an epoch, at its end before its scores, in the next
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                train(settings, out=tmp_path / "run", progress=False)
    run = train(settings, out=tmp_path / "run", progress=False)
    check_same(tmp_path / "run", tmp_path / "whole")
    _, saved, rest, _ = state_of(tmp_path / "run")
    assert rest["updates"] == 6
    finished = train(settings, out=tmp_path / "run", progress=False)  # and a finished run gives the average again
    loaded = load(tmp_path / "run")
    for key, value in saved.items():
        assert torch.equal(value, rest[f"average.{key}"]), key
        for model in (whole.model, run.model, finished.model, loaded):
            assert torch.equal(value, model.state_dict()[key]), key
        if value.is_floating_point():
            assert not torch.equal(value, rest[f"last.{key}"]), key


# --- Ctrl-C, finished runs, damaged folders


def small(**changes):
    return config(
        **{
            "epochs": 2,
            "limit": 96,
            "batch_size": 32,
            "monitor": 0,
            "attack_steps": 1,
            "checkpoint_minutes": 10.0,
            **changes,
        }
    )


def interrupt_at(monkeypatch, step, number):
    from learn2perturb.training import state

    real = state.Training.run_step

    def run_step(self, x, y):
        real(self, x, y)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(state.Training, "run_step", run_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 2])  # in the middle of an epoch; after its last batch, before its scores
def test_a_signal_saves_then_stops_and_the_run_goes_on_from_there(tmp_path, monkeypatch, number, step):
    settings = small(monitor=50)
    train(settings, out=tmp_path / "whole", progress=False)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, number)
        with pytest.raises(KeyboardInterrupt):
            train(settings, out=tmp_path / "run", progress=False)
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"{step + 1:010d}"]
    train(settings, out=tmp_path / "run", progress=False)
    check_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_returns_at_once_and_changes_nothing(tmp_path, monkeypatch):
    first = train(small(), out=tmp_path / "run", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr("learn2perturb.training.state.iterate", lambda *a, **k: pytest.fail("it trained"))
    monkeypatch.setattr("learn2perturb.training.folder.environment", lambda device: {"git": "of another day"})
    second = train(small(), out=tmp_path / "run", progress=False)
    assert second.metrics == first.metrics
    state = first.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in second.model.state_dict().items())
    assert {path: path.read_bytes() for path in before} == before


def finished(tmp_path):
    train(small(epochs=1), out=tmp_path / "run", progress=False)
    return tmp_path / "run"


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_another_run_is_refused_and_untouched(tmp_path):
    from learn2perturb.errors import ConfigError

    run = finished(tmp_path)
    before = snapshot(run)
    with pytest.raises(ConfigError, match=r"holds another run: .*seed \(0 there, 1 now\)"):
        train(small(epochs=1, seed=1), out=run, progress=False)
    assert snapshot(run) == before
    train(small(epochs=1, log_every=7, checkpoint_minutes=3.0), out=run, progress=False)  # these change no number


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path):
    run = finished(tmp_path)
    text = (run / "config.yaml").read_text()
    older = [line for line in text.splitlines() if line.split(":")[0] not in ("awp", "weight_average", "objective")]
    assert len(older) == len(text.splitlines()) - 3
    (run / "config.yaml").write_text("\n".join(older))
    train(small(epochs=1), out=run, progress=False)


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path):
    from learn2perturb.errors import ConfigError

    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ConfigError, match="is no run folder"):
            train(small(), out=out, progress=False)
    assert snapshot(tmp_path) == {pathlib.Path("thesis.tex"): b"years of work"}


def test_a_kill_while_the_config_was_written_does_not_lock_the_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.123.abcd.tmp").write_text("defen")
    train(small(epochs=1, limit=32), out=run, progress=False)
    assert checkpoints(run)


def test_settings_that_yaml_writes_otherwise_are_still_the_same_run(tmp_path):
    settings = small(epochs=1, limit=32, model_options={"normalization": ((0.5,), (0.25,))}, milestones=(1, 2))
    train(settings, out=tmp_path / "run", progress=False)
    train(settings, out=tmp_path / "run", progress=False)


@pytest.mark.parametrize("content", ["[1, 2]", "", "a: b: c", "\0"])
def test_a_damaged_config_is_named(tmp_path, content):
    from learn2perturb.errors import Learn2PerturbError

    run = finished(tmp_path)
    (run / "config.yaml").write_text(content)
    with pytest.raises(Learn2PerturbError, match=r"config\.yaml"):
        train(small(epochs=1), out=run, progress=False)


def test_a_resume_state_of_a_newer_version_or_another_kind_is_refused(tmp_path):
    from learn2perturb.errors import CheckpointError

    run = finished(tmp_path)
    path = checkpoints(run)[-1] / "resume.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99, newer than 2; update"):
        train(small(epochs=1), out=run, progress=False)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="it holds a list"):
        train(small(epochs=1), out=run, progress=False)


def test_other_data_or_another_network_in_the_same_folder_are_refused(tmp_path):
    from learn2perturb.errors import CheckpointError

    run = finished(tmp_path)
    x, y = torch.rand(200, 1, 8, 8), torch.arange(200) % 10
    with pytest.raises(CheckpointError, match=r"3 batches an epoch, these data give 7|batches"):
        train(
            small(epochs=1, limit=96),
            model=build_model("digits_cnn", input_shape=(1, 8, 8)),
            data=_Seven(x, y),
            out=run,
        )
    with pytest.raises(CheckpointError, match="another network"):
        train(small(epochs=1), model=build_model("resnet20", input_shape=(1, 8, 8)), out=run, progress=False)


class _Seven:
    """A source of seven batches."""

    num_examples, num_batches, input_shape, num_classes = 200, 7, (1, 8, 8), 10

    def __init__(self, x, y):
        self.x, self.y = x, y

    def epoch(self, epoch, start=0):
        yield from ()


def test_a_write_that_fails_leaves_the_checkpoints_before_it_loadable(tmp_path, monkeypatch):
    from learn2perturb.errors import CheckpointError
    from learn2perturb.runs import checkpoint

    run = finished(tmp_path)
    before = snapshot(run / "checkpoints")
    for target in ("_sync", "rename"):
        with monkeypatch.context() as patch:

            def full(*arguments):
                raise OSError(28, "No space left on device")

            patch.setattr(*((checkpoint, "_sync", full) if target == "_sync" else (pathlib.Path, "rename", full)))
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoint.write_checkpoint(run, 99, b"model", {"format": "x"})
        assert snapshot(run / "checkpoints") == before
    load(run)


def test_metrics_that_someone_deleted_come_back_from_the_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(small(), out=run, progress=False)
    (run / "metrics.jsonl").unlink()
    train(small(), out=run, progress=False)
    assert [line["epoch"] for line in state_of(run)[3] if line["kind"] == "epoch"] == [0, 1]
