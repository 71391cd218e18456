"""A run folder knows its data and its network, heals what it can, and never passes off one thing as another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from learn2perturb.defenses.objectives import Losses
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.runs import load, lock
from learn2perturb.runs.checkpoint import read_model, read_resume, resume_bytes, sealed
from learn2perturb.runs.files import MODEL, RESUME, checkpoints
from learn2perturb.training import TrainConfig, read_metrics, train
from learn2perturb.training.alternating import Iteration
from learn2perturb.training.metrics import Totals, noise_report, parse_metrics

X, Y = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def config(**settings) -> TrainConfig:
    common = {
        "defense": "none", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 2, "batch_size": 16,
        "monitor": 0, "device": "cpu", "engine": "plain", "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(**(common | settings))


def trained(out, net=None, data=(X, Y), **settings):
    return train(config(**settings), model=network() if net is None else net, data=data, out=out, progress=False)


class Items(Dataset):
    def __init__(self, x=X, y=Y, transform=lambda image: image):
        self.x, self.y, self.transform = x, y, transform

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.transform(self.x[index]), int(self.y[index])


def flipped(image):
    return image.flip(-1)


def noisy(image):
    return (image + 0.1 * torch.rand_like(image)).clamp(0, 1)


OTHERS = {
    "images": lambda: (1 - X, Y),
    "labels": lambda: (X, Y.flip(0)),
    "one pixel": lambda: (X + torch.eye(8).mul(1e-6) * (torch.arange(32) == 31).view(-1, 1, 1, 1) * (X < 0.9), Y),
    "a loader's images": lambda: DataLoader(Items(1 - X), 16),
    "a loader's labels": lambda: DataLoader(Items(X, Y.flip(0)), 16),
    "a transform": lambda: DataLoader(Items(transform=flipped), 16),
    "a random transform": lambda: DataLoader(Items(transform=noisy), 16),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_data_of_the_same_size_are_refused(other, tmp_path):
    def first():
        return DataLoader(Items(), 16) if "transform" in other or "loader" in other else (X, Y)

    trained(tmp_path, data=first())
    again = trained(tmp_path, data=first())  # the same is the same, in memory or through a loader
    assert fingerprint_of_weights(again.model) == fingerprint_of_weights(load(tmp_path, model=network()))
    with pytest.raises(CheckpointError, match="was trained on other data.*fingerprint.*another --out"):
        trained(tmp_path, data=OTHERS[other]())


def test_data_through_a_random_transform_are_those_of_before(tmp_path):
    trained(tmp_path, data=DataLoader(Items(transform=noisy), 16))
    trained(tmp_path, data=DataLoader(Items(transform=noisy), 16))


def test_a_finished_run_does_not_stand_for_another_instance(tmp_path):
    trained(tmp_path, network(0))
    with pytest.raises(
        CheckpointError, match="began from other weights.*is finished; learn2perturb.load.*another --out"
    ):
        trained(tmp_path, network(1))
    sigmoid = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
    sigmoid.load_state_dict(network(0).state_dict())
    with pytest.raises(CheckpointError, match="was trained on a network of other layers"):
        trained(tmp_path, sigmoid)


def cut(out, epochs: int = 1):
    """Leave a finished run as it was after some epochs."""
    found = checkpoints(out)
    for path in found[epochs - len(found) :] if epochs < len(found) else []:
        shutil.rmtree(path)


def test_an_unfinished_run_goes_on_from_its_checkpoint_and_says_whose_weights_they_are(tmp_path, capsys):
    whole = trained(tmp_path, network(0))
    cut(tmp_path)
    resumed = trained(tmp_path, network(1))
    assert "began from other weights than those of the network given" in capsys.readouterr().err
    assert fingerprint_of_weights(resumed.model) == fingerprint_of_weights(whole.model)


def test_runs_of_before_have_no_identity_and_resume(tmp_path):
    whole = trained(tmp_path)
    cut(tmp_path)
    (checkpoint,) = checkpoints(tmp_path)
    state = read_resume(checkpoint)
    for key in ("identity", "metrics", "compiled"):
        state.pop(key)
    torch.save(state | {"format": "learn2perturb.resume", "version": 1}, checkpoint / RESUME)
    resumed = trained(tmp_path)
    assert fingerprint_of_weights(resumed.model) == fingerprint_of_weights(whole.model)
    assert [line["epoch"] for line in resumed.metrics] == [0, 1]


# --- what is damaged


def flip(path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("part", [MODEL, RESUME])
@pytest.mark.parametrize("place", [0.1, 0.4, 0.7])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_serves(part, place, tmp_path, capsys):
    whole = trained(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    flip(newest / part, place)
    resumed = trained(tmp_path)
    assert "going on from the one before" in capsys.readouterr().err
    assert fingerprint_of_weights(resumed.model) == fingerprint_of_weights(whole.model)
    assert checkpoints(tmp_path)[-1] == newest
    assert newest.with_name(f"{newest.name}.damaged").is_dir()  # nothing is deleted
    read_model(newest / MODEL), read_resume(newest)


def test_a_flipped_momentum_is_noticed(tmp_path):
    """Its file is read without complaint: only a checksum can tell."""
    trained(tmp_path)
    path = checkpoints(tmp_path)[-1] / RESUME
    state = read_resume(path.parent)
    (momentum,) = [v["momentum_buffer"] for k, v in state["optimizers"]["weights"]["state"].items() if k == 0]
    outer = torch.load(path, weights_only=True)
    at = bytes(outer["state"].numpy()).find(momentum.numpy().tobytes())
    assert at > 0
    outer["state"][at] ^= 1
    torch.save(outer, path)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        read_resume(path.parent)


def test_no_whole_checkpoint_is_an_error(tmp_path):
    trained(tmp_path)
    for checkpoint in checkpoints(tmp_path):
        (checkpoint / RESUME).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of .* can be read: .*another --out"):
        trained(tmp_path)


def test_weights_or_a_header_that_were_changed_do_not_load(tmp_path):
    trained(tmp_path / "run")
    path = checkpoints(tmp_path / "run")[-1] / MODEL
    state, header = read_model(path)
    key = next(iter(state))
    from safetensors.torch import save

    changed = {
        "weights": save({**state, key: state[key] + 1e-3}, metadata={"learn2perturb": json.dumps(header)}),
        "header": save(state, metadata={"learn2perturb": json.dumps(header | {"epoch": 7})}),
    }
    for content in changed.values():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged: its weights or header are not what was written"):
            load(tmp_path / "run", model=network())
    path.write_bytes(sealed(state, header))
    load(tmp_path / "run", model=network())


def perturbable() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_noise_that_a_header_declares_must_be_in_the_weights(tmp_path):
    settings = {"defense": "learn2perturb", "attack_steps": 1, "options": {"sites": ["0"]}}
    trained(tmp_path, perturbable(), **settings)
    for checkpoint in checkpoints(tmp_path)[:-1]:
        shutil.rmtree(checkpoint)
    path = checkpoints(tmp_path)[-1] / MODEL
    state, header = read_model(path)
    thetas = [key for key in state if key.endswith("theta")]
    assert thetas
    path.write_bytes(sealed({key: value for key, value in state.items() if key not in thetas}, header))
    with pytest.raises(CheckpointError, match="declares noise.*theta"):
        load(path, model=perturbable())
    with pytest.raises(CheckpointError, match="declares noise.*theta"):
        trained(tmp_path, perturbable(), **settings)


DAMAGE = {
    "torn": lambda text: text[:-7],
    "cut": lambda text: text[: len(text) // 3],
    "gone": lambda text: b"",
    "a doubled line": lambda text: text.split(b"\n")[0] + b"\n" + text,
    "a changed number": lambda text: text.replace(b'"epoch": 0', b'"epoch": 5'),
    "NUL": lambda text: text[:20] + b"\0" * 30 + text[50:],
    "half a line more": lambda text: text + b'{"kind": "epo',
    "lines of another time": lambda text: text + text,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("finished", [True, False])
def test_metrics_heal_without_hands(damage, finished, tmp_path):
    trained(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(tmp_path)]
    if not finished:
        cut(tmp_path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    run = trained(tmp_path)
    assert [{k: v for k, v in line.items() if "second" not in k} for line in run.metrics] == whole
    assert parse_metrics(path.read_bytes())[1] is None


def test_every_prefix_of_a_line_is_read_past_and_a_torn_middle_is_named(tmp_path):
    first, second = (json.dumps({"kind": "epoch", "epoch": n}).encode() + b"\n" for n in range(2))
    for length in range(len(second) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(first + second[:length])
        assert [line["epoch"] for line in read_metrics(tmp_path)] == ([0, 1] if length >= len(second) - 1 else [0])
    (tmp_path / "metrics.jsonl").write_bytes(first[:9] + b"\n" + second)
    with pytest.raises(CheckpointError, match="damaged in line 1; run the training's command again"):
        read_metrics(tmp_path)


# --- names, locks, folders


def test_copies_and_backups_of_checkpoints_are_neither_taken_nor_deleted(tmp_path):
    trained(tmp_path, epochs=3)
    folder = tmp_path / "checkpoints"
    newest = checkpoints(tmp_path)[-1]
    for name in (f"{newest.name}-copy", f"{newest.name} (1)", "9", "99_backup", f"{newest.name}.bak"):
        shutil.copytree(newest, folder / name)
    assert checkpoints(tmp_path)[-1] == newest
    cut(tmp_path, 1)
    trained(tmp_path, epochs=3)
    assert sum(path.is_dir() for path in folder.iterdir()) == 5 + len(checkpoints(tmp_path))


def test_steps_are_ordered_as_numbers(tmp_path):
    trained(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    shutil.copytree(newest, newest.with_name("12345678901"))
    assert checkpoints(tmp_path)[-1].name == "12345678901"


def test_a_second_training_gets_one_line_and_a_dead_ones_lock_is_gone(tmp_path):
    trained(tmp_path)
    holding = (
        "import sys, pathlib; from learn2perturb.runs import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another training is at work in .* \(process {process.pid} on .*--out"):
            trained(tmp_path)
    finally:
        process.kill()
        process.communicate()
    trained(tmp_path)


def test_a_refused_training_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError):
        trained(tmp_path / "new" / "run", batch_size=0)
    assert not (tmp_path / "new" / "run").exists()
    with lock.held(tmp_path), pytest.raises(ConfigError, match="at work"), lock.held(tmp_path):
        pass


def test_temporary_files_of_the_living_are_left_alone(tmp_path):
    trained(tmp_path)
    cut(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".config.yaml.{pid}.0123abcd.tmp": pid for pid in (os.getppid(), dead.pid)}
    folders = {f".0000000099.{pid}.tmp": pid for pid in (os.getppid(), dead.pid)}
    for name in names:
        (tmp_path / name).write_text("half")
    for name in folders:
        (tmp_path / "checkpoints" / name).mkdir()
    trained(tmp_path)
    for name, pid in names.items():
        assert (tmp_path / name).exists() == (pid == os.getppid())
    for name, pid in folders.items():
        assert (tmp_path / "checkpoints" / name).exists() == (pid == os.getppid())


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_goes_away_under_a_training_is_written_again(how, tmp_path, monkeypatch, capsys):
    from learn2perturb.training import state

    out, step = tmp_path / "run", state.Training.run_step
    steps = []

    def going(self, x, y):
        step(self, x, y)
        steps.append(1)
        if len(steps) == 3:
            shutil.rmtree(out) if how == "deleted" else out.rename(tmp_path / "away")

    monkeypatch.setattr(state.Training, "run_step", going)
    run = trained(out)
    assert "was deleted or moved; it is written again" in capsys.readouterr().err
    assert [line["epoch"] for line in read_metrics(out)] == [0, 1]
    assert fingerprint_of_weights(load(out, model=network(5))) == fingerprint_of_weights(run.model)
    assert {"config.yaml", "environment.json"} <= {path.name for path in out.iterdir()}


# --- extra state


class Named(nn.Sequential):
    def __init__(self, *layers, extra=None):
        super().__init__(*layers)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


EXTRAS = {
    "dict": {"labels": ["cat", "dog"], "n": 3, 4: (1.5, None, True)},
    "tensors": {"scale": torch.arange(3.0), "deep": [torch.ones(2, dtype=torch.int64)]},
    "bytes": b"\x00\xff",
    "a tensor": torch.arange(4.0),
    "text": "plain",
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_extra_state_is_saved_loaded_and_resumed(extra, average, tmp_path):
    def net(value):
        return Named(nn.Flatten(), nn.Linear(64, 10), extra=value)

    torch.manual_seed(0)
    first = net(EXTRAS[extra])
    trained(tmp_path, first, weight_average=average)
    loaded = load(tmp_path, model=net(None))
    assert alike(loaded.extra, EXTRAS[extra])
    cut(tmp_path)
    torch.manual_seed(0)
    again = trained(tmp_path, net(EXTRAS[extra]), weight_average=average)
    assert alike(again.model.extra, EXTRAS[extra])


@pytest.mark.parametrize("value", [object(), {"f": print}, {1, 2}, [nn.ReLU()]])
def test_extra_state_that_is_no_plain_data_is_refused_before_the_training(value, tmp_path, monkeypatch):
    monkeypatch.setattr("learn2perturb.training.state.iterate", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(ConfigError, match="_extra_state.*which a checkpoint cannot"):
        trained(tmp_path / "run", Named(nn.Flatten(), nn.Linear(64, 10), extra=value))


# --- metrics


def test_departure_is_the_root_mean_square_and_the_largest_of_the_sites():
    import learn2perturb as l2p

    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    l2p.perturb(net, input_shape=(1, 8, 8), sites=["0", "2"], init=0.5)
    near, far = l2p.noise_parameters(net)
    with torch.no_grad():
        near.fill_(0.6)
        far.fill_(0.9)
        far.view(-1)[0] = 1.3
    report = noise_report(net, 0.5)
    # A constant distance from the schedule is a departure, though nothing scatters.
    assert report["theta"]["0"]["departure"] == pytest.approx(0.1)
    expected = ((far - 0.5) ** 2).mean().sqrt().item()
    assert report["theta"]["2"]["departure"] == pytest.approx(expected)
    assert report["theta_departure"] == pytest.approx(expected)


def test_means_are_weighted_by_examples():
    totals = Totals(torch.device("cpu"))
    totals.add({"loss": 1.0}, 90)
    totals.add({"loss": 2.0, "other": 4.0}, 10)
    totals.add({"loss": 2.0, "other": 6.0}, 30)
    assert totals.means()["loss"] == pytest.approx((90 + 20 + 60) / 130)
    assert totals.means()["other"] == pytest.approx((40 + 180) / 40)
    again = Totals(torch.device("cpu"), totals.state())
    again.add({"loss": 0.0}, 130)
    assert again.means()["loss"] == pytest.approx(170 / 260)


def test_of_an_iteration_losses_are_weighted_by_examples_and_slopes_are_not():
    """A short last batch counts for its images in a loss, and as a step like any other in what theta feels."""
    totals = Totals(torch.device("cpu"))
    for loss, right, slope, examples in ((1.0, [True, False], 0.2, 2), (4.0, [True], 0.6, 1)):
        losses = Losses(torch.tensor(loss), clean_correct=torch.tensor(right), extra={"part": torch.tensor(loss)})
        totals.add_iteration(Iteration(losses, torch.tensor(slope), torch.tensor(0.1)), examples)
    assert totals.means() == pytest.approx(
        {
            "loss": (2 * 1 + 4) / 3, "part": (2 * 1 + 4) / 3, "clean_accuracy": 2 / 3, "theta_loss_slope": 0.4,
            "theta_regulariser_slope": 0.1, "theta_slope_ratio": 4.0,
        }
    )  # fmt: skip


def test_what_is_monitored_is_the_test_set_and_not_the_training_set(tmp_path):
    """Labels of the one set are shifted: whoever reads the other set reads other accuracies."""
    from learn2perturb.data import load_data
    from learn2perturb.progress import Reporter
    from learn2perturb.training.state import Training

    made = Training(config(monitor=40).resolve(), None, None, None, Reporter(False))
    test, training = load_data("digits", "test"), load_data("digits", "train")
    watched = next(iter(made.monitor.epoch(0)))[0]
    held = {tuple(image.flatten().tolist()) for image in (test.images.float() / 255)}
    others = {tuple(image.flatten().tolist()) for image in (training.images.float() / 255)} - held
    seen = [tuple(image.flatten().tolist()) for image in watched]
    assert all(image in held for image in seen)
    assert not any(image in others for image in seen)
    assert made.monitored == "test"


def test_a_resume_state_holds_its_own_checksum():
    content = resume_bytes({"format": "learn2perturb.resume"})
    outer = torch.load(__import__("io").BytesIO(content), weights_only=True)
    assert outer["version"] == 2
    assert len(outer["sha256"]) == 64
