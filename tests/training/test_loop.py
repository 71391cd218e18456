"""Training itself: strangers' networks and data, what it measures, that it learns, how it stops, what it loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learn2perturb.data import load_data
from learn2perturb.errors import CheckpointError, ConfigError, InputError, NonFiniteError
from learn2perturb.models import build_model
from learn2perturb.noise import fixed_noise, noise_modules, noise_sites
from learn2perturb.runs import load
from learn2perturb.runs.files import MODEL, checkpoints
from learn2perturb.training import TrainConfig, train


def config(**changes):
    values = {
        "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 1, "limit": 70, "batch_size": 32,
        "attack_steps": 1, "monitor": 20, "log_every": 2, "tensorboard": False, "engine": "plain", "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def own_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one short epoch; tests read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(config(), out=folder, progress=False)


# --- strangers


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(70, 1, 8, 8, generator=generator), torch.arange(70) % 10


DATA = {
    "tensors": images,
    "arrays": lambda: tuple(part.numpy() for part in images()),
    "dataset": lambda: TensorDataset(*images()),
    "loader": lambda: DataLoader(TensorDataset(*images()), batch_size=32, shuffle=True),
    "pair-of-loaders": lambda: tuple(DataLoader(TensorDataset(*images()), batch_size=32) for _ in range(2)),
    "pair-of-tensors": lambda: (images(), images()),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_strangers_network_trains_on_a_strangers_data_and_loads(kind, tmp_path):
    network = own_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    run = train(config(limit=None), model=network, data=DATA[kind](), out=tmp_path / "run", progress=False)
    assert run.model is network
    assert noise_sites(network) == ["1"]
    assert all(not torch.equal(network.state_dict()[key], value) for key, value in before.items() if "weight" in key)
    (line,) = run.metrics
    assert line["step"] == 3  # the last, smaller batch of 6 was trained on
    assert int(network[1].num_batches_tracked) == 6  # a clean and an adversarial pass a step
    assert ("test_clean" in line) is kind.startswith("pair")
    with pytest.raises(CheckpointError, match="network of your own; give an instance"):
        load(tmp_path / "run")
    twin = load(tmp_path / "run", model=own_network())
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad(), fixed_noise(twin), fixed_noise(network):
        assert torch.equal(twin(x), network(x))


def test_training_leaves_the_generators_of_the_caller_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(config(), progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(config(), progress=False)
    assert run.folder is None
    assert len(run.metrics) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"config": {}}, "config is a dict"), ({"config": config(), "model": "resnet20"}, "model is a str")],
)
def test_what_is_no_config_or_no_network_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        train(**arguments)


# --- what it measures and learns


def test_every_metric_is_there(finished):
    (line,) = finished.metrics
    for key in (
        "epoch", "step", "loss", "clean_loss", "adversarial_loss", "clean_accuracy", "adversarial_accuracy", "lr",
        "test_clean", "test_pgd", "test_n", "seconds", "images_per_second", "theta_mean", "theta_schedule",
        "theta_departure", "theta_loss_slope", "theta_regulariser_slope", "theta_slope_ratio",
    ):  # fmt: skip
        assert isinstance(line[key], (int, float)), key
    assert set(line["theta"]) == {"bn1", "block1.bn2", "block2.bn2"}
    assert set(line["theta"]["bn1"]) == {"mean", "spread", "minimum", "maximum", "departure"}
    assert line["loss"] == pytest.approx(0.5 * line["clean_loss"] + 0.5 * line["adversarial_loss"], rel=1e-5)
    assert line["theta_slope_ratio"] == pytest.approx(
        line["theta_loss_slope"] / line["theta_regulariser_slope"], rel=1e-5
    )
    assert line["test_n"] == 20
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        assert (finished.folder / name).stat().st_size
    lines = [json.loads(text) for text in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(one["kind"], one["step"]) for one in lines] == [("step", 2), ("epoch", 3)]


def test_it_learns_the_digits_and_theta_moves_off_the_schedule():
    run = train(
        config(epochs=6, limit=None, monitor=300, attack_steps=1, eps=0.05, attack_step_size=0.05), progress=False
    )
    last = run.metrics[-1]
    assert last["test_clean"] > 0.9
    assert last["test_pgd"] > 0.5
    assert last["theta_mean"] != pytest.approx(0.25, abs=1e-4)
    assert last["theta_departure"] > 1e-3
    losses = [line["loss"] for line in run.metrics]
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    one, two, other = (train(config(seed=seed), progress=False).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


# --- NaN


class Breaks(nn.Module):
    """Gives NaN from its ``after``-th pass in train mode on."""

    def __init__(self, after):
        super().__init__()
        self.inner, self.after, self.passes = own_network(), after, 0

    def forward(self, x):
        self.passes += self.training
        return self.inner(x) * (float("nan") if self.passes > self.after else 1.0)


def test_a_nan_stops_with_step_batch_and_the_last_good_checkpoint_named(tmp_path):
    settings = config(defense="none", epochs=3, monitor=0)
    with pytest.raises(NonFiniteError) as caught:
        train(settings, model=Breaks(4), data=images(), out=tmp_path / "run", progress=False)
    (good,) = checkpoints(tmp_path / "run")
    for part in ("nan", "step 4", "epoch 1, batch 1", str(good), "lower lr"):
        assert part in str(caught.value)
    state = load(tmp_path / "run", model=Breaks(99)).state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_nan_before_any_checkpoint_says_so(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 0 .*no checkpoint yet"):
        train(config(defense="none"), model=Breaks(0), data=images(), out=tmp_path / "run", progress=False)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = own_network()
            self.register_buffer("bad", torch.zeros(1))

        def forward(self, x):
            self.bad += float("inf")
            return self.inner(x)

    with pytest.raises(NonFiniteError, match="weight 'bad' is not finite"):
        train(config(defense="none"), model=Poisoned(), data=images(), out=tmp_path / "run", progress=False)
    assert checkpoints(tmp_path / "run") == []


# --- load


def test_a_run_folder_and_its_file_give_the_same_network(finished):
    newest = checkpoints(finished.folder)[-1]
    for source in (finished.folder, str(finished.folder), newest / MODEL):
        network = load(source)
        assert not network.training
        assert all(module.enabled for module in noise_modules(network))
        for key, value in finished.model.state_dict().items():
            assert torch.equal(network.state_dict()[key], value)


def test_a_wrong_network_is_refused_and_left_without_noise(finished):
    for wrong in (own_network(), build_model("resnet20", input_shape=(1, 8, 8))):
        keys = list(wrong.state_dict())
        with pytest.raises(CheckpointError, match="does not fit.*give the network it was trained with"):
            load(finished.folder, model=wrong)
        assert list(wrong.state_dict()) == keys
    with pytest.raises(CheckpointError, match="model is a str"):
        load(finished.folder, model="resnet20")


def test_what_is_missing_or_damaged_is_named(finished, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give a run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(tmp_path)
    whole = (checkpoints(finished.folder)[-1] / MODEL).read_bytes()
    path = tmp_path / "cut.safetensors"
    for content in (b"", whole[:4], whole[:200], whole[:-1], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cut\.safetensors.*use another checkpoint"):
            load(path)


def test_a_newer_version_and_a_strangers_file_are_told_apart(tmp_path):
    weights = own_network().state_dict()
    save_file(weights, tmp_path / "newer.safetensors", metadata={"learn2perturb": json.dumps({"version": 9})})
    with pytest.raises(CheckpointError, match="version 9, newer than 1; update"):
        load(tmp_path / "newer.safetensors")
    save_file(weights, tmp_path / "header.safetensors", metadata={"learn2perturb": "{"})
    with pytest.raises(CheckpointError, match="header of .* is damaged"):
        load(tmp_path / "header.safetensors")
    save_file(weights, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="does not say"):
        load(tmp_path / "plain.safetensors")
    network = load(tmp_path / "plain.safetensors", model=own_network())
    assert all(torch.equal(network.state_dict()[key], value) for key, value in weights.items())


def test_the_tensorboard_of_a_run_is_written(tmp_path):
    train(config(tensorboard=True, limit=32, monitor=0), out=tmp_path / "run", progress=False)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_a_validation_share_is_monitored_in_place_of_the_test_set():
    (line,) = train(config(validation=0.1, limit=32), progress=False).metrics
    assert "validation_clean" in line
    assert "test_clean" not in line
    assert len(load_data("digits").split(0.1, 0)[1]) > line["validation_n"] == 20


def test_a_label_beyond_the_classes_in_a_later_batch_is_one_clear_line():
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    y[13] = 10
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    with pytest.raises(InputError, match=r"^label 10 is outside 0\.\.9, the network's classes"):
        train(config(), model=build_model("digits_cnn", input_shape=(1, 8, 8)), data=loader, progress=False)
