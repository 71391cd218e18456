"""Every registered defense takes a step and survives saving and loading; recipes and schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb.attacks import FGSM
from learn2perturb.data import ImageData
from learn2perturb.defenses import Clock, build_defense, learning_rate_factor, list_defenses
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation import evaluate
from learn2perturb.models import list_models
from learn2perturb.noise import fixed_noise
from learn2perturb.registry import DEFENSES
from learn2perturb.runs import load
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.files import locate
from learn2perturb.training import TrainConfig, train
from learn2perturb.training.config import RECIPES

NAMES = [entry.name for entry in DEFENSES]
# Their papers train on clean images only.
CLEAN_ONLY = ("none", "rse", "pixeldp", "wca")
EXPECTED = {
    "none", "pgd_at", "madry", "trades", "mart", "hat", "learn2perturb", "learn2perturb_r",
    "pni", "adv_bnn",
    "rse", "rse_at", "pixeldp",
    "smoothadv", "wca", "wca_at", "rpf", "rna", "ctrw", "bat", "barre",
}  # fmt: skip


def test_every_registered_defense_is_tested_here():
    assert list_defenses() == NAMES
    assert set(NAMES) == EXPECTED
    assert len(NAMES) == len(EXPECTED)
    assert list_defenses("learn*") == ["learn2perturb", "learn2perturb_r"]
    assert DEFENSES.entry("vanilla").name == "pgd_at"


@pytest.mark.parametrize("name", [*NAMES, "vanilla"])
def test_every_defense_trains_saves_and_loads(name, tmp_path):
    config = TrainConfig(
        defense=name, model="digits_cnn", dataset="digits", recipe="fast", epochs=1, limit=100, batch_size=64,
        attack_steps=2, monitor=50, engine="plain", device="cpu", tensorboard=False,
    )  # fmt: skip
    run = train(config, out=tmp_path / "run", progress=False)
    twin = load(tmp_path / "run")
    assert not twin.training
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad(), fixed_noise(run.model, 1), fixed_noise(twin, 1):
        assert torch.equal(run.model(x), twin(x))
    (line,) = run.metrics
    assert ("adversarial_loss" in line) is (name not in CLEAN_ONLY)
    assert ("theta_mean" in line) is name.startswith("learn2perturb")


# Every other network takes seconds to minutes for each defense.
FAST_NETWORKS = ("resnet20",)
NETWORKS = [
    network if network in FAST_NETWORKS else pytest.param(network, marks=[pytest.mark.slow, pytest.mark.timeout(600)])
    for network in list_models()
]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_every_defense_meets_every_network(name, network, tmp_path):
    """A step, saving, loading and scoring as the defense predicts; tiny images, for these networks take any size."""
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = ImageData("random", images, torch.arange(6) % 3, ("a", "b", "c"), False, 0, (0.5,) * 3, (0.25,) * 3)
    config = TrainConfig(
        defense=name, model=network, recipe="fast", epochs=1, batch_size=6, attack_steps=1, monitor=0,
        engine="plain", device="cpu", tensorboard=False,
    )  # fmt: skip
    run = train(config, data=data, out=tmp_path / "run", progress=False)
    assert (run.model.registered_name, run.metrics[0]["step"]) == (network, 1)
    twin = load(tmp_path / "run")
    header = read_model(locate(tmp_path / "run"))[1]
    defense = build_defense(name, run.config.options)
    assert (header["predictor"], header["members"]) == (defense.predictor, defense.members)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad(), fixed_noise(run.model, 1), fixed_noise(twin, 1):
        assert torch.equal(run.model(x), twin(x))
    result = evaluate(
        twin, data, {"fgsm": FGSM()}, draws=2, predictor=defense.predictor, members=2, limit=3, noise_off=False
    )
    stochastic = DEFENSES.entry(name).fact("stochastic")
    assert [(row.n, row.draws, row.stochastic) for row in result.rows] == [(3, 2 if stochastic else 1, stochastic)] * 2


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_closes_every_setting_of_every_defense(name, recipe):
    resolved = TrainConfig(defense=name, recipe=recipe).resolve()
    assert resolved.missing() == []
    assert resolved.resolve() == resolved
    build_defense(name, resolved.options)
    assert TrainConfig(defense=name, recipe=recipe, epochs=7, eps=0.1).resolve().epochs == 7  # what was set stays


def test_recipes_say_what_paper_and_code_do():
    paper = TrainConfig(recipe="paper").resolve()
    assert (paper.epochs, paper.lr, paper.milestones, paper.weight_decay) == (350, 0.1, [150, 250], 1e-4)
    assert (paper.adversarial_delay, paper.options["noise_delay"], paper.eps) == (20, 20, pytest.approx(8 / 255))
    released = TrainConfig(recipe="released").resolve()
    assert released.options == {
        "noise_delay": 10, "tau": "released", "theta_step": "released", "sharing": "per_batch",
    }  # fmt: skip
    for recipe in ("common", "fast"):
        assert TrainConfig(recipe=recipe).resolve().options["noise_delay"] == 0
        assert TrainConfig(recipe=recipe).resolve().adversarial_delay == 0


# --- schedules


def factors(epochs=10, batches=4, **settings):
    resolved = TrainConfig(recipe="paper", epochs=epochs, **settings).resolve()
    factor = learning_rate_factor(resolved, epochs)
    return [factor(Clock(e, b, batches, stage_epoch=e)) for e in range(epochs) for b in range(batches)]


def test_step_falls_at_its_milestones():
    values = factors(schedule="step", milestones=[3, 6], decay=0.1)
    assert values[:12] == [1.0] * 12
    assert values[12:24] == pytest.approx([0.1] * 12)
    assert values[24:] == pytest.approx([0.01] * 16)
    assert factors(schedule="step", milestones=[3], decay=0.0)[12:] == [0.0] * 28  # zero is a value, not "unset"


def test_one_cycle_rises_falls_and_ends_near_zero():
    values = factors(schedule="one_cycle")
    top = values.index(max(values))
    assert max(values) == pytest.approx(1.0)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert 0 < values[-1] <= 1e-3
    assert 0 < values[0] < 0.1


def test_cosine_and_constant():
    values = factors(schedule="cosine")
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert factors(schedule="constant") == [1.0] * 40


# --- refusals


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("lern2perturb", {}, UnknownNameError, "did you mean 'learn2perturb'"),
        ("none", {"gamma": 1}, UnknownNameError, "it has none"),
        ("pgd_at", {"sharing": "per_batch"}, UnknownNameError, "option of defense 'pgd_at'"),
        (None, {}, UnknownNameError, "unknown defense None"),
    ],
)
def test_an_unknown_defense_or_option_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        build_defense(name, options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": -1}, "epochs must be .* got -1"),
        ({"epochs": 1.5}, "epochs must be .* got 1.5"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 2.0}, "momentum is 2.0"),
        ({"eps": 8}, "write 8/255"),
        ({"alpha": 0.0, "beta": 0.0}, "both 0"),
        ({"attack_step_size": 0.0}, "attack_step_size is 0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum"),
        ({"schedule": "linear"}, "allowed: step"),
        ({"attack_labels": "wrong"}, "allowed: predicted, true"),
        ({"attack_mode": "both"}, "allowed: eval, train"),
        ({"recipe": "quick"}, "unknown recipe"),
        ({"model": "resnet21"}, "did you mean"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


def test_a_network_with_nothing_to_train_is_refused():
    settings = TrainConfig(defense="none", recipe="fast").resolve()
    with pytest.raises(ConfigError, match="nothing to train"):
        build_defense("none").stages(settings)[0].optimizers(nn.Flatten())
