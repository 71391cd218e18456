"""Two and four processes on a batch do what one does: every defense, in float64 to the last digits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learn2perturb.data import load_data
from learn2perturb.defenses import Defense, Losses, forward, list_defenses, training_adversary
from learn2perturb.engine import execution
from learn2perturb.engine.identity import fingerprint
from learn2perturb.progress import Reporter
from learn2perturb.registry import DEFENSES
from learn2perturb.training import TrainConfig, train
from tests.distributed.processes import together


def config(**changes):
    """Return a config of twenty steps, the last batch of each epoch of two images, with noise in its first epoch."""
    values = {
        "defense": "learn2perturb", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 4,
        "limit": 34, "batch_size": 8, "attack_steps": 1, "monitor": 0, "log_every": 1, "tensorboard": False,
        "engine": "plain", "device": "cpu", "adversarial_delay": 0,
    }  # fmt: skip
    learned = values | changes
    if learned["defense"].startswith("learn2perturb"):
        changes["options"] = {"noise_delay": 0, **changes.get("options", {})}
    if learned["defense"] == "barre":  # ten rounds of ARC at each of ten batches take minutes
        changes["options"] = {"osp_steps": 2, "arc_steps": 2, **changes.get("options", {})}
    return TrainConfig(**{**values, **changes})


DIGITS = load_data("digits", "train"), load_data("digits", "test")


def network(*more):
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 3, stride=2, bias=False)
    layers = [first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(72, 10))


def trained(config, *more, out=None, double=True):
    """Return the metrics of all epochs and the weights after a training in float64, theta and draws included."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        run = train(config, model=network(*more), data=DIGITS, out=out, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in run.metrics]
    return lines, run.model.state_dict()


def numbers(line, prefix=""):
    for key, value in line.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            yield prefix + key, value


def check_alike(one, many, tolerance=1e-10):
    for lines, weights in many:
        assert len(lines) == len(one[0])
        for line, expected in zip(lines, one[0], strict=True):
            found = dict(numbers(line))
            assert list(found) == list(dict(numbers(expected)))
            for key, value in numbers(expected):
                close = max(tolerance, 1e-6)  # metrics keep seven digits
                assert found[key] == pytest.approx(value, abs=close, rel=close), key
        for key, value in one[1].items():
            assert torch.equal(many[0][1][key], weights[key]), f"the processes have other {key}"
            assert (weights[key] - value).abs().max() <= tolerance, key


def compare(config, *more, count=2, tmp_path, tolerance=1e-10):
    many = together(count, lambda rank: trained(config, *more), tmp_path)
    check_alike(trained(config, *more), many, tolerance)


# One of each kind of noise and of loss, and one with a network beside it; 20 steps of each of the others, by two
# processes, take seconds to a minute.
QUICK = ("pgd_at", "trades", "hat", "learn2perturb", "pni", "adv_bnn", "wca_at", "bat")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in list_defenses()]
)
def test_two_processes_train_every_defense_as_one_does(name, tmp_path):
    compare(config(defense=name), tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("name", list_defenses())
def test_more_processes_train_every_defense_as_one_does(name, count, tmp_path):
    compare(config(defense=name), count=count, tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"awp": 0.01, "weight_average": 0.9, "monitor": 10},
        {"objective": "trades", "options": {"sharing": "per_batch", "theta_step": "sequential"}},
        {"attack_mode": "train", "attack_steps": 2, "options": {"theta_step": "released", "granularity": "channel"}},
        {"defense": "pni", "options": {"variant": "output"}},
        {"defense": "pni", "options": {"variant": "input", "granularity": "channel"}},
        {"batch_size": 6},  # at four processes some have one image, others two; PNI's weights have as many rows
    ],
    ids=["awp and average", "trades and one map", "attack in train mode", "pni a-a", "pni a-b", "uneven"],
)
def test_four_processes_train_every_setting_as_one_does(changes, tmp_path):
    compare(config(epochs=2, **changes), count=4, tmp_path=tmp_path)


def test_dropout_and_batches_smaller_than_their_number(tmp_path):
    compare(config(epochs=2, limit=25), nn.Dropout(0.4), nn.Dropout2d(0.2), count=3, tmp_path=tmp_path)


@dataclass(frozen=True, kw_only=True)
class OfOnesOwn(Defense):
    """Draws, doubled batches, a gradient of the weights: written with no thought of several processes."""

    def loss(self, model, x, y, clock, settings):
        start = (x + 0.1 * torch.rand(x.shape, dtype=x.dtype)).clamp(0, 1)
        x_adv = training_adversary(settings).craft(model, start, y)
        both = torch.cat([x, x_adv])
        logits = forward(model, both + 0.05 * torch.randn_like(both))
        loss = F.cross_entropy(logits, torch.cat([y, y]))
        weights = list(model.parameters())
        slopes = torch.autograd.grad(loss, weights, retain_graph=True)
        size = torch.stack([slope.square().sum() for slope in slopes]).sum()
        kept = torch.bernoulli(torch.full((len(x), 1), 0.9, dtype=x.dtype))
        return Losses(loss / (1 + size) + 1e-3 * (kept * logits[: len(x)]).square().mean())


def test_a_defense_of_ones_own_knows_nothing_of_it(tmp_path):
    DEFENSES.register("of_ones_own", f"{__name__}:OfOnesOwn", "draws, doubles, differentiates")
    try:
        compare(config(defense="of_ones_own", limit=36), tmp_path=tmp_path)
    finally:
        DEFENSES._entries.pop("of_ones_own")


@dataclass(frozen=True, kw_only=True)
class Watched(Defense):
    """Plain training that writes down which images it has had."""

    def loss(self, model, x, y, clock, settings):
        rows = torch.cat([x.flatten(1), y.unsqueeze(1)], dim=1)
        _seen.append([fingerprint([("", row)]) for row in rows])
        logits = forward(model, x)
        return Losses(F.cross_entropy(logits, y))


_seen: list[list[str]] = []


def test_every_image_is_trained_on_once_and_in_the_order_of_one_process(tmp_path):
    DEFENSES.register("watched", f"{__name__}:Watched", "writes down its images")

    def order(rank=0):
        _seen.clear()
        train(config(defense="watched", limit=38, epochs=2), progress=False)
        return list(_seen)

    try:
        parts, whole = together(3, order, tmp_path), order()
    finally:
        DEFENSES._entries.pop("watched")
    steps = list(zip(*parts, strict=True))
    assert [list(itertools.chain(*step)) for step in steps] == whole
    assert all(sorted(map(len, step)) == [2, 3, 3] for step in steps[:4])
    epoch = list(itertools.chain(*whole[:5]))
    assert len(set(epoch)) == len(epoch) == 38


@dataclass(frozen=True, kw_only=True)
class Kept(Defense):
    """Plain training that keeps the images it has had."""

    def loss(self, model, x, y, clock, settings):
        _kept.append(x)
        return Losses(F.cross_entropy(forward(model, x), y))


_kept: list[torch.Tensor] = []


def test_batch_norm_by_the_rows_of_each_process_is_an_option(tmp_path):
    DEFENSES.register("kept", f"{__name__}:Kept", "keeps its images")
    settings = config(defense="kept", limit=8, epochs=1, sync_batch_norm=False)

    def work(rank):
        layer = train(settings, model=network(), data=DIGITS, progress=False).model[1]
        return _kept[0], layer.running_var, layer.running_mean

    try:
        (first, found, mean), (second, *others) = together(2, work, tmp_path)
    finally:
        DEFENSES._entries.pop("kept")
    assert torch.equal(found, others[0])
    assert torch.equal(mean, others[1])
    with torch.no_grad():
        answers = [network()[0](x) for x in (first, second)]
    assert torch.allclose(found, 0.9 + 0.1 * sum(one.var((0, 2, 3)) for one in answers) / 2)
    assert torch.allclose(mean, 0.1 * sum(one.mean((0, 2, 3)) for one in answers) / 2)
    assert not torch.allclose(found, 0.9 + 0.1 * torch.cat(answers).var((0, 2, 3)))


def test_that_steps_are_not_recorded_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "select", lambda *_, **__: replace(execution.PLAIN, recording=True))
    lines = []
    monkeypatch.setattr(Reporter, "line", lambda self, text: lines.append(text))

    def work(rank):
        trained(config(defense="none", limit=8, epochs=1))
        return lines

    for said in together(2, work, tmp_path):
        assert any("several processes: no step is recorded as a CUDA graph" in line for line in said)
