"""Networks and callers of every kind: types, masked classes, modules that are fixed, modes of torch around a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.attacks import PGD, Square
from learn2perturb.attacks.auto_attack import AutoAttack, auto_attack_report
from learn2perturb.attacks.probing import passes_differ
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation import Predictor
from learn2perturb.registry import ATTACKS
from tests.attacks.test_attacks import SIZES, every_attack, small

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(6, 3, 4, 4, generator=GENERATOR), torch.arange(6) % 5
DIGITS = torch.rand(8, 1, 8, 8, generator=GENERATOR), torch.arange(8) % 5


def mlp(shape: tuple[int, int, int] = (3, 4, 4)) -> nn.Sequential:
    torch.manual_seed(0)
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.Tanh(), nn.Linear(16, 5)).eval()


class Masked(nn.Module):
    """A network of which two classes are never the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).masked_fill(torch.tensor([False, False, True, True, False]), -torch.inf)


@every_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_of_other_types_are_attacked_in_their_type(name, norm, dtype):
    network, seen = mlp().to(dtype), set()
    network[0].register_forward_hook(lambda _module, args, _output: seen.add(args[0].dtype))
    result = small(name, norm).run(network, X, network(X.to(dtype)).argmax(dim=1))
    assert seen == {dtype}
    assert result.x_adv.dtype == torch.float32
    assert getattr(result, norm).max() <= SIZES[norm] + 1e-6
    if not ATTACKS.entry(name).fact("finite_ensembles"):  # which keeps a step only if it fools
        assert not torch.equal(result.x_adv, X)


class InPlace(nn.Module):
    """A network that normalises its images where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.sub_(0.5).mul_(2))


@every_attack
def test_a_network_that_works_in_place_is_attacked_as_one_that_does_not(name, norm):
    model, images = InPlace().eval(), X.clone()
    labels = model(X.clone()).argmax(dim=1)
    attack = small(name, norm, seed=0, eot=2, eot_average="probability")
    found = attack.run(model, images, labels).x_adv
    assert torch.equal(images, X)
    assert torch.equal(found, attack.run(lambda x: model.network((x - 0.5) * 2), X, labels).x_adv)


@every_attack
def test_double_images_on_any_network_stay_double(name, norm):
    attack, network = small(name, norm, seed=0), mlp()
    double = attack.run(network, X.double(), Y)
    assert double.x_adv.dtype == torch.float64
    assert attack.run(network.double(), X.double(), Y).x_adv.dtype == torch.float64


@every_attack
def test_masked_classes_are_never_the_answer_and_no_obstacle(name, norm):
    model = Masked()
    open_to = [0, 1, 4]
    y = model(X).argmax(dim=1)
    result = small(name, norm).run(model, X, y)
    if not ATTACKS.entry(name).fact("finite_ensembles"):
        assert not torch.equal(result.x_adv, X)
    assert set(model(result.x_adv).argmax(dim=1).tolist()) <= set(open_to)
    # An image whose own class is masked is wrong already; nothing of it is NaN.
    assert small(name, norm).run(model, X, torch.full((6,), 2)).success.all()


@every_attack
def test_a_masked_class_changes_no_attack_on_the_others(name, norm):
    network = mlp()
    without = lambda x: network(x)[:, [0, 1, 4]]  # noqa: E731
    masked = lambda x: network(x).masked_fill(torch.tensor([False, False, True, True, False]), -torch.inf)  # noqa: E731
    y = without(X).argmax(dim=1)
    if name == "surrogate":
        pytest.skip("a substitute with five outputs starts from other weights than one with three")
    settings = {} if name in ("fab", "apgd_t", "autoattack", "autoattack_rand") else {"loss": "margin"}
    attack = small(name, norm, seed=0, **settings)
    one, other = attack.run(without, X, y), attack.run(masked, X, torch.tensor([0, 1, 4])[y])
    assert torch.equal(one.success, other.success)


def test_votes_of_no_member_are_scores_like_any():
    torch.manual_seed(0)
    noisy = l2p.perturb(mlp((1, 8, 8)), input_shape=(1, 8, 8), sites=["1"]).eval()
    vote = Predictor(noisy, "vote", members=3)
    assert Square(0.1, queries=5, seed=0).run(vote, *DIGITS).x_adv.isfinite().all()
    with pytest.raises(InputError, match="-inf for every class"):
        PGD().run(lambda x: mlp()(x) - torch.inf, X, Y)


def fixed_modules() -> dict[str, nn.Module]:
    exported = torch.export.export(mlp(), (X,)).module()
    return {
        "exported": exported,
        "inside": nn.Sequential(nn.Identity(), torch.export.export(mlp(), (X,)).module(), nn.Dropout()),
        "scripted": torch.jit.script(mlp()),
        "frozen": torch.jit.freeze(torch.jit.script(mlp())),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["exported", "inside", "scripted", "frozen"])
def test_modules_of_one_mode_are_what_the_network_is(kind):
    model = fixed_modules()[kind]
    flags = [getattr(module, "training", None) for module in model.modules()]
    expected = PGD(seed=0, steps=3).run(mlp(), X, Y)
    assert torch.equal(PGD(seed=0, steps=3).run(model, X, Y).x_adv, expected.x_adv)
    found = l2p.evaluate(model, (X, Y), {"pgd": PGD(steps=3)}, batch_size=6)
    assert found.rows[1].correct == l2p.evaluate(mlp(), (X, Y), {"pgd": PGD(steps=3)}, batch_size=6).rows[1].correct
    assert [getattr(module, "training", None) for module in model.modules()] == flags


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}
caller_modes = pytest.mark.parametrize("mode", MODES)


@every_attack
@caller_modes
def test_attacks_do_not_see_the_callers_modes(name, norm, mode):
    network, attack = mlp(), small(name, norm, seed=0)
    expected = attack.run(network, X, Y)
    with MODES[mode]():
        found, crafted = attack.run(network, X, Y), attack.craft(network, X, Y)
        assert torch.is_grad_enabled() == (mode == "autocast")
        assert torch.is_autocast_enabled("cpu") == (mode == "autocast")
    assert torch.equal(found.x_adv, expected.x_adv)
    assert torch.equal(found.success, expected.success)
    assert crafted.shape == X.shape


@caller_modes
def test_scores_and_records_do_not_depend_on_the_callers_modes(mode):
    torch.manual_seed(0)
    network = l2p.perturb(mlp((1, 8, 8)), input_shape=(1, 8, 8), sites=["1"]).eval()
    seen = set()
    network[3].register_forward_hook(lambda _module, _args, output: seen.add(output.dtype))

    def everything() -> list:
        row = l2p.evaluate(network, DIGITS, {"pgd": PGD(steps=2)}, draws=2).row("pgd")
        certified = l2p.certify(network, DIGITS, n=20, n0=5, method="smoothing", sigma=0.1)
        report = auto_attack_report(
            network, *DIGITS, AutoAttack(steps=2, targets=1, queries=3, draws=2, seed=0), draws=2
        )
        return [row.correct, row.predictions, certified.votes, certified.radii, report.accuracy]

    expected = everything()
    with MODES[mode]():
        assert everything() == expected
    assert seen == {torch.float32}


@caller_modes
def test_training_does_not_depend_on_the_callers_modes(mode):
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    config = l2p.TrainConfig(
        defense="pgd_at", model="digits_cnn", dataset="digits", recipe="fast", epochs=1, batch_size=16, limit=32,
        monitor=0, device="cpu", engine="plain", tensorboard=False,
    )  # fmt: skip
    l2p.train(config, model=networks[0], progress=False)
    with MODES[mode]():
        l2p.train(config, model=networks[1], progress=False)
    assert torch.equal(networks[0][1].weight, networks[1][1].weight)


def test_weights_made_in_inference_mode_are_refused_with_the_fix():
    with torch.inference_mode():
        network = mlp()
    with pytest.raises(InputError, match=r"made inside torch.inference_mode\(\).* copy.deepcopy"):
        PGD().run(network, X, Y)


def test_an_exported_network_is_not_trained():
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 5
    model = torch.export.export(mlp((1, 8, 8)), (images,)).module()
    config = l2p.TrainConfig(
        defense="none", dataset="digits", recipe="fast", epochs=1, batch_size=8, monitor=0, device="cpu", engine="plain"
    )
    with pytest.raises(ConfigError, match="torch.export"):
        l2p.train(config, model=model, data=(images, labels), progress=False)


def test_one_rule_tells_whether_a_model_is_random():
    network = mlp()
    before = torch.get_rng_state()
    assert not passes_differ(network, X)
    assert passes_differ(lambda x: network(x) + 1e-6 * torch.rand(len(x), 5), X)
    rare = lambda x: network(x) + (torch.rand(()) < 0.5)  # noqa: E731 (two passes agree half of the time)
    assert passes_differ(rare, X)
    assert torch.equal(torch.get_rng_state(), before)
