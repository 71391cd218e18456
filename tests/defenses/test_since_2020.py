"""WCA, RPF, RNA and CTRW on any network: what is drawn, what is left with the noise off, saving, refusals."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.data import ImageData
from learn2perturb.defenses import build_defense
from learn2perturb.engine import execution, folding
from learn2perturb.errors import ConfigError, NoiseError, SiteError
from learn2perturb.noise import fixed_noise, insert, noise_disabled, noise_modules, noise_spec, remove_noise
from learn2perturb.training import TrainConfig, train

SHAPE = (2, 6, 6)
NAMES = ("wca", "wca_at", "rpf", "rna", "ctrw")


class Own(nn.Module):
    """A network of a stranger's: registered in another order than it is called, with a shortcut."""

    def __init__(self):
        super().__init__()
        self.answer = nn.Linear(8, 3)
        self.late = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.stem = nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return self.answer((h + self.norm(self.late(h))).mean((2, 3)))


def prepared(name, **options):
    torch.manual_seed(0)
    return build_defense(name, options).prepare(Own(), SHAPE).eval()


def images(n=4):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_where_the_noise_is():
    found = {
        name: [(noise.site, noise.place, noise.sharing) for noise in noise_modules(prepared(name))] for name in NAMES
    }
    assert found == {
        "wca": [("answer", "input", "per_example")],
        "wca_at": [("answer", "input", "per_example")],
        "rpf": [("stem", "weight", "per_example")],  # a weight has one draw a pass
        "rna": [("norm", "output", "per_example")],
        "ctrw": [("stem", "input", "per_batch")],
    }


@pytest.mark.parametrize("name", NAMES)
def test_draws_differ_are_replayed_and_off_is_one_network(name):
    model, x = prepared(name), images()
    with torch.no_grad():
        assert len({tuple(model(x).flatten().tolist()) for _ in range(8)}) > 1
        for seed in range(4):
            with fixed_noise(model, seed):
                assert torch.equal(model(x), model(x))
        with noise_disabled(model):
            assert torch.equal(model(x), model(x))
        for twin in (copy.deepcopy(model), insert(Own(), noise_spec(model)).eval()):
            twin.load_state_dict(model.state_dict())
            assert noise_spec(twin) == noise_spec(model)
            with noise_disabled(model), noise_disabled(twin):
                assert torch.allclose(model(x), twin(x))
            with fixed_noise(model, 3), fixed_noise(twin, 3):
                assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_strangers_network_is_trained_loaded_and_evaluated(name, tmp_path):
    pixels = torch.randint(0, 256, (12, *SHAPE), dtype=torch.uint8)
    data = ImageData("random", pixels, torch.arange(12) % 3, ("a", "b", "c"), False, 0, (0.5,) * 2, (0.25,) * 2)
    config = TrainConfig(
        defense=name, recipe="fast", epochs=1, batch_size=6, attack_steps=1, monitor=0, engine="plain", device="cpu",
        tensorboard=False,
    )  # fmt: skip
    run = train(config, model=Own(), data=data, out=tmp_path / "run", progress=False)
    loaded = l2p.load(tmp_path / "run", model=Own())
    with fixed_noise(run.model), fixed_noise(loaded), torch.no_grad():
        assert torch.equal(run.model(images()), loaded(images()))
    result = l2p.evaluate(loaded, data, {"pgd": l2p.attacks.PGD(0.1, 0.05, 2, eot=2)}, draws=2, progress=False)
    assert result.row("pgd").stochastic and not result.row("pgd", noise=False).stochastic


@pytest.mark.parametrize("name", ["wca", "rna", "rpf"])
def test_without_its_noise_a_network_is_the_one_with_the_noise_off(name):
    model, x = prepared(name), images()
    with noise_disabled(model), torch.no_grad():
        off = model(x)
    plain = remove_noise(copy.deepcopy(model))
    assert set(plain.state_dict()) == set(Own().state_dict())
    with torch.no_grad():
        assert torch.allclose(plain(x), off, atol=1e-6)


def test_noise_that_holds_learned_weights_is_not_removed():
    model = prepared("ctrw")
    with pytest.raises(NoiseError, match="'stem'.*gain.*noise_disabled"):
        remove_noise(model)
    assert len(noise_modules(model)) == 1
    with noise_disabled(model), torch.no_grad():
        model.stem.perturbation.mu.fill_(2.0)
        seen = []
        model.stem.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        model(images())
    assert torch.equal(seen[0], 2 * images())


def test_rpf_draws_filters_of_the_stated_size_and_keeps_the_others():
    torch.manual_seed(0)
    network = build_defense("rpf", {"share": 0.5}).prepare(nn.Sequential(nn.Conv2d(3, 10, 3)), (3, 5, 5))
    drawn = torch.stack([network[0].weight.detach() for _ in range(400)])
    assert torch.equal(drawn[0, :5], drawn[1, :5])
    assert drawn[0, :5].flatten(1).std(1) == pytest.approx(torch.full((5,), 1 / 3).numpy(), rel=1e-3)
    assert drawn[:, 5:].std().item() == pytest.approx(1 / 3, rel=0.01)
    assert drawn[:, 5:].mean(0).abs().max() < 5 / 3 / 400**0.5


def test_rna_picks_each_norm_as_often_and_each_layer_for_itself():
    model = prepared("rna", channels=[1, 4])
    noise = model.norm.perturbation
    picks = torch.bincount(torch.cat([noise._pick(images()) for _ in range(3000)]), minlength=3)
    assert picks.min() > 1000 - 4.5 * (3000 * 2 / 9) ** 0.5
    two = build_defense("rna").prepare(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)), SHAPE)
    with fixed_noise(two, 1):
        pairs = set()
        for seed in range(40):
            for module in noise_modules(two):
                module.replay = seed
            pairs.add(tuple(int(module._pick(images())) for module in noise_modules(two)))
    assert len(pairs) == 4


def test_rna_is_not_folded_into_the_convolution_before_it():
    """A folded norm is given what it would have made; a GroupNorm must see what the convolution made."""
    model, x = prepared("rna", channels=[4]), images()
    with torch.no_grad():
        model.norm.weight.uniform_(-2, 2), model.norm.running_mean.uniform_(-1, 1)
        with noise_disabled(model):
            assert len(folding.pairs(model, x)) == 1  # remembered for passes with the noise on
        for seed in range(4):
            with fixed_noise(model, seed):
                with execution.running(execution.FAST), execution.attacking(model, x, True):
                    folded = model(x)
                assert torch.allclose(folded.float(), model(x), atol=1e-4)


def test_ctrw_holds_sigma_to_its_bound():
    noise = prepared("ctrw", least=0.5).stem.perturbation
    with torch.no_grad():
        noise.sigma.copy_(torch.linspace(0.2, 1.0, noise.sigma.numel()).view_as(noise.sigma))
    noise.project()
    assert noise.sigma.min().item() == pytest.approx(0.5)
    assert noise.sigma.max().item() == pytest.approx(1.0)


def test_wcas_isotropic_noise_is_a_diagonal():
    model = prepared("wca", variance="isotropic")
    covariance = model.answer.perturbation.covariance().detach()
    assert torch.equal(covariance, covariance.diagonal().diag()) and bool((covariance.diagonal() > 0).all())


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(72, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.last(self.one(x.flatten(1))))


@pytest.mark.parametrize(
    ("name", "options", "network", "error", "message"),
    [
        ("wca", {"variance": "full"}, None, ConfigError, "anisotropic, isotropic"),
        ("wca", {}, nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten()), SiteError, "no linear layer"),
        ("wca", {}, Twice(), SiteError, "'last', is called more than once in a pass"),
        ("rpf", {"share": 1.0}, None, ConfigError, "share is 1.0"),
        ("rpf", {}, LINEAR, SiteError, "no convolution"),
        ("rpf", {}, nn.Sequential(nn.Conv2d(2, 1, 3)), SiteError, "two filters"),
        ("rna", {"channels": []}, None, ConfigError, "channels is \\[\\]"),
        ("rna", {"channels": [3]}, None, ConfigError, "divides 8, those of 'norm'"),
        ("rna", {}, LINEAR, SiteError, "no BatchNorm2d"),
        ("ctrw", {"least": 1.5}, None, ConfigError, "least is 1.5"),
        ("ctrw", {}, LINEAR, SiteError, "no convolution"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_inserted(name, options, network, error, message):
    network = copy.deepcopy(network) if network is not None else Own()
    with pytest.raises(error, match=message):
        build_defense(name, options).prepare(network, SHAPE)
    assert not noise_modules(network)


@pytest.mark.parametrize("name", [*NAMES, "smoothadv", "bat", "barre"])
def test_a_resumed_training_is_the_same_to_the_bit(name, tmp_path):
    """From the end of the first epoch, at which the second member of an ensemble begins."""
    pixels = torch.randint(0, 256, (12, *SHAPE), dtype=torch.uint8)
    data = ImageData("random", pixels, torch.arange(12) % 3, ("a", "b", "c"), False, 0, (0.5,) * 2, (0.25,) * 2)
    options = {"count": 2, **({"osp_steps": 1} if name == "barre" else {})} if name in ("bat", "barre") else {}
    config = TrainConfig(
        defense=name, recipe="fast", epochs=2, batch_size=6, attack_steps=1, monitor=0, engine="plain", device="cpu",
        tensorboard=False, options=options, loss_draws=2,
    )  # fmt: skip

    def started():
        torch.manual_seed(0)
        return Own()

    whole = train(config, model=started(), data=data, out=tmp_path / "run", progress=False).model.state_dict()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    again = train(config, model=started(), data=data, out=tmp_path / "run", progress=False).model.state_dict()
    assert [key for key, value in whole.items() if not torch.equal(value, again[key])] == []


def test_rpf_needs_two_filters_of_a_convolution_that_is_not_transposed():
    model = build_defense("rpf").prepare(nn.Sequential(nn.Conv2d(2, 2, 3)), SHAPE)
    assert noise_modules(model)[0].random == 1
    for first in (
        nn.ConvTranspose2d(2, 4, 3),
        nn.Conv2d(2, 1, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)),
    ):
        with pytest.raises(SiteError, match="no weight of its own with two filters or more"):
            build_defense("rpf").prepare(nn.Sequential(first), SHAPE)
