"""BAT and BARRE: whom a stage trains and on what, against transcriptions; exact accuracy; saving."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import learn2perturb as l2p
from learn2perturb.attacks import ARC
from learn2perturb.data import ImageData
from learn2perturb.defenses import Clock, barre, build_defense, ensembles
from learn2perturb.defenses.barre import onto_simplex
from learn2perturb.engine.finite import members_of
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.evaluation import exact_accuracy
from learn2perturb.noise import fixed_noise, noise_disabled, noise_modules, remove_noise
from learn2perturb.registry import DEFENSES
from learn2perturb.training import TrainConfig, train
from learn2perturb.training.alternating import iterate

SHAPE, EPS, STEP, LR, DECAY = (2, 4, 4), 0.1, 0.06, 0.05, 1e-3
NAMES = [entry.name for entry in DEFENSES if entry.fact("finite_ensemble")]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 3))


def pixels(n=12):
    images = torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return ImageData("random", images, torch.arange(n) % 3, ("a", "b", "c"), False, 0, (0.5,) * 2, (0.25,) * 2)


def config(name, **settings):
    return TrainConfig(
        defense=name, recipe="common", eps=EPS, attack_steps=2, attack_step_size=STEP, attack_random_start=False,
        lr=LR, weight_decay=DECAY, schedule="constant", nesterov=False, engine="plain", device="cpu",
        tensorboard=False, monitor=0, **settings,
    )  # fmt: skip


def fools(weights, x, y):
    """The attack of two steps on ``-log sum_k q_k p_k(y)`` of linear members ``(q, W, b)``."""
    x_adv = x
    for _ in range(2):
        leaf = x_adv.clone().requires_grad_()
        mean = sum(q * torch.softmax(leaf.flatten(1) @ w.T + b, 1) for q, w, b in weights)
        (g,) = torch.autograd.grad(-mean.gather(1, y[:, None]).log().sum(), leaf)
        x_adv = torch.minimum(torch.maximum(x_adv + STEP * g.sign(), x - EPS), x + EPS).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("name", ["bat", "barre"])
def test_a_step_of_the_second_member_equals_a_transcription(name):
    """BAT's is trained on attacks on the first; BARRE's starts from the first, on attacks on the mean of both."""
    settings = config(name, epochs=4, options={"count": 2} | ({"osp_steps": 0} if name == "barre" else {})).resolve()
    defense = build_defense(name, settings.options)
    model = defense.prepare(dense(), SHAPE).double().train()
    second = model.perturbation.others[0]
    with torch.no_grad():
        second[1].weight.normal_()
    first = [model[1].weight.detach().clone(), model[1].bias.detach().clone()]
    start = first if name == "barre" else [second[1].weight.detach().clone(), second[1].bias.detach().clone()]
    x, y = torch.rand(5, *SHAPE, dtype=torch.float64), torch.arange(5) % 3
    stage, clock = defense.stages(settings)[1], Clock(2, 0, 4, stage=1)
    defense.begin_step(model, clock)
    iterate(
        defense, model, clock, stage.optimizers(model), lambda: defense.loss(model, x, y, clock, settings),
        lambda losses: None,
    )  # fmt: skip
    x_adv = fools([(1.0, *first)] if name == "bat" else [(0.5, *first), (0.5, *start)], x, y)
    leaves = [value.clone().requires_grad_() for value in start]
    slopes = torch.autograd.grad(F.cross_entropy(x_adv.flatten(1) @ leaves[0].T + leaves[1], y), leaves)
    for parameter, value, slope in zip(second[1].parameters(), start, slopes, strict=True):
        assert torch.allclose(parameter, value - LR * (slope + DECAY * value), rtol=1e-9)
    assert torch.equal(model[1].weight, first[0])  # the first is trained no more


def test_the_first_member_of_bat_is_trained_on_attacks_on_itself():
    settings = config("bat", epochs=4, options={"count": 3}).resolve()
    defense = build_defense("bat", settings.options)
    model = defense.prepare(dense(), SHAPE).double().train()
    x, y = torch.rand(5, *SHAPE, dtype=torch.float64), torch.arange(5) % 3
    with torch.no_grad():
        for other in model.perturbation.others:
            other[1].weight.normal_()
    defense.begin_step(model, Clock(0, 0, 4))
    first = [model[1].weight.detach().clone(), model[1].bias.detach().clone()]
    expected = F.cross_entropy(fools([(1.0, *first)], x, y).flatten(1) @ first[0].T + first[1], y)
    loss = defense.loss(model, x, y, Clock(0, 0, 4), settings).total
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    assert model[1].weight.grad is not None
    assert all(other[1].weight.grad is None for other in model.perturbation.others)


def test_bat_draws_as_its_paper_and_barre_evenly():
    assert build_defense("bat").chances(2) == [0.9, 0.1]
    assert build_defense("bat", {"count": 4}).chances(2) == [0.9, 0.1, 0.0, 0.0]  # of those that are trained
    assert build_defense("bat", {"count": 3, "weight": 0.2}).chances(3) == pytest.approx([0.64, 0.16, 0.2])
    model = build_defense("barre", {"count": 3}).prepare(dense(), SHAPE)
    for stage in range(3):
        build_defense("barre", {"count": 3}).begin_step(model, Clock(stage, 0, 4, stage=stage))
        assert model.perturbation.probabilities == pytest.approx([1 / (stage + 1)] * (stage + 1) + [0] * (2 - stage))


@pytest.mark.parametrize("count", [2, 4])
def test_members_that_are_taken_off_and_put_back_are_the_same(count):
    model = build_defense("barre", {"count": count}).prepare(dense(), SHAPE)
    choice = model.perturbation
    members = list(choice.others)
    choice.detach(model)
    choice.attach(model)
    assert len(members) == count - 1 and list(choice.others) == members
    assert list(choice.members_in(model))[1:] == members


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 1), (1, 0)])
def test_a_member_begins_from_the_one_before_once_in_its_stage(epoch, batch):
    defense = build_defense("barre", {"count": 2})
    model = defense.prepare(dense(), SHAPE)
    trained = model.perturbation.others[0][1].weight
    with torch.no_grad():
        trained.fill_(7.0)
    defense.begin_step(model, Clock(2 + epoch, batch, 4, stage=1, stage_epoch=epoch))
    assert torch.equal(trained, model[1].weight if (epoch, batch) == (0, 0) else torch.full_like(trained, 7.0))


def test_epochs_are_shared_out_and_each_member_has_the_whole_schedule():
    settings = TrainConfig(defense="barre", recipe="paper").resolve()
    stages = build_defense("barre").stages(settings)
    assert [stage.epochs for stage in stages] == [100] * 5
    factors = [stages[0].factor(Clock(0, 0, 4, stage_epoch=epoch)) for epoch in (49, 50, 74, 75)]
    assert factors == pytest.approx([1.0, 0.1, 0.1, 0.01])
    few = TrainConfig(defense="barre", recipe="common", epochs=3).resolve()
    assert [stage.epochs for stage in build_defense("barre").stages(few)] == [1, 1, 1]  # two members are never drawn
    one = build_defense("barre").stages(TrainConfig(defense="barre", recipe="common", epochs=0).resolve())
    assert [stage.epochs for stage in one] == [0]


@pytest.mark.parametrize("point", [[0.5, 0.5], [1.2, -0.3, 0.4], [-1.0, -2.0], [0.2, 0.3, 0.5]])
def test_the_nearest_point_of_the_simplex(point):
    found = onto_simplex(torch.tensor(point, dtype=torch.float64))
    assert found.sum().item() == pytest.approx(1) and bool((found >= 0).all())
    shifts = (torch.tensor(point, dtype=torch.float64) - found)[found > 0]
    assert torch.allclose(shifts, shifts[0])  # optimality: the same shift wherever it is not at a bound
    assert bool((torch.tensor(point)[found == 0] <= shifts[0] + 1e-12).all())


def test_barres_chances_leave_a_member_that_errs():
    """At the end of the training: one member is always wrong on ARC's images, the other always right."""

    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.answer = nn.Parameter(torch.tensor([5.0, 0.0, 0.0]))

        def forward(self, x):
            return self.answer + 0 * x.flatten(1).sum(1, keepdim=True)

    defense = build_defense("barre", {"count": 2, "osp_steps": 3, "osp_lr": 0.5, "arc_steps": 1})
    model = defense.prepare(Always(), SHAPE).train()
    model.perturbation.set_chances([0.5, 0.5])
    with torch.no_grad():
        model.perturbation.others[0].answer.copy_(torch.tensor([0.0, 5.0, 0.0]))
    x, y, settings = torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.long), config("barre", epochs=4).resolve()
    expected = 0.5
    for batch in range(4):
        defense.loss(model, x, y, Clock(3, batch, 4, stage=1, stage_epoch=1), settings)
        expected = expected if batch == 0 else min(expected + 0.5 / batch / 2, 1.0)  # the last three of the training
        assert model.perturbation.probabilities[0] == pytest.approx(expected)
    assert model.training


def test_the_chance_of_a_member_that_has_none_stays_zero(monkeypatch):
    """It would be the best of the three; but it is not trained yet, or was given up. Members answer in eval mode."""
    asked = []

    def right(members, x, y):
        asked.append((members.probabilities, [module.training for module in model.modules()]))
        return torch.tensor([[True, False], [False, False], [True, True]])

    monkeypatch.setattr(barre, "answers_right", right)
    monkeypatch.setattr(barre, "ARC", lambda *_, **__: SimpleNamespace(craft=lambda model, x, y: x))
    defense = build_defense("barre", {"count": 3, "osp_lr": 0.5})
    model = defense.prepare(dense(), SHAPE).train()
    model.perturbation.set_chances([0.5, 0.5, 0.0])
    settings = config("barre", epochs=3).resolve()
    defense._choose(model, torch.rand(2, *SHAPE), torch.zeros(2).long(), settings, 2)
    # less 0.25 times the shares of wrong answers, 1/2 and 1; what is lost goes to both alike
    assert model.perturbation.probabilities == pytest.approx([0.5625, 0.4375, 0.0])
    ((chances, modes),) = asked
    assert chances == pytest.approx([0.5, 0.5, 0.0]) and not any(modes) and model.training


@pytest.mark.parametrize(("epochs", "count", "expected"), [
    (1, 2, [(1, [1, 1]), (0, [])]), (2, 2, [(1, [0, 1]), (1, [0, 1])]), (7, 3, [(3, [1, 3]), (2, [1, 2]), (2, [1, 2])]),
    (0, 2, [(0, [0, 0])]),
])  # fmt: skip
def test_milestones_are_in_proportion_to_the_epochs_of_a_stage(epochs, count, expected, monkeypatch):
    made = []
    monkeypatch.setattr(ensembles, "learning_rate_factor", lambda own, length: made.append((length, own.milestones)))
    settings = config("barre", epochs=epochs).resolve()
    milestones = [round(epochs * 0.4), round(epochs * 0.8)] if epochs > 1 else [epochs] * 2
    object.__setattr__(settings, "milestones", milestones)
    ensembles.stages_of_members(settings, count)
    assert made == [one for one in expected if one != (0, [])]


@pytest.mark.parametrize(("stage", "asked"), [(0, False), (1, True)])
def test_a_single_member_has_no_chances_to_choose(stage, asked, monkeypatch):
    made = []
    monkeypatch.setattr(barre, "ARC", lambda *values, **named: (made.append((values, named)), ARC(*values, **named))[1])
    defense = build_defense("barre", {"count": 2, "osp_steps": 3, "arc_steps": 2})
    model = defense.prepare(dense(), SHAPE)
    defense.begin_step(model, Clock(0, 0, 1, stage=stage))
    settings = config("barre", epochs=1).resolve()
    defense.loss(model, torch.rand(2, *SHAPE), torch.zeros(2).long(), Clock(0, 0, 1, stage=stage), settings)
    assert made == ([((EPS,), {"steps": 2, "norm": "linf"})] if asked else [])


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_a_sum_and_arc_takes_it_as_an_ensemble(name):
    model = build_defense(name, {"count": 2}).prepare(plain(), SHAPE).eval()
    model.perturbation.set_chances([0.7, 0.3])
    with torch.no_grad():
        model.perturbation.others[0][4].weight.neg_()
    x, y = torch.rand(40, *SHAPE), torch.arange(40) % 3
    members = members_of(model)
    assert members is not None and members.probabilities == pytest.approx((0.7, 0.3))
    each = [float((network(x).argmax(1) == y).float().mean()) for network in members.networks]
    exact = exact_accuracy(model, x, y)
    assert exact == pytest.approx(0.7 * each[0] + 0.3 * each[1])
    with torch.no_grad():
        drawn = sum(float((model(x).argmax(1) == y).float().mean()) for _ in range(400)) / 400
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(0.21 / 400 / 40))
    with torch.no_grad():
        weaker = exact_accuracy(model, ARC(EPS, steps=4, seed=0)(model, x, y), y)
    assert weaker <= exact
    with noise_disabled(model), torch.no_grad():
        assert members_of(model) is None
        assert torch.equal(model(x), plain().eval()(x))  # the first member
        assert torch.equal(remove_noise(copy.deepcopy(model))(x), model(x))


def test_a_row_has_its_draw_and_all_of_a_pass_one_if_shared():
    model = build_defense("bat").prepare(dense(), SHAPE).eval()
    model.perturbation.set_chances([0.5, 0.5])
    with torch.no_grad():
        model.perturbation.others[0][1].weight.neg_()
        x = torch.rand(1, *SHAPE).expand(64, -1, -1, -1).contiguous()
        rows = model(x)
        assert len({tuple(row.tolist()) for row in rows}) == 2
        with fixed_noise(model, 5):
            assert torch.equal(model(x), model(x)) and torch.allclose(model(x)[:7], model(x[:7]), atol=1e-5)
        model.perturbation.sharing = "per_batch"
        assert len({tuple(row.tolist()) for row in model(x)}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_strangers_network_is_trained_and_loaded(name, tmp_path):
    """Both members are trained; they and their chances are saved."""
    settings = config(
        name, epochs=2, batch_size=6, options={"count": 2, **({"osp_steps": 1} if name == "barre" else {})}
    )
    whole = train(settings, model=plain(), data=pixels(), out=tmp_path / "whole", progress=False)
    assert [line["epoch"] for line in whole.metrics] == [0, 1]

    loaded = l2p.load(tmp_path / "whole", model=plain())
    assert loaded.perturbation.probabilities == whole.model.perturbation.probabilities
    assert not torch.equal(loaded[0].weight, loaded.perturbation.others[0][0].weight)
    x = pixels().images.float() / 255
    with fixed_noise(loaded), fixed_noise(whole.model), torch.no_grad():
        assert torch.equal(loaded(x), whole.model(x))
    result = l2p.evaluate(loaded, pixels(), {"arc": ARC(EPS, steps=2)}, draws=2, progress=False)
    assert result.row("arc").stochastic and not result.row("arc", noise=False).stochastic


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bat", {"count": 1}, "count must be .* at least 2, got 1"),
        ("bat", {"weight": 0.0}, "weight is 0.0"),
        ("barre", {"count": True}, "count must be"),
        ("barre", {"osp_lr": -1}, "osp_lr is -1"),
        ("barre", {"osp_steps": -1}, "osp_steps must be"),
    ],
)
def test_a_wrong_option_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_defense(name, options)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bat", {"weight_average": 0.99}, "weight_average is 0.99, but BAT"),
        ("barre", {"weight_average": 0.99}, "weight_average is 0.99, but BARRE"),
        ("barre", {"adversarial_delay": 2}, "adversarial_delay is 2"),
        ("bat", {"awp": 0.01}, "loss of its own"),
        ("barre", {"loss": "averaged"}, "loss of its own"),
    ],
)
def test_settings_that_members_cannot_follow_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_defense(name).check(config(name, **settings).resolve().closed())


def test_an_ensemble_without_end_is_refused():
    with pytest.raises(ConfigError, match="100 members at most"):
        build_defense("bat", {"count": 10**6}).prepare(dense(), SHAPE)


def test_what_is_no_ensemble_or_one_already_is_refused():
    with pytest.raises(ConfigError, match="no random ensemble"):
        build_defense("bat").begin_step(dense(), Clock(0, 0, 1))
    model = build_defense("bat").prepare(dense(), SHAPE)
    with pytest.raises(SiteError, match="already"):
        build_defense("bat").prepare(model, SHAPE)
    assert len(noise_modules(model)) == 1


def test_a_mixture_is_the_log_of_the_weighed_mean_probability():
    members = [dense(), dense()]
    with torch.no_grad():
        members[1][1].weight.normal_()
    x = torch.rand(4, *SHAPE)
    expected = sum(weight * torch.softmax(one(x), 1) for one, weight in zip(members, (0.75, 0.25), strict=True))
    assert torch.allclose(ensembles.Mixture(members, (0.75, 0.25))(x).exp(), expected, atol=1e-6)
