"""The contract of every registered attack, and the closed-form optima."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from learn2perturb.attacks import FGSM, PGD, SPSA, Attack, AttackResult, build_attack, list_attacks, surrogate
from learn2perturb.attacks.gradients import AVERAGES
from learn2perturb.attacks.losses import LOSSES, margin
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError, UnknownNameError
from learn2perturb.registry import ATTACKS
from tests.problems import Linear, NoisyLinear, Quadratic

SHAPE = (3, 4, 4)
RADII = {"linf": 8 / 255, "l2": 0.5}
SIZES = {**RADII, "l0": 2}
# Small budgets: the contract is the same for any.
SMALL = {
    "apgd": {"steps": 5},
    "apgd_t": {"steps": 4, "targets": 2, "loss": "margin"},  # DLR with targets needs four classes
    "fab": {"steps": 6, "targets": 2},
    "square": {"queries": 12},
    "rays": {"queries": 12},
    "spsa": {"steps": 4, "directions": 3},
    "nes": {"steps": 4, "directions": 3},
    "surrogate": {"queries": 8},
    "cw": {"steps": 10, "search_steps": 2, "lr": 0.2, "initial_c": 10.0, "draws": 2},
    "few_pixel": {"population": 5, "generations": 3},
    "autoattack": {"steps": 3, "targets": 2, "queries": 6, "draws": 3},
    "autoattack_rand": {"steps": 3, "draws": 3, "eot": 2},
}
# An attack that needs another model is tested on its own.
CASES = [(entry.name, norm) for entry in ATTACKS if "needs" not in entry.facts for norm in entry.load().norms]
every_attack = pytest.mark.parametrize(("name", "norm"), CASES)


def test_the_cases_are_all_there():
    assert set(list_attacks()) >= {"fgsm", "pgd", *SMALL}
    assert len(CASES) >= 16
    assert list_attacks("p*") == ["pgd"]


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    """The contract of the surrogate's attack is the same however well its network is trained."""
    monkeypatch.setattr(surrogate, "_UPDATES", 1)
    monkeypatch.setattr(surrogate, "_EPOCHS", 1)


def small(name: str, norm: str, **settings) -> Attack:
    """Return the attack with a small budget and the radius of its norm."""
    return build_attack(name, **{"eps": SIZES[norm], "norm": norm, **SMALL.get(name, {}), **settings})


def network() -> nn.Sequential:
    """A network whose modes and flags are mixed on purpose."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
    )
    layers[1].eval()
    layers[0].bias.requires_grad_(False)
    return layers


def state_of(model: nn.Module) -> list:
    flags = [module.training for module in model.modules()]
    weights = [(p.requires_grad, id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()]
    return [flags, weights, [buffer.tolist() for buffer in model.buffers()]]


@pytest.fixture
def batch():
    return torch.rand(6, *SHAPE), torch.randint(5, (6,))


def zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


@every_attack
def test_result(name, norm, batch):
    x, model = batch[0], network().eval()
    y = model(x).argmax(dim=1)  # an image that is wrong already may be left as it is
    x.requires_grad_()
    before = x.detach().clone(), y.clone()
    attack = small(name, norm)
    result = attack.run(model, x, y)
    x_adv = result.x_adv
    assert isinstance(result, AttackResult)
    assert result.attack is attack
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)
    difference = (x_adv - x.detach()).flatten(1)
    torch.testing.assert_close(result.linf, difference.abs().amax(dim=1))
    torch.testing.assert_close(result.l2, difference.norm(dim=1))
    assert getattr(result, norm).max() <= SIZES[norm] + 1e-6
    assert torch.equal(result.success, model(x_adv).argmax(dim=1) != y)
    assert result.success_rate == pytest.approx(result.success.double().mean().item())
    assert result.seconds > 0
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert x.grad is None
    assert "success" in str(result)
    assert "\n" not in str(result)


@every_attack
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", ["run", "eval", "train", "keep"])
def test_modes_and_gradients_are_put_back(name, norm, mode, fails, batch):
    x, y = batch
    model = network()
    model[5].weight.grad = torch.ones_like(model[5].weight)
    attack, before, seen = small(name, norm), state_of(model), []

    def look(*_):
        seen.append((model.training, model[1].training, any(p.requires_grad for p in model.parameters())))
        if fails:
            raise ZeroDivisionError("the model failed")

    model[5].register_forward_hook(look)
    call = attack.run if mode == "run" else lambda *arguments: attack.craft(*arguments, mode=mode)
    if fails:
        with pytest.raises(ZeroDivisionError):
            call(model, x, y)
    else:
        call(model, x, y)
    expected = {"train": (True, True, False), "keep": (True, False, False)}.get(mode, (False, False, False))
    assert set(seen) == {expected}
    after = state_of(model)
    assert after[:2] == before[:2]
    assert (after[2] != before[2]) == (mode == "train")  # batch statistics move only where asked for


def test_modules_that_work_in_train_are_told_and_not_only_flagged():
    class Merging(nn.Identity):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(), Linear(SHAPE))
    x = torch.rand(2, *SHAPE)
    PGD(steps=1)(model, x, zeros(x))
    assert model[0].training
    assert not model[0].merged


@every_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_works_where_the_caller_has_gradients_off(name, norm, context):
    model = network()
    attack = small(name, norm, seed=3)
    torch.manual_seed(0)
    x, y = torch.rand(6, *SHAPE), torch.randint(5, (6,))
    expected, crafted = attack(model, x, y), attack.craft(model, x, y)
    with context():
        torch.manual_seed(0)
        x, y = torch.rand(6, *SHAPE), torch.randint(5, (6,))
        assert torch.equal(attack(model, x, y), expected)
        assert torch.equal(attack.craft(model, x, y), crafted)
        assert not torch.is_grad_enabled()


@every_attack
def test_a_callable_that_is_no_module_gives_the_same(name, norm, batch):
    model, attack = network().eval(), small(name, norm, seed=0)
    assert torch.equal(attack(model, *batch), attack(model, *batch))
    assert all(p.grad is None for p in model.parameters())


@every_attack
def test_seed_decides_everything_and_leaves_the_callers_generators_alone(name, norm, batch):
    if ATTACKS.entry(name).fact("finite_ensembles"):
        pytest.skip("takes no model with noise")
    x, model = batch[0], NoisyLinear(SHAPE, sigma=0.1)
    y = model(x).argmax(dim=1)  # images that are right: a minimum-norm attack has something to do
    attack = small(name, norm, seed=1, eot=2, eps=2 * SIZES[norm])
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = attack.run(model, x, y)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    torch.rand(3)
    second = attack.run(model, x, y)
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.success, second.success)
    other = dataclasses.replace(attack, seed=2)(model, x, y)
    assert not torch.equal(first.x_adv, other)
    assert torch.equal(attack.craft(model, x, y), first.x_adv)


@every_attack
@pytest.mark.parametrize("seed", [None, 4])
def test_success_is_judged_by_a_draw_that_the_attack_never_saw(name, norm, seed, batch):
    if ATTACKS.entry(name).fact("finite_ensembles"):
        pytest.skip("takes no model with noise")
    x, model = batch[0], NoisyLinear(SHAPE)
    result = small(name, norm, seed=seed, eot=2).run(model, x, zeros(x))
    assert sum(map(len, model.draws)) == pytest.approx((result.forward_passes + 1) * len(x))
    verified, *others = (draw.numpy().tobytes() for draw in reversed(model.draws))
    assert verified not in others
    if not isinstance(result.attack, SPSA):  # both sides of its differences have the same draws
        assert len(set(others)) == len(others)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("eot", [1, 4])
@pytest.mark.parametrize(("settings", "gradients", "scores"), [({}, 5, 0), ({"restarts": 3}, 15, 3)])
def test_passes_are_counted_per_image(average, eot, settings, gradients, scores, batch):
    x, model = batch[0], NoisyLinear(SHAPE)
    result = PGD(steps=5, eot=eot, eot_average=average, **settings).run(model, x, zeros(x))
    per_gradient = eot if average == "loss" or eot == 1 else 2 * eot
    assert result.forward_passes == gradients * per_gradient + scores * eot == len(model.draws) - 1
    assert result.backward_passes == gradients * eot


@every_attack
def test_eps_zero_returns_the_images(name, norm, batch):
    x_adv = small(name, norm, eps=0)(network(), *batch)
    assert torch.equal(x_adv, batch[0])
    assert x_adv.data_ptr() != batch[0].data_ptr()


@every_attack
def test_float64_stays_float64(name, norm, batch):
    x_adv = small(name, norm)(network().double(), batch[0].double(), batch[1])
    assert x_adv.dtype == torch.float64


@every_attack
def test_a_model_that_works_in_place_cannot_change_what_is_returned(name, norm, batch):
    seen = []

    def model(x):
        seen.append(x.detach().clone())
        if not x.requires_grad:
            x.mul_(0).add_(1)
        return x.flatten(1)[:, :5] - 1

    x_adv = small(name, norm)(model, *batch)
    assert torch.equal(x_adv, seen[-1])


@every_attack
def test_craft_never_waits_for_the_device(name, norm, batch):
    if ATTACKS.entry(name).fact("finite_ensembles"):
        pytest.skip("decides on the host whether a step is kept")
    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                reads.append(function)
            return function(*args, **(kwargs or {}))

    attack, model = small(name, norm), network()
    with Watch():
        attack.craft(model, *batch)
    assert reads == []
    with Watch():
        attack.run(model, *batch)
    assert reads  # the watch does see what run() reads


TO_THE_END = {"fgsm": {}, "pgd": {"steps": 100, "step_size": 0.05}, "apgd": {"early_stop": False}}


@pytest.mark.parametrize("name", TO_THE_END)
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_linear_optimum(name, norm, loss):
    model = Linear(SHAPE)
    x = torch.rand(5, *SHAPE) if norm == "linf" else 0.4 + 0.2 * torch.rand(5, *SHAPE)
    eps = {"linf": 0.1, "l2": 0.3}[norm]
    x_adv = build_attack(name, eps=eps, norm=norm, loss=loss, **TO_THE_END[name])(model, x, zeros(x))
    torch.testing.assert_close(x_adv, model.optimum(x, eps, norm), atol=3e-5, rtol=0)


@pytest.mark.parametrize("norm", RADII)
def test_quadratic_optimum(norm):
    x, eps = 0.4 + 0.2 * torch.rand(5, *SHAPE), {"linf": 0.05, "l2": 0.2}[norm]
    model = Quadratic(torch.rand(1, *SHAPE))
    attack = PGD(eps=eps, step_size=0.005, steps=300, norm=norm, loss="margin")
    torch.testing.assert_close(attack(model, x, zeros(x)), model.optimum(x, eps, norm), atol=0.006, rtol=0)
    # Where the ball holds the centre, it is found up to a step.
    near = model.centre + 0.01 * torch.rand(5, *SHAPE)
    torch.testing.assert_close(attack(model, near.clamp(0, 1), zeros(x)), model.centre.expand_as(x), atol=0.011, rtol=0)


def pgd_by_hand(model, x, y, eps, alpha, steps, eot):
    """PGD of the paper, written again from its text."""
    adv = torch.clamp(x + (torch.empty_like(x).uniform_(-eps, eps)), 0, 1)
    for _ in range(steps):
        gradients = []
        for _ in range(eot):
            variable = adv.clone().requires_grad_(True)
            nn.CrossEntropyLoss()(model(variable), y).backward()
            gradients.append(variable.grad * len(x))
        adv = adv + alpha * torch.sign(sum(gradients) / eot)
        adv = torch.max(torch.min(adv, x + eps), x - eps)
        adv = torch.clamp(adv, 0, 1)
    return adv


@pytest.mark.parametrize("eot", [1, 3])
def test_pgd_equals_a_transcription_at_equal_seeds(eot):
    x, model = torch.rand(6, *SHAPE), NoisyLinear(SHAPE, sigma=0.3)
    torch.manual_seed(7)
    expected = pgd_by_hand(model, x, zeros(x), 8 / 255, 0.01, 7, eot)
    torch.manual_seed(7)
    torch.testing.assert_close(PGD(steps=7, eot=eot)(model, x, zeros(x)), expected, atol=1e-6, rtol=0)


def test_fgsm_averages_before_the_sign():
    x, model = 0.2 + 0.6 * torch.rand(6, *SHAPE), NoisyLinear(SHAPE)
    torch.manual_seed(7)
    gradient = torch.zeros_like(x)
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        gradient += torch.autograd.grad(LOSSES["ce"](model(leaf), zeros(x)).sum(), leaf)[0]
    torch.manual_seed(7)
    torch.testing.assert_close(FGSM(0.1, eot=4)(model, x, zeros(x)), x + 0.1 * gradient.sign(), atol=1e-6, rtol=0)


TARGETED = [
    (name, norm, loss)
    for name, norm in CASES
    for loss in ATTACKS.entry(name).load().losses
    if ATTACKS.entry(name).load().can_target and name != "apgd_t"
]


def test_the_targeted_cases_are_all_there():
    assert len(TARGETED) >= 24
    with pytest.raises(ConfigError, match="targeted must be False, got True: AutoAttack has no targeted form"):
        small("autoattack", "linf", targeted=True)
    with pytest.raises(ConfigError, match="targets=9 tries wrong classes in turn, targeted=True asks for one"):
        build_attack("apgd_t", targeted=True)


@pytest.mark.parametrize(("name", "norm", "loss"), TARGETED)
def test_targeted_reaches_the_class_asked_for(name, norm, loss, monkeypatch):
    monkeypatch.setattr(surrogate, "_UPDATES", 200)
    torch.manual_seed(0)
    weights = torch.randn(4, 48)
    x, target = 0.4 + 0.2 * torch.rand(8, *SHAPE), torch.arange(8) % 4
    steps = {
        "pgd": {"steps": 40, "step_size": 0.05},
        "square": {"queries": 200},
        "spsa": {"steps": 40, "directions": 8},
        "nes": {"steps": 40, "directions": 8},
        "surrogate": {"queries": 300, "network": nn.Sequential(nn.Flatten(), nn.Linear(48, 4))},
        "few_pixel": {"generations": 20},
    }.get(name, {})
    result = small(name, norm, eps={"linf": 0.3, "l2": 2.0, "l0": 8}[norm], targeted=True, loss=loss, **steps).run(
        lambda x: x.flatten(1) @ weights.T, x, target
    )
    predicted = (result.x_adv.flatten(1) @ weights.T).argmax(dim=1)
    assert torch.equal(result.success, predicted == target)
    before = (x.flatten(1) @ weights.T).argmax(dim=1) == target
    assert result.success.sum() > before.sum()
    if loss == "ce" and norm == "linf" and name == "fgsm":
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(LOSSES["ce"](leaf.flatten(1) @ weights.T, target).sum(), leaf)[0]
        torch.testing.assert_close(result.x_adv, (x - 0.3 * gradient.sign()).clamp(0, 1))


@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_are_never_worse(targeted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 5))
    model[1].weight.data.mul_(20)  # a rugged loss: starts matter
    x, y = torch.rand(24, *SHAPE), torch.randint(5, (24,))
    attack = PGD(eps=0.05, steps=3, seed=0, targeted=targeted)
    with torch.no_grad():
        once, often = (margin(model(dataclasses.replace(attack, restarts=n)(model, x, y)), y) for n in (1, 6))
    gain = once - often if targeted else often - once
    assert (gain >= 0).all()
    assert (gain > 0).any()


def test_the_shared_caller_catches_an_attack_that_leaves_its_ball(batch):
    class Cheat(Attack):
        def perturb(self, query, x, y):
            return x + 2 * self.eps * (x < 0.5)

    with pytest.raises(Learn2PerturbError, match=r"Cheat left its linf ball: distance 0[.]06"):
        Cheat()(network(), *batch)


def test_nan_gradients_are_named(batch):
    with pytest.raises(InputError, match="NaN gradient"):
        PGD(0.5, norm="l2")(lambda x: (x - x).flatten(1).sqrt(), *batch)


BAD_SPECS = {
    "eps text": (FGSM, {"eps": "8/255"}, "got '8/255'; write 8/255, without quotes"),
    "eps 8": (PGD, {"eps": 8}, r"eps=8 .* \[0, 1\] pixel scale, write 8/255"),
    "eps negative": (FGSM, {"eps": -0.1}, "eps must be finite and at least 0.*-0.1"),
    "eps nan": (FGSM, {"eps": float("nan")}, "eps must be finite.*nan"),
    "eps infinite": (FGSM, {"eps": float("inf"), "norm": "l2"}, "eps must be finite.*inf"),
    "eps bool": (FGSM, {"eps": True}, "eps must be a number.*True"),
    "eps None": (FGSM, {"eps": None}, "eps must be a number.*None"),
    "norm": (PGD, {"norm": "l1"}, "norm is 'l1'; allowed: linf, l2"),
    "loss": (PGD, {"loss": "mse"}, "loss is 'mse'; allowed: ce, margin, dlr"),
    "eot_average": (PGD, {"eot_average": "mean"}, "eot_average is .*; allowed: loss, probability, logits"),
    "eot": (PGD, {"eot": 0}, "eot must be a whole number of at least 1, got 0"),
    "steps": (PGD, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    "steps float": (PGD, {"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
    "restarts": (PGD, {"restarts": -1}, "restarts must be"),
    "step_size": (PGD, {"step_size": 0}, "step_size must be finite and more than 0"),
    "step_size text": (PGD, {"step_size": "2/255"}, "step_size must be a number"),
    "random_start": (PGD, {"random_start": 1}, "random_start must be True or False, got 1"),
    "targeted": (FGSM, {"targeted": 3}, "targeted must be True or False, got 3"),
    "seed": (FGSM, {"seed": 1.5}, "seed must be a whole number or None, got 1.5"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_bad_settings(case):
    attack, settings, message = BAD_SPECS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        attack(**settings)
    assert "\n" not in str(caught.value)


def test_names_and_settings_are_checked_by_build_attack():
    with pytest.raises(UnknownNameError, match=r"unknown attack 'pdg': did you mean 'pgd'"):
        build_attack("pdg")
    with pytest.raises(ConfigError, match=r"attack 'fgsm' has no setting 'steps'; it has: eps, "):
        build_attack("fgsm", steps=3)
    assert build_attack("pgd", steps=20, eot=10) == PGD(steps=20, eot=10)


X, Y = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
BAD_INPUTS = {
    "x array": (None, np.zeros((2, 3, 4, 4)), Y, "x must be a torch.Tensor, got ndarray; use torch.as_tensor"),
    "x bytes": (None, (X * 255).byte(), Y, r"x must be float32 or float64, got torch.uint8; x.float\(\) / 255"),
    "x half": (None, X.half(), Y, "float32 or float64, got torch.float16; use x.float"),
    "x one image": (None, X[0], Y, r"shape \(N, C, H, W\), got \(3, 4, 4\); one image is x.unsqueeze"),
    "x empty": (None, X[:0], Y[:0], "x is empty, .* at least one image"),
    "x nan": (None, X * float("nan"), Y, "NaN or infinite"),
    "x bytes as float": (None, X * 255, Y, r"in \[0, 1\], got values from 127.5 to 127.5; divide bytes by 255"),
    "x normalised": (None, X - 1, Y, "normalisation into the model"),
    "y list": (None, X, [0, 0], "y must be a torch.Tensor, got list"),
    "y int32": (None, X, Y.int(), "y must be int64 class numbers, got torch.int32; use y.long"),
    "y too few": (None, X, Y[:1], r"y must have shape \(2,\), one label an image, got \(1,\)"),
    "y elsewhere": (None, X, Y.to("meta"), r"x is on cpu but y on meta; use y.to\(x.device\)"),
    "y too high": (None, X, Y + 5, r"y must be in 0..4 \(the model has 5 classes\), got values from 5 to 5"),
    "y negative": (None, X, Y - 1, "got values from -1 to -1"),
    "model no callable": (7, X, Y, "model must be callable, .* got int"),
    "model tuple": (lambda x: (x.flatten(1), x), X, Y, r"got a tuple; wrap it .* lambda x: model\(x\)\[0\]"),
    "model dict": (lambda x: {"logits": x}, X, Y, "got a dict; wrap it"),
    "model 1-d": (lambda x: x.flatten(1).sum(1), X, Y, r"classes >= 2\), got \(2,\)"),
    "model one class": (lambda x: x.flatten(1).sum(1, keepdim=True), X, Y, r"got \(2, 1\); a model with one output"),
    "model other rows": (lambda x: x.flatten(1)[:1], X, Y, r"got \(1, 48\)"),
    "model classes": (lambda x: x.flatten(1).argmax(1, keepdim=True), X, Y, "return float logits, .* got torch.int64"),
    "model nan": (lambda x: x.flatten(1) / 0, X, Y, "NaN or infinite logits"),
    "model no gradient": (lambda x: x.detach().flatten(1), X, Y, "no gradient with respect to x"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(case):
    model, x, y, message = BAD_INPUTS[case]
    model = network() if model is None else model
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(InputError, match=message) as caught:
        PGD()(model, x, y)
    assert "\n" not in str(caught.value)
    assert before is None or state_of(model) == before


def test_bad_cases_are_many_and_an_unknown_mode_is_one_more():
    assert len(BAD_SPECS) + len(BAD_INPUTS) == 42
    with pytest.raises(ConfigError, match="mode must be 'eval', 'train' or 'keep', got 'test'"):
        PGD().craft(network(), X, Y, mode="test")
