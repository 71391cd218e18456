"""What settings and options may be: every bound from both sides, and the words of each refusal."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.defenses.base import of_clean_images
from learn2perturb.defenses.rse import RSE
from learn2perturb.defenses.settings import OpenSettings, Settings, number
from learn2perturb.errors import ConfigError
from learn2perturb.noise import noise_modules, noise_parameters, noise_sites

# name -> lowest, highest, whether a refusal speaks of pixels
NUMBERS = {
    "lr": (0.0, math.inf, False),
    "momentum": (0.0, 1.0, False),
    "weight_decay": (0.0, math.inf, False),
    "decay": (0.0, 1.0, False),
    "alpha": (0.0, math.inf, False),
    "beta": (0.0, math.inf, False),
    "eps": (0.0, 1.0, True),
    "attack_step_size": (0.0, 1.0, True),
    "trades_beta": (0.0, math.inf, False),
    "awp": (0.0, 1.0, False),
    "consistency": (0.0, math.inf, False),
    "weight_average": (0.0, 1.0, False),
    "warmup_epochs": (0.0, math.inf, False),
    "clip_norm": (0.0, math.inf, False),
    "label_smoothing": (0.0, 1.0, False),
}
COUNTS = {
    "epochs": 0,
    "batch_size": 1,
    "attack_steps": 1,
    "attack_eot": 1,
    "adversarial_delay": 0,
    "loss_draws": 1,
    "accumulate": 1,
}
CHOICES = {
    "schedule": ("step", "one_cycle", "cosine", "constant"),
    "objective": ("mixed", "trades"),
    "loss": ("single", "averaged"),
    "attack_draws": ("fresh", "held"),
    "attack_labels": ("predicted", "true"),
    "attack_mode": ("eval", "train"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_reach_from_bound_to_bound(name):
    low, high, pixels = NUMBERS[name]
    if name not in (
        "weight_average",
        "attack_step_size",
        "label_smoothing",
    ):  # whose bounds make no sense for other reasons
        OpenSettings(**{name: low}).check()
        OpenSettings(**{name: min(high, 1e9)}).check()
    number(name, low, low, high)
    number(name, None, low, high, optional=True)
    between = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
    for value in (low - 1e-9, *([high + 1e-9] if high < math.inf else []), math.nan, True, "1", [1.0]):
        with pytest.raises(ConfigError) as caught:
            OpenSettings(**{name: value}).check()
        told = f"{name} is {value!r}; it must be a number {between}"
        hint = "; it is in [0, 1] pixel scale: write 8/255 for eight grey levels" if pixels else ""
        assert str(caught.value) == told + hint


@pytest.mark.parametrize("name", COUNTS)
def test_counts_begin_at_their_lowest(name):
    lowest = COUNTS[name]
    OpenSettings(**{name: lowest}).check()
    for value in (lowest - 1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least {lowest}, got"):
            OpenSettings(**{name: value}).check()


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_these(name):
    for value in CHOICES[name]:
        OpenSettings(**{name: value}).check()
    with pytest.raises(ConfigError, match=f"{name} is 'other'; allowed: {', '.join(CHOICES[name])}"):
        OpenSettings(**{name: "other"}).check()


@pytest.mark.parametrize("name", ["nesterov", "attack_random_start"])
def test_flags_are_flags(name):
    OpenSettings(**{name: False}).check()
    with pytest.raises(ConfigError, match=f"{name} must be True or False, got 1"):
        OpenSettings(**{name: 1}).check()


def test_milestones_are_epochs():
    for value in ([], [0], (3, 5)):
        OpenSettings(milestones=value).check()
    with pytest.raises(ConfigError, match=r"milestones is 5; it must be a list of epochs, such as \[150, 250\]"):
        OpenSettings(milestones=5).check()
    with pytest.raises(ConfigError, match="an epoch of milestones must be a whole number of at least 0, got -1"):
        OpenSettings(milestones=[3, -1]).check()


TOGETHER = [
    (
        {"alpha": 0, "beta": 0},
        "alpha and beta are both 0",
        [{"alpha": 0, "beta": 1}, {"alpha": 1, "beta": 0}, {"alpha": 0}, {"beta": 0}],
    ),
    (
        {"objective": "trades", "trades_beta": 0},
        "trades_beta is 0, so objective 'trades' has no adversary",
        [{"objective": "mixed", "trades_beta": 0}, {"objective": "trades", "trades_beta": 6}, {"objective": "trades"}],
    ),
    (
        {"weight_average": 1},
        "weight_average is 1, so the average never moves",
        [{"weight_average": 0.999}, {"weight_average": 0}],
    ),
    (
        {"attack_step_size": 0},
        "attack_step_size is 0, so the adversary stands still",
        [{"attack_step_size": 0, "eps": 0}],
    ),
    ({"attack_step_size": 0, "eps": 0.1}, "attack_step_size is 0", [{"attack_step_size": 0.1, "eps": 0.1}]),
    (
        {"attack_step_size": 0.3, "eps": 0.1},
        "more than twice eps",
        [{"attack_step_size": 0.2, "eps": 0.1}, {"attack_step_size": 0.3, "eps": 0}, {"attack_step_size": 0.3}],
    ),
    (
        {"nesterov": True, "momentum": 0},
        "nesterov needs momentum above 0",
        [{"nesterov": True, "momentum": 0.9}, {"nesterov": False, "momentum": 0}, {"nesterov": True}],
    ),
]


@pytest.mark.parametrize(("refused", "message", "allowed"), TOGETHER, ids=lambda value: str(value)[:40])
def test_settings_that_do_not_go_together(refused, message, allowed):
    with pytest.raises(ConfigError, match=message):
        OpenSettings(**refused).check()
    for settings in allowed:
        OpenSettings(**settings).check()


# defense, option, allowed, refused, words
OPTIONS = [
    ("learn2perturb", "gamma", [0, 1e-4, 5.0], [-1e-9, True, "1"], "gamma is .*; it must be a number at least 0"),
    ("learn2perturb", "theta_lr", [0, 7.0], [-1e-9], "theta_lr is .*; it must be a number at least 0"),
    ("learn2perturb", "noise_delay", [0, 20], [-1, 1.5], "noise_delay must be a whole number of at least 0"),
    ("learn2perturb", "weight_steps", [1], [0], "weight_steps must be a whole number of at least 1"),
    ("learn2perturb", "noise_steps", [1], [0], "noise_steps must be a whole number of at least 1"),
    ("learn2perturb", "noise_target", [None, 0.01, 0.5], [0.0099], "noise_target is 0.0099, but theta is projected to"),
    ("learn2perturb", "minimum", [1e-9, 0.25], [0, 0.0], "minimum is 0.*; with gamma above 0 it must be above 0"),
    ("learn2perturb", "init", [0.01, 3.0], [0.0099, -1], "allowed: 0 <= minimum <= init"),
    ("adv_bnn", "prior", [1e-9, 2.0], [0, 0.0], "prior is 0; it is a standard deviation and must be above 0"),
    ("adv_bnn", "init", [1e-9], [0], "init is 0; it is a standard deviation and must be above 0"),
    ("adv_bnn", "kl_weight", [0, 1.0], [-1], "kl_weight is -1; it must be a number at least 0"),
    ("adv_bnn", "stage_lengths", [(), [1], (80, 60)], [5, "ab"], "stage_lengths is .*; it must be a list such as"),
    (
        "adv_bnn",
        "stage_lengths",
        [[1]],
        [[0], [2, 0]],
        "a length of stage_lengths must be a whole number of at least 1",
    ),
    ("rse", "sigma_init", [0, 0.2], [-1e-9, True], "sigma_init is .*; it must be a number at least 0"),
    ("rse", "sigma_inner", [0, 0.2], [-1e-9, "1"], "sigma_inner is .*; it must be a number at least 0"),
    ("rse", "adversarial", [True], [1], "adversarial must be True or False, got 1"),
    ("rse", "restarts", [True], [1], "restarts must be True or False, got 1"),
    ("pni", "init", [0, 0.25], [-1e-9], "init is .*; it must be a number at least 0"),
    ("pixeldp", "epsilon", [1e-9, 5.0], [0, 0.0], "epsilon must be above 0, delta between 0 and 1"),
    ("pixeldp", "delta", [1e-9, 0.999], [0, 1, 1.0], "epsilon must be above 0, delta between 0 and 1"),
    ("pixeldp", "delta", [0.5], [-0.1, 1.001], "delta is .*; it must be a number between 0 and 1"),
    ("pixeldp", "bound", [0, 3.0], [-1e-9], "bound is .*; it must be a number at least 0"),
    ("pixeldp", "parseval_step", [0, 1], [-1e-9, 1.001], "parseval_step is .*; it must be a number between 0 and 1"),
    ("pixeldp", "parseval_loops", [0, 10], [-1], "parseval_loops must be a whole number of at least 0"),
    ("pixeldp", "ramp", [False], [1], "ramp must be True or False, got 1"),
    ("rpf", "share", [1e-9, 0.999], [0, 0.0, 1, 1.0], "some filters must be random and some learned"),
    ("rpf", "share", [0.5], [-1e-9, 1.001], "share is .*; it must be a number between 0 and 1"),
    ("rpf", "filter_decay", [0, 2.0], [-1e-9], "filter_decay is .*; it must be a number at least 0"),
    ("rna", "channels", [[1], (1, 4)], [[], (), 5], r"channels is .*; it must be a list such as \[1\] or"),
    ("rna", "channels", [[2]], [[0], [1, 0], [1.5]], "a number of channels must be a whole number of at least 1"),
    ("ctrw", "least", [0, 1.0], [-1e-9, 1.001], "least is .*; it must be a number between 0 and 1"),
    ("wca", "adversarial", [True], [1], "adversarial must be True or False, got 1"),
    ("bat", "count", [2, 3], [1, True], "count must be a whole number of at least 2"),
    ("bat", "weight", [1e-9, 0.999], [0, 0.0, 1, 1.0], "so one member is never drawn"),
    ("bat", "weight", [0.5], [-1e-9, 1.001], "weight is .*; it must be a number between 0 and 1"),
    ("barre", "count", [2, 3], [1, True], "count must be a whole number of at least 2"),
    ("barre", "osp_steps", [0, 3], [-1], "osp_steps must be a whole number of at least 0"),
    ("barre", "arc_steps", [1], [0], "arc_steps must be a whole number of at least 1"),
    ("barre", "osp_lr", [0, 2.0], [-1e-9], "osp_lr is .*; it must be a number at least 0"),
    ("mart", "kl_weight", [0, 9.0], [-1e-9], "kl_weight is .*; it must be a number at least 0"),
    ("hat", "reach", [0, 9.0], [-1e-9], "reach is .*; it must be a number at least 0"),
    ("hat", "kl_weight", [0, 9.0], [-1e-9], "kl_weight is .*; it must be a number at least 0"),
    ("hat", "helper_weight", [0, 9.0], [-1e-9], "helper_weight is .*; it must be a number at least 0"),
    ("hat", "helper", [None, "a.pt"], [5], "helper is 5; give a file of weights, or leave it out"),
    ("smoothadv", "sigma", [1e-9, 2.0], [0, 0.0], "sigma is 0, so there is nothing to average over"),
    ("smoothadv", "sigma", [0.5], [-1e-9], "sigma is .*; it must be a number at least 0"),
]


@pytest.mark.parametrize(("name", "option", "allowed", "refused", "message"), OPTIONS)
def test_options_reach_from_bound_to_bound(name, option, allowed, refused, message):
    for value in allowed:
        assert getattr(build_defense(name, {option: value}), option) == value
    for value in refused:
        with pytest.raises(ConfigError, match=message):
            build_defense(name, {option: value})


SEQUENTIAL = {"theta_step": "sequential"}
TARGET = {"noise_target": 0.3}


@pytest.mark.parametrize(
    ("refused", "message", "allowed"),
    [
        ({"weight_steps": 2}, "2 : 1, but theta_step 'combined' makes one", SEQUENTIAL | {"weight_steps": 2}),
        ({"noise_steps": 3}, "1 : 3, but theta_step 'combined' makes one", SEQUENTIAL | {"noise_steps": 3}),
        (TARGET | {"gamma": 0}, "gamma is 0, so nothing holds theta to it", TARGET | {"gamma": 1e-2}),
        (TARGET | {"tau": "released"}, "tau is 'released', which only the paper's", {"tau": "released"}),
        ({"minimum": 0}, "minimum is 0; with gamma above 0", {"minimum": 0, "gamma": 0}),
        ({"minimum": 0.3}, "theta init is 0.25 and minimum is 0.3", {"minimum": 0.25}),
        ({"noise_ascends": True, "noise_from_loss": False}, "theta sees no loss", {"noise_ascends": True}),
        ({"noise_ascends": 1}, "noise_ascends must be True or False", {"noise_ascends": False}),
    ],
)  # fmt: skip
def test_options_of_learned_noise_that_do_not_go_together(refused, message, allowed):
    with pytest.raises(ConfigError, match=message):
        build_defense("learn2perturb", refused)
    build_defense("learn2perturb", allowed)


CHECKS = [
    ("none", {"objective": "trades"}, "objective is 'trades', but NoDefense trains on a loss of its own; leave it out"),
    ("none", {"awp": 0.01}, "awp is 0.01, but NoDefense has a loss of its own that takes none; leave it out"),
    ("trades", {"objective": "mixed"}, "objective is 'mixed', but Trades trains on 'trades'; leave it out"),
    ("madry", {"objective": "trades"}, "objective is 'trades', but Madry trains on 'mixed'; leave it out"),
    ("madry", {"alpha": 0.5}, "alpha is 0.5, but Madry's training has no clean loss; set alpha 0, or take 'pgd_at'"),
    (
        "pgd_at",
        {"awp": 0.01, "beta": 0},
        "awp is 0.01, but beta is 0: there is no adversarial loss; set beta or drop awp",
    ),
    ("none", {"consistency": 1.0}, "consistency is 1.0, but NoDefense has a loss of its own that takes none"),
    ("pgd_at", {"consistency": 1.0, "beta": 0}, "consistency is 1.0, but beta is 0: there is no adversarial loss"),
    ("none", {"loss": "averaged"}, "loss is 'averaged', but NoDefense has a loss of its own"),
    ("rse", {"objective": "trades"}, "objective is 'trades', awp 0.0 and consistency 0.0, but RSE trains on clean"),
    ("rse", {"awp": 0.01}, "objective is 'mixed', awp 0.01 and consistency 0.0, but RSE trains on clean images"),
    ("rse", {"consistency": 2.0}, "awp 0.0 and consistency 2.0, but RSE trains on clean images"),
]
ALLOWED = [
    ("none", {}), ("trades", {"objective": "trades"}), ("trades", {"objective": "trades", "awp": 0.01, "beta": 0}),
    ("madry", {"alpha": 0}), ("pgd_at", {"awp": 0.01}), ("pgd_at", {"beta": 0}), ("pgd_at", {"objective": "trades"}),
    ("rse", {}), ("adv_bnn", {"objective": "trades"}), ("adv_bnn", {"awp": 0.01}),
    ("rse_at", {"objective": "trades"}), ("rse_at", {"awp": 0.01}), ("rse_at", {"consistency": 1.0}),
    ("trades", {"objective": "trades", "consistency": 1.0, "beta": 0}),
]  # fmt: skip


USUAL = {
    "epochs": 1, "batch_size": 4, "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0,
    "schedule": "constant", "milestones": [], "decay": 0.1, "objective": "mixed", "trades_beta": 6.0, "alpha": 0.0,
    "beta": 0.5, "eps": 0.1, "attack_steps": 1, "attack_step_size": 0.05, "attack_random_start": True,
    "attack_eot": 1, "attack_draws": "fresh", "loss": "single", "loss_draws": 4,
    "attack_labels": "true", "attack_mode": "eval", "adversarial_delay": 0, "awp": 0.0,
    "weight_average": 0.0,
}  # fmt: skip


def settings_of(values: dict) -> Settings:
    return Settings(**{**USUAL, **values})


@pytest.mark.parametrize(("name", "values", "message"), CHECKS)
def test_a_defense_refuses_settings_that_it_does_not_follow(name, values, message):
    with pytest.raises(ConfigError, match=message):
        build_defense(name).check(settings_of(values))


@pytest.mark.parametrize(("name", "values"), ALLOWED)
def test_a_defense_takes_settings_that_it_follows(name, values):
    build_defense(name).check(settings_of(values))


def test_a_loss_of_ones_own_has_the_objectives_that_are_declared_with_it_or_after_it():
    def loss(self, model, x, y, clock, settings):
        raise NotImplementedError

    silent = type("Silent", (RSE,), {"loss": loss})
    told = type("Told", (silent,), {"objectives": ("mixed", "trades")})
    plain = type("Plain", (RSE,), {})
    for kind in (told, plain):
        kind(adversarial=True).check(settings_of({"objective": "trades"}))
    with pytest.raises(ConfigError, match="Silent trains on a loss of its own"):
        silent(adversarial=True).check(settings_of({"objective": "trades"}))


@pytest.mark.parametrize("name", ["rse_at", "adv_bnn"])
def test_noise_of_other_papers_trains_on_trades_and_at_perturbed_weights(name):
    defense = build_defense(name)
    network = defense.prepare(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4))
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    settings = settings_of({
        "objective": "trades", "trades_beta": 6.0, "awp": 0.01, "eps": 0.1, "attack_step_size": 0.05, "attack_steps": 1,
        "adversarial_delay": 0,
    })  # fmt: skip
    defense.check(settings)
    losses = defense.loss(network.train(), x, y, Clock(0, 0, 1), settings)
    losses.total.backward()
    assert losses.total > losses.clean  # the divergence beside it
    assert losses.adversarial is not None


REAL = [
    ("learn2perturb", ("gamma", "theta_lr", "init", "minimum", "noise_delay", "weight_steps", "noise_steps")),
    ("adv_bnn", ("prior", "init", "kl_weight", "stage_lengths")),
    ("rse", ("sigma_init", "sigma_inner", "adversarial", "restarts")),
    ("pni", ("init",)),
    ("pixeldp", ("bound", "epsilon", "delta", "parseval_loops", "parseval_step", "ramp")),
]


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in REAL for option in options])
@pytest.mark.parametrize("value", [None, "0.1", math.nan])
def test_what_is_no_number_is_refused_in_one_line(name, option, value):
    with pytest.raises(ConfigError, match=option) as caught:
        build_defense(name, {option: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pgd_at", "learn2perturb", "adv_bnn", "rse"])
def test_one_stage_of_all_epochs_unless_the_defense_has_others(name):
    (stage,) = build_defense(name).stages(settings_of({"epochs": 7}))
    assert stage.epochs == 7
    assert stage.factor(Clock(0, 0, 1)) == 1


def test_adam_of_adv_bnn_decays_means_alone():
    defense = build_defense("adv_bnn")
    network = defense.prepare(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    built = defense.stages(settings_of({"lr": 0.02, "weight_decay": 0.3}))[0].optimizers(network)
    groups = {name: optimizer.param_groups[0] for name, optimizer in built.items()}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "weights": (0.02, 0.3), "noise": (0.02, 0.0),
    }  # fmt: skip
    stds = {id(parameter) for parameter in noise_parameters(network)}
    assert {id(p) for p in groups["noise"]["params"]} == stds
    assert len(groups["weights"]["params"]) == 2
    assert not {id(p) for p in groups["weights"]["params"]} & stds


def test_released_means_are_uniform_by_the_fan_in_and_of_norms_from_0_to_1():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 400), nn.BatchNorm1d(400))
    build_defense("adv_bnn", {"mean_init": "released"}).prepare(network, (1, 4, 4))
    linear, norm = network[1].parametrizations, network[2].parametrizations
    for values in (linear.weight.original, linear.bias.original):
        assert 0.24 < values.max() <= 0.25
        assert -0.25 <= values.min() < -0.24
    assert 0 <= norm.weight.original.min() < 0.05
    assert 0.95 < norm.weight.original.max() <= 1
    assert (norm.bias.original == 0).all()
    single = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    build_defense("adv_bnn", {"mean_init": "released"}).prepare(single, (1, 2, 2))
    assert single[1].parametrizations.weight.original.abs().max() <= 0.5


def test_a_regulariser_of_ones_own_counts_once():
    assert build_defense("pgd_at").regulariser_weight(Clock(3, 0, 5)) == 1
    weights = [build_defense("learn2perturb").regulariser_weight(Clock(epoch, 0, 5)) for epoch in (20, 21)]
    assert weights == pytest.approx([1e-4, 1e-4 / 1.5])
    assert build_defense("learn2perturb", TARGET).regulariser_weight(Clock(30, 0, 5)) == 1


@pytest.mark.parametrize("variant", ["weight", "output", "input"])
def test_pni_goes_where_it_is_told_to(variant):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    for sites, wanted in ((None, ["1", "3"]), ("3", ["3"])):
        noisy = build_defense("pni", {"variant": variant, "sites": sites}).prepare(network(), (1, 2, 2))
        assert noise_sites(noisy) == wanted


def test_the_schedule_of_the_regulariser_stands_still_without_a_learning_rate():
    defense = build_defense("learn2perturb_r", {"noise_delay": 0})
    values = defense.schedule_only(settings_of({"lr": 0.0}), 3)
    assert [next(values) for _ in range(4)] == [0.25] * 4
    moving = defense.schedule_only(settings_of({"lr": 1.0}), 3)
    step = 1e-4 / (2 * math.sqrt(0.25))
    assert next(moving) == pytest.approx(0.25 + step)
    assert next(moving) == pytest.approx(0.25 + step + 1e-4 / (2 * math.sqrt(0.25 + step)))  # no momentum is set


@pytest.mark.parametrize(
    ("ramp", "step", "share"), [(True, 0, 0.1), (False, 0, 1.0), (True, 9300, 1.0), (False, 9, 1.0)]
)
def test_the_noise_of_pixeldp_in_a_pass_of_the_loss(ramp, step, share):
    defense = build_defense("pixeldp", {"ramp": ramp})
    network = defense.prepare(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4))
    (noise,) = noise_modules(network)
    whole, seen = noise.theta.item(), []
    network[0].register_forward_pre_hook(lambda *_: seen.append(noise.theta.item()))
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    losses = defense.loss(network, x, y, Clock(0, step, 10_000), settings_of({}))
    assert seen == [pytest.approx(share * whole)]
    torch.testing.assert_close(losses.total.detach(), losses.clean)
    assert losses.extra["noise_deviation"].item() == pytest.approx(whole)
    assert noise.theta.item() == pytest.approx(whole)


def test_clean_images_have_the_whole_loss():
    found = of_clean_images(OpenSettings(alpha=0.5, beta=0.25))
    assert (found.alpha, found.beta) == (1.0, 0.0)


@pytest.mark.parametrize(("norm", "good"), [("l2", True), ("linf", False), (None, False)])
def test_sizes_in_l2_may_be_more_than_the_range_of_a_pixel(norm, good):
    settings = OpenSettings(norm=norm, eps=2.0, attack_step_size=1.5)
    with contextlib.nullcontext() if good else pytest.raises(ConfigError, match="eps is 2.0"):
        settings.check()
