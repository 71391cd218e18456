"""Every noise law at every place: its moments, switch, replay, description, copies; and a custom law."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.defenses import Defense
from learn2perturb.errors import ConfigError, NoiseError, SiteError, UnknownNameError
from learn2perturb.noise import (
    NoiseModule,
    add_noise,
    fixed_noise,
    insert,
    noise_disabled,
    noise_modules,
    noise_parameters,
    noise_spec,
    register_distribution,
    register_noise,
    remove_noise,
)
from learn2perturb.noise.distributions import DISTRIBUTIONS, draw_seeded
from learn2perturb.noise.laws import noise_law
from learn2perturb.registry import DEFENSES, NOISES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_noise.py"
_spec = importlib.util.spec_from_file_location("own_noise", EXAMPLE)
assert _spec is not None and _spec.loader is not None
own_noise = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(own_noise)
OWN = NOISES._entries.pop("own/affine")  # known within the tests of this file only

PLACES = ("output", "input", "weight")
SHAPE = (1, 6, 6)
LAWS = [*(entry.name for entry in NOISES if entry.fact("everywhere", default=True)), OWN.name]
EVERY = pytest.mark.parametrize("law", LAWS)
EVERYWHERE = pytest.mark.parametrize("place", PLACES)
# law -> deviation of the perturbed value v, of spread s, at the first values of its scale
DEVIATIONS = {
    "feature": lambda v, s: torch.full_like(v, 0.25),
    "weight": lambda v, s: torch.full_like(v, 0.25) * s,
    "variational": lambda v, s: torch.full_like(v, 0.1),
    "multiplicative": lambda v, s: 0.25 * v.abs(),
    "own/affine": lambda v, s: 0.05 + 0.1 * v.abs(),
}


@pytest.fixture(autouse=True)
def own_law():
    NOISES._entries[OWN.name] = OWN
    yield
    NOISES._entries.pop(OWN.name)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


def noisy(law, place, **settings):
    return add_noise(plain(), law, place=place, input_shape=SHAPE, sites=["0", "3"], **settings)


def images(n=3):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_every_law_has_its_deviation_here():
    assert set(LAWS) == set(DEVIATIONS)


@EVERY
@pytest.mark.parametrize("features", [True, False])
def test_mean_and_deviation_are_those_of_the_law(law, features):
    value = torch.linspace(-2, 2, 8).repeat(4000, 1) if features else torch.linspace(-2, 2, 8)
    module = noise_law(law)((8,), site="here", place="output" if features else "weight")
    torch.manual_seed(2)
    with torch.no_grad():
        drawn = module.perturb(value) if features else torch.stack([module(value) for _ in range(4000)])
    one = value[0] if features else value
    expected = DEVIATIONS[law](one, value.std())
    assert torch.allclose(drawn.mean(0), one, atol=5 * float(expected.max()) / 4000**0.5)
    assert torch.allclose(drawn.std(0), expected, rtol=0.06)


@EVERY
@EVERYWHERE
def test_a_law_serves_every_place(law, place):
    network, x = noisy(law, place), images()
    assert [module.place for module in noise_modules(network)] == [place, place]
    assert not torch.equal(network(x), network(x))
    with noise_disabled(network):
        assert torch.equal(network(x), plain()(x))
    with fixed_noise(network, seed=3):
        first = network(x)
        assert torch.equal(first, network(x))
        if law != "weight":  # whose size follows the spread over the whole batch
            assert torch.allclose(first[:1], network(x[:1]), atol=1e-6)
    with fixed_noise(network, seed=4):
        assert not torch.equal(first, network(x))
    network.zero_grad()
    network(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in noise_parameters(network))
    assert torch.equal(remove_noise(network)(x), plain()(x))


@EVERY
@EVERYWHERE
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: insert(plain(), noise_spec(network))])
def test_a_description_and_a_copy_are_the_same_noise(law, place, copied):
    network, x = noisy(law, place, init=0.2, granularity="channel", distribution="laplace"), images()
    for number, parameter in enumerate(noise_parameters(network)):
        nn.init.uniform_(parameter, 0.1, 0.2 + number)
    twin = copied(network)
    twin.load_state_dict(network.state_dict())  # strictly: no key is missing
    assert noise_spec(twin) == noise_spec(network)
    assert all(spec["granularity"] == "channel" and spec["distribution"] == "laplace" for spec in noise_spec(twin))
    with fixed_noise(network), fixed_noise(twin):
        assert torch.equal(network(x), twin(x))


@EVERY
def test_a_plain_checkpoint_loads_and_the_plain_keys_stay(law):
    network = noisy(law, "output")
    assert set(plain().state_dict()) <= set(network.state_dict())
    for place in PLACES:
        network = noisy(law, place)
        network.load_state_dict(plain().state_dict())


@EVERY
def test_rows_share_a_draw_if_asked(law):
    network = noisy(law, "output", sharing="per_batch")
    same = network(images(1).expand(3, -1, -1, -1))
    assert torch.allclose(same[0], same[1], atol=1e-6)
    network = noisy(law, "output")
    other = network(images(1).expand(3, -1, -1, -1))
    assert not torch.allclose(other[0], other[1], atol=1e-6)


def test_features_of_another_shape_are_refused_by_every_law():
    for law in LAWS:
        with pytest.raises(SiteError, match="made for"):
            noisy(law, "output", granularity="element")(torch.rand(2, 1, 7, 7))


@pytest.mark.parametrize(("share", "filters", "random"), [(0.75, 4, 3), (0.1, 4, 1), (0.99, 4, 3), (0.5, 2, 1)])
def test_at_least_one_filter_is_random_and_one_is_learned(share, filters, random):
    assert noise_law("projection")((filters, 1, 3, 3), site="0", share=share).random == random


@pytest.mark.parametrize("law", ["weight", "multiplicative"])
def test_a_scale_may_begin_at_zero_and_is_no_noise_then(law):
    x, network = images(), noisy(law, "output", init=0.0)
    assert torch.equal(network(x), plain()(x))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"law": "variational", "init": 0.0}, ConfigError, "above 0"),
        ({"law": "variational", "prior": 0.0}, ConfigError, "above 0"),
        ({"law": "featur"}, UnknownNameError, "feature"),
        ({"law": "feature", "int": 0.2}, UnknownNameError, "init"),
        ({"law": "multiplicative", "minimum": 0.2}, UnknownNameError, "minimum"),
        ({"law": "feature", "place": "the weight"}, ConfigError, "output"),
        ({"law": "feature", "place": "gamma"}, SiteError, "gamma"),
        ({"law": "multiplicative", "init": -1}, ConfigError, "-1"),
        ({"law": "multiplicative", "granularity": "row"}, ConfigError, "row"),
        ({"law": "multiplicative", "distribution": "cauchy"}, UnknownNameError, "cauchy"),
    ],
)
def test_what_is_not_allowed_is_refused_and_nothing_inserted(arguments, error, text):
    network = plain()
    with pytest.raises(error, match=text):
        add_noise(network, **{"input_shape": SHAPE, "sites": ["0"], **arguments})
    assert not noise_modules(network)


# --- a custom law


@pytest.fixture
def forgotten():
    """Forget what a test registers."""
    before = dict(DEFENSES._entries), dict(NOISES._entries), dict(DISTRIBUTIONS)
    yield
    for table, own in zip((DEFENSES._entries, NOISES._entries, DISTRIBUTIONS), before, strict=True):
        table.clear()
        table.update(own)


@dataclass(frozen=True, kw_only=True)
class OwnDefense(Defense):
    """Learns the noise of the example."""

    place: str = "output"

    def prepare(self, network, input_shape):
        """Insert it."""
        return add_noise(network, "own/affine", place=self.place, input_shape=input_shape, granularity="channel")


@EVERYWHERE
def test_a_law_of_ones_own_is_trained_saved_and_loaded(place, tmp_path, forgotten):
    DEFENSES.register("own", f"{__name__}:OwnDefense", "for this test")
    config = l2p.TrainConfig(
        defense="own", options={"place": place}, model="digits_cnn", dataset="digits", recipe="fast", epochs=1,
        limit=64, batch_size=32, attack_steps=1, monitor=0, tensorboard=False, engine="plain", device="cpu",
    )  # fmt: skip
    run = l2p.train(config, out=tmp_path / "run", progress=False)
    assert run.metrics[-1]["slope_mean"] != 0.1  # it was learned, and the metrics have it under its own name
    loaded = l2p.load(tmp_path / "run")
    x = torch.rand(3, 1, 8, 8)
    assert [type(module).__name__ for module in noise_modules(loaded)] == ["Affine"] * len(noise_modules(loaded))
    with fixed_noise(run.model), fixed_noise(loaded):
        assert torch.equal(run.model(x), loaded(x))


def test_the_example_runs(capsys):
    own_noise.main()
    told = capsys.readouterr().out.splitlines()
    assert float(told[0].split()[-1]) > 0 and float(told[1].split()[-1]) == 0


@pytest.mark.parametrize(("words", "summary"), [
    ("One line.", "One line"), ("\n    First line.\n\n    Another.", "First line"), (None, "Law"), ("", "Law"),
])  # fmt: skip
def test_a_law_is_summed_up_by_its_first_line_or_its_name(words, summary, forgotten):
    class Law(NoiseModule):
        noisy = own_noise.Affine.noisy
        scale = own_noise.Affine.scale

    Law.__doc__ = words
    register_noise("own/summed", paper="A paper", year=2020)(Law)
    assert NOISES.entry("own/summed").summary == summary


def test_a_law_that_is_not_whole_or_not_new_is_refused(forgotten):
    class Half(NoiseModule):
        def scale(self):
            return "theta", torch.zeros(())

    with pytest.raises(NoiseError, match="lacks noisy"):
        register_noise("own/half")(Half)
    with pytest.raises(NoiseError, match="no NoiseModule"):
        register_noise("own/linear")(nn.Linear)
    for taken in ("feature", "own/affine"):
        with pytest.raises(NoiseError, match="known already"):

            @register_noise(taken)
            class Other(NoiseModule):
                def noisy(self, value, eps):
                    return value

                def scale(self):
                    return "theta", torch.zeros(())

    assert noise_law("own/affine") is own_noise.Affine
    assert register_noise("own/affine")(own_noise.Affine) is own_noise.Affine  # a cell that is run twice


def test_a_distribution_of_ones_own_is_one_entry(forgotten):
    triangular = lambda u: 6**0.5 * torch.where(u < 0.5, (2 * u).sqrt() - 1, 1 - (2 - 2 * u).clamp_min(0).sqrt())  # noqa: E731
    register_distribution("own/triangular", triangular)
    drawn = draw_seeded("own/triangular", (200_000,), 5)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
    assert float(drawn.var()) == pytest.approx(1, abs=0.01)
    assert float(drawn.abs().max()) <= 6**0.5
    network = noisy("feature", "output", distribution="own/triangular")
    with fixed_noise(network):
        assert torch.equal(network(images()), network(images()))
    with pytest.raises(ConfigError, match="variance"):
        register_distribution("own/wide", lambda u: 4 * u - 2)
    with pytest.raises(ConfigError, match="mean"):
        register_distribution("own/shifted", lambda u: 12**0.5 * u)
    with pytest.raises(ConfigError, match="already"):
        register_distribution("gaussian", triangular)


@pytest.mark.parametrize(("mean", "deviation", "known"), [
    (0.0, 1.0, True), (0.009, 1.0, True), (-0.009, 1.0, True), (0.0, 1.0045, True), (0.0, 0.9955, True),
    (0.015, 1.0, False), (-0.015, 1.0, False), (0.0, 1.0075, False), (0.0, 0.9925, False),
])  # fmt: skip
def test_a_distribution_has_mean_0_and_variance_1_within_one_per_cent(mean, deviation, known, forgotten):
    asked = []

    def from_uniform(u):
        asked.append(u)
        return mean + deviation * 12**0.5 * (u - 0.5)

    if known:
        register_distribution("own/moved", from_uniform)
    else:
        with pytest.raises(ConfigError, match="it must have 0 and 1"):
            register_distribution("own/moved", from_uniform)
    (u,) = asked  # the middles of 65,536 equal steps
    assert len(u) == 65_536 and u[0].item() == 2**-17 and u[-1].item() == 1 - 2**-17
