"""Fine-tuning: what a training begins with, what stays frozen, how it steps, which epoch is kept; each resumes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.defenses.base import Clock, learning_rate_factor
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.experiments.store import run_address
from learn2perturb.models import build_model
from learn2perturb.runs.checkpoint import read_model, read_resume
from learn2perturb.runs.files import MODEL, checkpoints
from learn2perturb.training import TrainConfig, train
from learn2perturb.training.metrics import Totals

HELD_OUT = {"validation": 0.2, "monitor": 8}


def config(**changes):
    """Return a config of four steps an epoch, a fraction of a second."""
    values = {
        "defense": "learn2perturb", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 2,
        "limit": 20, "batch_size": 8, "attack_steps": 1, "eps": 0.1, "monitor": 0, "tensorboard": False,
        "engine": "plain", "device": "cpu", "schedule": "constant",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def run(out=None, **changes):
    return train(config(**changes), out=out, progress=False)


def digits_cnn(seed=0, classes=10) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("digits_cnn", classes, input_shape=(1, 8, 8))


# --- addresses and defaults


def test_a_training_of_before_has_the_address_it_had():
    # Computed before there were any of these settings: studies find what they have trained.
    assert run_address(TrainConfig().resolve(), "d") == "7d86101d71f4c134"
    small = TrainConfig(defense="trades", model="digits_cnn", dataset="digits", recipe="fast", epochs=3)
    assert run_address(small.resolve(), "d") == "6db6e1b25824eacb"
    assert run_address(TrainConfig(defense="adv_bnn", recipe="common").resolve(), "d") == "be7b7b03a3b3c432"


CHANGES = {
    "adamw": {"optimizer": "adamw", "optimizer_options": {"betas": [0.8, 0.9]}},
    "rmsprop": {"optimizer": "rmsprop"},
    "warm-up": {"warmup_epochs": 1.5},
    "clipping": {"clip_norm": 0.05},
    "accumulation": {"accumulate": 3},
    "smoothing": {"label_smoothing": 0.2},
    "frozen": {"freeze": ["conv1", "block1"]},
    "relative": {"options": {"init": "relative"}},
    "l2": {"norm": "l2", "eps": 0.5},
    "best": {"keep_best": True, **HELD_OUT},
    "best of averages": {"keep_best": True, "weight_average": 0.9, **HELD_OUT},
    "patience": {"early_stopping": 1, "epochs": 3, **HELD_OUT},
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_option_changes_the_training_and_its_address(what):
    base, other = config(), config(**CHANGES[what])
    assert run_address(base.resolve(), "d") != run_address(other.resolve(), "d")


def state_of(out):
    newest = checkpoints(out)[-1]
    resume = read_resume(newest)
    for key in ("seconds", "metrics", "metrics_bytes"):
        resume.pop(key)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None), line.pop("images_per_second", None)
    return newest.name, read_model(newest / MODEL), resume, lines


def assert_equal(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{place}")
    else:
        assert one == other, where


# Several at a time, since a training takes its time.
TOGETHER = [
    ("adamw", "warm-up", "clipping", "accumulation", "smoothing", "frozen", "relative"),
    ("rmsprop", "l2", "best of averages"),
    ("best", "patience"),
]


@pytest.mark.parametrize("what", TOGETHER, ids=" ".join)
def test_stopped_in_any_epoch_it_goes_on_bit_for_bit(what, tmp_path, monkeypatch):
    changes = {key: value for one in what for key, value in CHANGES[one].items()}
    run(tmp_path / "whole", **changes)
    add, seen = Totals.add_iteration, []

    def stops(self, *arguments):
        seen.append(1)
        if len(seen) in (3, 7):  # within the first epoch, and within the second
            raise RuntimeError("stopped")
        add(self, *arguments)

    monkeypatch.setattr(Totals, "add_iteration", stops)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path / "parts", checkpoint_minutes=1e-6, **changes)
    run(tmp_path / "parts", **changes)
    assert_equal(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_every_option_is_among_those_that_resume():
    assert {one for some in TOGETHER for one in some} == set(CHANGES)


# --- what a training begins with


def test_it_begins_with_the_weights_of_a_run_and_of_a_file(tmp_path):
    first = run(tmp_path / "first", defense="none")
    for source in (str(tmp_path / "first"), str(checkpoints(tmp_path / "first")[-1] / MODEL)):
        begun = run(None, epochs=0, init_from=source)
        plain = l2p.remove_noise(begun.model)
        assert fingerprint_of_weights(plain) == fingerprint_of_weights(first.model)
    torch.save({"state_dict": {f"module.{k}": v for k, v in first.model.state_dict().items()}}, tmp_path / "w.pt")
    begun = run(None, epochs=0, defense="none", init_from=str(tmp_path / "w.pt"))
    assert fingerprint_of_weights(begun.model) == fingerprint_of_weights(first.model)


def test_noise_that_is_the_same_is_taken_over_and_other_noise_begins_anew(tmp_path):
    first = run(tmp_path / "first", options={"noise_delay": 0})
    again = run(None, epochs=0, init_from=str(tmp_path / "first"))
    assert fingerprint_of_weights(again.model) == fingerprint_of_weights(first.model)
    other = run(None, epochs=0, init_from=str(tmp_path / "first"), options={"granularity": "layer", "init": 0.5})
    assert {float(theta.detach()) for theta in l2p.noise_parameters(other.model)} == {0.5}


def test_a_last_layer_of_other_classes_starts_anew(tmp_path):
    torch.save(digits_cnn(3, classes=7).state_dict(), tmp_path / "w.pt")
    begun = run(None, epochs=0, defense="none", init_from=str(tmp_path / "w.pt"))
    assert torch.equal(begun.model.conv1.weight, digits_cnn(3, 7).conv1.weight)
    assert len(begun.model.fc.weight) == 10


def test_what_it_cannot_begin_with_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(None, init_from=str(tmp_path / "none.pt"))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="'conv1.weight'.* missing"):
        run(None, init_from=str(tmp_path / "w.pt"))


def test_other_weights_in_the_file_are_told_from_those_that_a_run_began_with(tmp_path):
    torch.save(digits_cnn(3).state_dict(), tmp_path / "w.pt")
    run(tmp_path / "run", defense="none", init_from=str(tmp_path / "w.pt"))
    torch.save(digits_cnn(4).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="began from other weights"):
        run(tmp_path / "run", defense="none", init_from=str(tmp_path / "w.pt"))


# --- what stays as it is


@pytest.mark.parametrize("given_in_eval_mode", [False, True])
def test_frozen_parts_keep_weights_and_statistics_and_the_rest_trains(given_in_eval_mode):
    model, before = digits_cnn(), digits_cnn().state_dict()
    done = train(
        config(freeze=["conv1", "bn1", "block1", "fc.bias"]), model=model.train(not given_in_eval_mode),
        data=l2p.load_data("digits", "train", limit=28), progress=False,
    ).model.state_dict()  # fmt: skip
    frozen = [key for key in before if key.startswith(("conv1.", "bn1.", "block1.", "fc.bias"))]
    assert len(frozen) > 10
    assert all(torch.equal(before[key], done[key]) for key in frozen)
    changed = [key for key in before if key not in frozen and not torch.equal(before[key], done[key])]
    assert "fc.weight" in changed and any("running_mean" in key for key in changed)


def test_theta_within_a_frozen_part_is_learned():
    done = run(freeze=["conv1", "bn1"])
    theta = done.model.bn1.perturbation.theta
    assert not torch.equal(theta, torch.full_like(theta, 0.25))


def test_a_glob_that_names_nothing_is_refused():
    with pytest.raises(ConfigError, match="freeze 'block7' names no submodule or parameter; there are .*block1"):
        run(freeze=["block7"])


# --- theta's first value


def test_theta_begins_relative_to_the_features_of_its_site():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    with torch.no_grad():
        net[1].weight.fill_(8.0)  # features eight times as large as the paper's
    statistics = net[1].running_mean.clone()
    data = l2p.load_data("digits", "train", limit=28)
    options = {"init": "relative", "init_share": 0.1, "sites": ["1"]}
    done = train(config(epochs=0, options=options), model=net, data=data, progress=False)
    assert float(done.model[1].perturbation.theta.detach().mean()) == pytest.approx(0.8, rel=0.01)
    assert torch.equal(done.model[1].running_mean, statistics)
    with pytest.raises(ConfigError, match="init is 'relativ'; give a number such as 0.25, or 'relative'"):
        run(options={"init": "relativ"})


# --- steps


def test_warm_up_is_a_line_and_then_the_schedule():
    settings = config(schedule="cosine", warmup_epochs=1.0, epochs=4).resolve().closed()
    plain = config(schedule="cosine", epochs=4).resolve().closed()
    with_, without = learning_rate_factor(settings, 4), learning_rate_factor(plain, 4)
    clocks = [Clock(epoch, batch, 4, stage_epoch=epoch) for epoch in range(4) for batch in range(4)]
    shares = [with_(clock) / without(clock) for clock in clocks[:-1]]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert shares[4:] == [1.0] * 11


def test_accumulated_parts_make_the_step_of_the_whole_batch():
    # Without BatchNorm, noise and random starts a part is computed as within the whole.
    def trained(**changes):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        settings = {"defense": "pgd_at", "attack_random_start": False, "momentum": 0.0, "nesterov": False, **changes}
        data = l2p.load_data("digits", "train", limit=26)
        return train(config(**settings), model=net, data=data, progress=False)

    whole, parts = trained(), trained(accumulate=3)
    assert torch.allclose(whole.model[1].weight, parts.model[1].weight, rtol=0, atol=1e-12)
    for key in ("loss", "clean_loss", "adversarial_accuracy", "clean_accuracy"):
        assert parts.metrics[-1][key] == pytest.approx(whole.metrics[-1][key], abs=1e-6)


def test_clipping_bounds_the_step_of_the_weights():
    before = digits_cnn().state_dict()
    done = train(
        config(
            epochs=1, limit=8, clip_norm=1e-3, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, defense="none"
        ),
        model=digits_cnn(), data=l2p.load_data("digits", "train", limit=8), progress=False,
    ).model  # fmt: skip
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in done.named_parameters()]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_optimisers_are_made_as_they_are_named():
    line = run(optimizer="adamw", epochs=1).metrics[-1]
    assert line["lr"] == 1e-3
    assert run(optimizer="adamw", lr=0.01, epochs=1).metrics[-1]["lr"] == 0.01
    with pytest.raises(ConfigError, match="optimizer is 'adan'; allowed: sgd, adam, adamw"):
        config(optimizer="adan")
    with pytest.raises(UnknownNameError, match="option of optimizer 'adamw': 'beta'.*did you mean 'betas'"):
        run(optimizer="adamw", optimizer_options={"beta": 0.9})
    with pytest.raises(ConfigError, match="refuses its options .*change optimizer_options"):
        run(optimizer="adamw", optimizer_options={"betas": [2.0, 0.9]})
    with pytest.raises(ConfigError, match="optimizer is 'adamw', but AdvBNN has its own"):
        run(defense="adv_bnn", optimizer="adamw")


# --- more epochs


def test_more_epochs_go_on_as_if_all_had_been_asked_for_at_once(tmp_path):
    run(tmp_path / "more", epochs=2)
    run(tmp_path / "more", epochs=3)
    run(tmp_path / "whole", epochs=3)
    (name, (weights, header), resume, lines), whole = state_of(tmp_path / "more"), state_of(tmp_path / "whole")
    assert header.pop("extended") == resume["extended"] == [{"epoch": 2, "planned": 2}]
    resume["extended"] = []
    header.pop("fingerprint"), whole[1][1].pop("fingerprint")
    assert_equal((name, (weights, header), resume, lines), whole)


def test_a_schedule_over_all_epochs_rises_to_where_the_longer_one_is_and_says_so(tmp_path, capsys):
    run(tmp_path, epochs=2, schedule="cosine")
    lines = run(tmp_path, epochs=4, schedule="cosine").metrics
    assert (
        "2 epochs were planned; going on to 4, at the learning rate that schedule 'cosine' has"
        in capsys.readouterr().err
    )
    rates = [line["lr"] for line in lines]
    assert rates[1] < rates[2] > rates[3]
    assert "theta_schedule" in lines[1] and "theta_schedule" not in lines[3]  # which that formula does not know
    assert read_model(checkpoints(tmp_path)[-1] / MODEL)[1]["extended"] == [{"epoch": 2, "planned": 2}]


def test_fewer_epochs_and_other_settings_are_another_run(tmp_path):
    run(tmp_path, epochs=2)
    for changes in ({"epochs": 1}, {"epochs": 3, "lr": 0.2}):
        with pytest.raises(ConfigError, match="holds another run"):
            run(tmp_path, **changes)


def test_epochs_that_a_defense_shares_out_cannot_be_more_later(tmp_path):
    run(tmp_path, defense="bat", epochs=2)
    with pytest.raises(ConfigError, match="shares its epochs out among stages.*another --out"):
        run(tmp_path, defense="bat", epochs=4)


# --- which epoch is kept


def scored(monkeypatch, scores):
    """Let the monitored accuracy be what a test says, one an epoch."""
    from learn2perturb.training.state import Training

    def score(self):
        return {"validation_clean": 0.5, "validation_pgd": scores[self.epoch], "validation_n": 8}

    monkeypatch.setattr(Training, "monitor_scores", score)


def test_the_best_epoch_is_what_is_saved_returned_and_told(tmp_path, monkeypatch):
    scored(monkeypatch, [0.1, 0.4, 0.4, 0.2])
    best = run(tmp_path / "best", epochs=4, keep_best=True, **HELD_OUT)
    at_two = run(tmp_path / "two", epochs=2, **HELD_OUT)  # the first of equals
    assert fingerprint_of_weights(best.model) == fingerprint_of_weights(at_two.model)
    assert fingerprint_of_weights(l2p.load(tmp_path / "best")) == fingerprint_of_weights(best.model)
    header = read_model(checkpoints(tmp_path / "best")[-1] / MODEL)[1]
    assert (header["epoch"], header["step"]) == (2, 2 * 3)
    assert [line["best_epoch"] for line in best.metrics] == [0, 1, 1, 1]


def test_a_training_ends_when_no_epoch_has_been_better_for_long_enough(tmp_path, monkeypatch):
    scored(monkeypatch, [0.1, 0.4, 0.3, 0.4, 0.9])
    done = run(tmp_path, epochs=5, early_stopping=2, **HELD_OUT)
    assert len(done.metrics) == 4
    again = run(tmp_path, epochs=5, early_stopping=2, **HELD_OUT)  # finished: nothing is trained
    assert len(again.metrics) == 4
    assert fingerprint_of_weights(again.model) == fingerprint_of_weights(done.model)


def test_no_epoch_is_chosen_by_the_test_set():
    for choice in ({"keep_best": True}, {"early_stopping": 2}):
        with pytest.raises(ConfigError, match="never by the test set; set validation"):
            config(**choice)
        with pytest.raises(ConfigError, match="monitor above 0"):
            config(**choice, validation=0.1)
