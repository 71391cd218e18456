"""Several draws in one pass: where copies of an image have draws of their own, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from learn2perturb.attacks import APGD, CW, FAB, PGD
from learn2perturb.attacks import query as asking
from learn2perturb.attacks.gradients import AVERAGES, fresh_values, input_gradient, value_and_gradient
from learn2perturb.attacks.listening import passes_told_to
from learn2perturb.attacks.losses import LOSSES
from learn2perturb.attacks.query import Query
from learn2perturb.defenses import Clock, build_defense
from learn2perturb.engine import FAST32, PLAIN, by_row, compiling, execution, running
from learn2perturb.engine.by_row import copies_are_draws, draws_at_once
from learn2perturb.engine.ranks import Ranks, Share, sharing
from learn2perturb.models import RandomEnsemble, build_model
from learn2perturb.noise import NoiseFree, NoiseModule, fixed_noise, insert, noise_disabled, noise_modules, perturb
from learn2perturb.noise.laws import Perturbation, noise_law
from learn2perturb.registry import DEFENSES, MODELS, NOISES
from learn2perturb.training import TrainConfig
from tests.problems import NoisyLinear

SHAPE = (1, 8, 8)
AT_ONCE = dataclasses.replace(PLAIN, full_passes=True)  # plain but for that: what it changes is seen alone
X, Y = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(4)
averages = pytest.mark.parametrize("average", AVERAGES)


def network(**settings) -> nn.Module:
    torch.manual_seed(0)
    return perturb(build_model("digits_cnn", input_shape=SHAPE), input_shape=SHAPE, **settings).eval()


def rows_of_passes(model, x=X, y=Y, *, mode=AT_ONCE, eot=6, **settings) -> list[int]:
    """How many images each pass of one gradient has; the pass that verifies is left out."""
    sizes = []
    with running(mode), passes_told_to(lambda rows, left: sizes.append(rows)):
        result = PGD(0.1, 0.1, 1, eot=eot, random_start=False, seed=0, **settings).run(model, x, y)
    assert result.backward_passes == eot
    assert result.forward_passes == sum(sizes[:-1]) / len(x)
    return sizes[:-1]


def shared_part(model) -> float:
    """The variance of the mean over 8 copies of an image in a pass, times 8, over that of one: 1 if independent."""
    torch.manual_seed(1)
    with torch.no_grad():
        answers = torch.stack([model(X[:1].repeat(8, 1, 1, 1)) for _ in range(300)])
    each = answers.var(dim=0).mean(dim=0)
    assert bool((each > 0).all())
    for one, other in itertools.combinations(range(8), 2):
        assert bool((answers[:, one] != answers[:, other]).any(dim=1).all())
    return float((8 * answers.mean(dim=1).var(dim=0) / each).mean())


# -- where -----------------------------------------------------------------------------------------------------------

# Of every defense whether its draws are made side by side as it is, and with noise per example.
BY_ROW = {"learn2perturb", "learn2perturb_r", "rse", "rse_at", "smoothadv", "pixeldp", "wca", "wca_at", "ctrw"}


def _variants():
    for entry in DEFENSES:
        fields = {field.name for field in dataclasses.fields(entry.load())}
        for shared in ("per_example", "per_batch") if "sharing" in fields else (None,):
            yield pytest.param(entry, shared, id=f"{entry.name} {shared}")


@pytest.mark.parametrize(("entry", "shared"), list(_variants()))
def test_a_defense_has_draws_side_by_side_only_where_its_rows_draw_for_themselves(entry, shared):
    torch.manual_seed(0)
    config = TrainConfig(
        defense=entry.name, recipe="fast", model="digits_cnn", dataset="digits", attack_steps=1, batch_size=8
    ).resolve()
    options = {**config.options, **({} if shared is None else {"sharing": shared})}
    defense = build_defense(entry.name, options)
    model = defense.prepare(build_model("digits_cnn", input_shape=SHAPE, **config.model_options), SHAPE)
    defense.begin_step(model, Clock(1, 0, 4, 0, 1, 32))
    model.eval()
    expected = entry.name in BY_ROW and shared != "per_batch"
    assert rows_of_passes(model) == ([24] if expected else [4] * 6)
    if expected:
        assert shared_part(model) == pytest.approx(1, abs=0.25)


LAWS = {
    "members": [], "norms": [], "projection": [], "weight": [], "variational": [],
    "feature": ["output", "input"], "multiplicative": ["output", "input"], "gain": ["output", "input"],
    "correlated": ["output", "input"],
}  # fmt: skip


def _of_law(kind: str, place: str, shared: str, distribution: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("digits_cnn", input_shape=SHAPE)
    site, shape = ("block1.conv1", (16, 8, 8))
    if kind == "members":
        site, shape = "", SHAPE
    elif kind == "norms":
        site = "block1.bn1"
    elif place == "weight":
        shape = (16, 16, 3, 3)
    settings = {"sharing": shared, "distribution": distribution}
    key = "shape" if place == "weight" else "feature_shape"
    spec = {"kind": kind, "site": site, key: shape, "tensor" if place == "weight" else "place": place}
    return insert(model, [spec | settings]).eval()


def _places_of(kind: str) -> list[str]:
    if kind in ("weight", "variational", "projection"):
        return ["weight"]
    return ["output"] if kind in ("members", "norms") else ["output", "input", "weight"]


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "uniform"])
@pytest.mark.parametrize("shared", ["per_example", "per_batch"])
@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind in LAWS for place in _places_of(kind)])
def test_a_law_has_draws_side_by_side_only_on_features_and_per_example(kind, place, shared, distribution):
    model = _of_law(kind, place, shared, distribution)
    expected = place in LAWS[kind] and shared == "per_example"
    assert rows_of_passes(model) == ([24] if expected else [4] * 6)
    if expected:
        assert shared_part(model) == pytest.approx(1, abs=0.25)


def test_every_law_of_the_registry_is_among_them():
    assert {entry.name for entry in NOISES} == set(LAWS)
    assert {noise_law(kind) for kind in LAWS if LAWS[kind]} == by_row._DRAWING


@pytest.mark.parametrize("name", [entry.name for entry in MODELS])
def test_networks_of_the_registry_that_are_known(name):
    shape = (3, 16, 16)
    model = perturb(build_model(name, input_shape=shape), input_shape=shape).eval()
    assert copies_are_draws(model) is (name != "wrn_28_10")  # whose activation is a function anyone may replace


class _OwnLaw(NoiseModule):
    """A custom law, of which nothing is known."""

    kind = "own"

    def noisy(self, value, eps):
        return value + eps[:1]

    def scale(self):
        return "sigma", torch.ones(())


class _Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class _Derived(type(build_model("digits_cnn", input_shape=SHAPE))):  # type: ignore[misc]
    """A network of the package, changed."""


def _hooked(register: str) -> nn.Module:
    model = network()
    getattr(model.block1.conv1, register)(lambda module, args, *output: None)
    return model


def _changed(change) -> nn.Module:
    model = network()
    change(model)
    return model


def _put(owner: str, name: str, value):
    return lambda model: setattr(model.get_submodule(owner), name, value(model.get_submodule(owner)))


def _derived() -> nn.Module:
    model = network()
    model.__class__ = _Derived
    return model


def _own_law() -> nn.Module:
    model = build_model("digits_cnn", input_shape=SHAPE).eval()
    _OwnLaw((16, 8, 8), site="block1.conv1").attach(model.block1.conv1)
    return model.eval()


def _without_statistics(model):
    model.bn1.running_mean = model.bn1.running_var = None


OTHERS = {
    "noise relative to the whole batch": lambda: network(relative=True),
    "a custom law": _own_law,
    "a law on weights beside": lambda: insert(
        network(), [{"kind": "weight", "site": "fc", "shape": (10, 32), "tensor": "weight"}]
    ).eval(),
    "one site of several for the batch": lambda: _changed(
        lambda model: setattr(noise_modules(model)[1], "sharing", "per_batch")
    ),
    "no noise": lambda: build_model("digits_cnn", input_shape=SHAPE).eval(),
    "a wrapped network": lambda: _Wrapped(network()),
    "a network without its noise": lambda: NoiseFree(network()),
    "a derived network": _derived,
    "an ensemble": lambda: RandomEnsemble([network(), network()]),
    "a callable": lambda: network().__call__,
    "a forward hook": lambda: _hooked("register_forward_hook"),
    "a forward pre-hook": lambda: _hooked("register_forward_pre_hook"),
    "a backward hook": lambda: _hooked("register_full_backward_hook"),
    "a dropout": lambda: _changed(_put("", "fc", lambda model: nn.Sequential(model.fc, nn.Dropout(0.5).train()))),
    "a layer that is not known": lambda: _changed(_put("", "fc", lambda model: nn.Sequential(model.fc, nn.Softplus()))),
    "another forward": lambda: _changed(_put("fc", "forward", lambda fc: lambda x: nn.Linear.forward(fc, x))),
    "another law on the instance": lambda: _changed(
        _put("block1.bn2.perturbation", "noisy", lambda noise: lambda value, eps: value + eps[:1])
    ),
    "a parametrised weight": lambda: _changed(
        lambda model: parametrize.register_parametrization(model.fc, "weight", nn.Identity())
    ),
    "a BatchNorm without statistics": lambda: _changed(_without_statistics),
    "compiled by its own method": lambda: _changed(
        lambda model: setattr(model.block1, "_compiled_call_impl", model.block1._call_impl)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_not_known_has_one_pass_a_draw(name):
    assert rows_of_passes(network()) == [24]
    assert rows_of_passes(OTHERS[name]()) == [4] * 6


def test_noise_that_is_off_or_replayed_and_hooks_on_all_modules_have_one_pass_a_draw():
    model = network()
    with noise_disabled(model):
        assert rows_of_passes(model) == [4] * 6
    with fixed_noise(model, 1):
        assert rows_of_passes(model) == [4] * 6
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert rows_of_passes(model) == [4] * 6
    finally:
        handle.remove()
    model.bn1.train()
    assert not copies_are_draws(model)
    assert copies_are_draws(model.eval())


def test_plain_is_the_reference_and_the_fast_modes_make_draws_at_once():
    modes = {mode.name + device: mode.full_passes for (_, device), mode in execution._MODES.items()}
    assert modes == dict.fromkeys(("fastcpu", "fastcuda", "fast32cpu", "fast32cuda"), True)
    assert not PLAIN.full_passes
    assert rows_of_passes(network(), mode=PLAIN) == [4] * 6


def test_a_training_has_one_pass_a_draw_and_so_has_a_share_of_a_batch():
    sizes, model, attack = [], network(), PGD(0.1, 0.1, 1, eot=6)
    with running(AT_ONCE), passes_told_to(lambda rows, left: sizes.append(rows)):
        attack.craft(model, X, Y)
    assert sizes == [4] * 6
    with running(AT_ONCE):
        assert draws_at_once(model, X) == 256
        with sharing(Share(Ranks(0, 2, "test", 1.0), 8)):
            assert draws_at_once(model, X) == 1


def test_a_network_that_is_compiled_for_a_number_of_rows_is_given_so_many(monkeypatch):
    monkeypatch.setattr(compiling, "_compile", lambda forward, device: forward)
    mode = dataclasses.replace(AT_ONCE, folding=True, compiled_rows=4)
    assert rows_of_passes(network(), mode=mode) == [4] * 6
    assert rows_of_passes(network(), mode=dataclasses.replace(mode, compiled_rows=0)) == [24]


# -- how many --------------------------------------------------------------------------------------------------------


def test_a_pass_is_full_and_no_more_than_that(monkeypatch):
    assert execution._POINTS == {"cpu": 65_536}
    assert execution._POINTS_ELSEWHERE == 262_144
    shape = (3, 32, 32)
    model = perturb(build_model("resnet20", input_shape=shape), input_shape=shape).eval()
    with running(AT_ONCE):
        found = [draws_at_once(model, torch.zeros(count, *shape)) for count in (0, 1, 16, 21, 32, 33, 64, 65)]
        assert found == [64, 64, 4, 3, 2, 1, 1, 1]
        monkeypatch.setattr(execution, "_POINTS", {})
        assert [draws_at_once(model, torch.zeros(count, *shape)) for count in (32, 128, 129)] == [8, 2, 1]
    monkeypatch.undo()
    monkeypatch.setattr(execution, "_POINTS", {"cpu": 1_000})  # 3 times 4 images of 8 x 8
    assert rows_of_passes(network(), eot=5) == [12, 8]
    assert rows_of_passes(network(), eot=7) == [12, 8, 8]
    assert rows_of_passes(network(), eot=5, eot_average="logits") == [12, 8] * 2
    assert rows_of_passes(network(), eot=1) == [4]


@averages
@pytest.mark.parametrize("attack", [APGD, FAB, CW], ids=lambda kind: kind.__name__)
def test_losses_see_the_rows_of_one_draw_and_passes_are_counted_by_image(attack, average):
    few = {"search_steps": 1} if attack is CW else {}
    settings = {"norm": "l2", "eps": 1.0, "steps": 2, "eot": 3, "eot_average": average, "seed": 0, **few}
    results = []
    for mode in (PLAIN, AT_ONCE):
        with running(mode):
            results.append(attack(**settings).run(network(), X, Y))
    assert results[0].forward_passes == results[1].forward_passes
    assert results[0].backward_passes == results[1].backward_passes


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_where_memory_runs_out_one_pass_makes_one_draw(monkeypatch, error):
    asked, plain = [], asking.ask

    def ask(model, x):
        asked.append(len(x))
        if asked[-2:] == [12, 12]:  # what the first pass has counted is not of the average that is made in the end
            raise error
        return plain(model, x)

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.setattr(execution, "_POINTS", {"cpu": 1_000})
    with running(AT_ONCE):
        result = PGD(0.1, 0.1, 1, eot=6, seed=0).run(network(), X, Y)
    assert asked == [12, 12] + [4] * 7
    assert (result.forward_passes, result.backward_passes) == (6, 6)
    monkeypatch.setattr(asking, "ask", lambda model, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows_of_passes(network())


# -- what they say ---------------------------------------------------------------------------------------------------


class Numbered(nn.Module):
    """Each copy of three images is answered by the next of some networks, in one pass or several."""

    def __init__(self, draws: int) -> None:
        super().__init__()
        self.networks = torch.randn(draws, 64, 4, dtype=torch.float64)
        self.drawn = 0

    def forward(self, x):
        parts = torch.tanh(x.flatten(1)).split(3)
        found = [part @ self.networks[(self.drawn + at) % len(self.networks)] for at, part in enumerate(parts)]
        self.drawn += len(parts)
        return torch.cat(found)


@averages
@pytest.mark.parametrize("at_once", [2, 3, 5, 9])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_average_is_that_of_the_same_draws_one_by_one(average, at_once, loss):
    model, x, y = Numbered(5), torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    for function in (input_gradient, value_and_gradient, fresh_values):
        one, several = (
            function(model, LOSSES[loss], x, y, eot=5, average=average, at_once=count) for count in (1, at_once)
        )
        for found, expected in zip(_tensors(several), _tensors(one), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert model.drawn % 5 == 0


def _tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, tuple):
        return [tensor for one in found for tensor in _tensors(one)]
    return [found.loss, found.margin, found.logits]


def test_the_gradient_is_the_mean_over_the_rows_that_were_drawn():
    model = network().double()
    x = X.double()
    torch.manual_seed(3)
    found = input_gradient(model, LOSSES["ce"], x, Y, eot=5, at_once=5)
    torch.manual_seed(3)
    rows = x.repeat(5, 1, 1, 1).requires_grad_()
    loss = nn.functional.cross_entropy(model(rows), Y.repeat(5), reduction="sum")
    expected = torch.autograd.grad(loss, rows)[0].unflatten(0, (5, 4))
    torch.testing.assert_close(found, expected.mean(dim=0), rtol=1e-12, atol=1e-12)
    assert len({draw.numpy().tobytes() for draw in expected}) == 5


@averages
def test_mean_and_variance_are_those_of_one_pass_a_draw(average):
    torch.manual_seed(0)
    model, x = NoisyLinear((2, 3, 3)), torch.rand(1, 2, 3, 3).expand(3000, -1, -1, -1)
    y = torch.zeros(len(x), dtype=torch.int64)
    one, several = (
        input_gradient(model, LOSSES["ce"], x, y, eot=4, average=average, at_once=count).flatten(1) for count in (1, 4)
    )
    error = (one.var(dim=0) / len(x) + several.var(dim=0) / len(x)).sqrt()
    assert bool(((one.mean(dim=0) - several.mean(dim=0)).abs() < 4.5 * error).all())
    if average != "probability":  # whose variance scatters by a third: some of its draws have large weights
        torch.testing.assert_close(several.var(dim=0).sum(), one.var(dim=0).sum(), rtol=0.12, atol=0.0)
    (low, high), (least, most) = (found.quantile(torch.tensor([0.25, 0.75]), dim=0) for found in (one, several))
    torch.testing.assert_close((most - least).sum(), (high - low).sum(), rtol=0.12, atol=0.0)


def test_held_draws_are_the_same_in_every_step_and_differ_from_copy_to_copy():
    model = network()
    query = Query(model, PGD(0.1, 0.1, 1, eot=6), Y, strict=True)
    with running(AT_ONCE), query.held():
        first, second = query.gradient(X, Y), query.gradient(X, Y)
        values = query.value(X, Y)
        assert query.forwards == 3 * 24
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    with running(AT_ONCE):
        assert not torch.equal(query.gradient(X, Y), first)
        assert not torch.equal(query.value(X, Y).logits, values.logits)


def test_draws_of_the_compiled_noise_and_of_folded_networks_are_made_at_once_and_differ():
    model = network()
    mode = dataclasses.replace(FAST32, kept_memory=False)
    assert rows_of_passes(model, mode=mode) == [24]
    with running(mode), execution.attacking(model, X, True) as folded:
        assert folded > 0
        assert copies_are_draws(model)
        assert shared_part(model) == pytest.approx(1, abs=0.25)


@averages
def test_plain_mode_is_what_it_was_bit_for_bit(average):
    model = network().requires_grad_(False)
    torch.manual_seed(5)
    with running(PLAIN):
        found = Query(model, PGD(eot=4, eot_average=average), Y, strict=True).gradient(X, Y)
    torch.manual_seed(5)
    assert torch.equal(found, _one_by_one(model, average))
    torch.manual_seed(5)
    with running(AT_ONCE):
        others = Query(model, PGD(eot=4, eot_average=average), Y, strict=True).gradient(X, Y)
    assert not torch.equal(found, others)


def _one_by_one(model, average):
    """The mean gradient over four draws, a pass each, written out."""
    ce, mean = functools.partial(nn.functional.cross_entropy, reduction="sum"), None
    if average != "loss":
        draws = torch.stack([model(X) for _ in range(4)])
        logarithm = draws.log_softmax(dim=2).logsumexp(dim=0) - math.log(4)
        mean = (logarithm if average == "probability" else draws.mean(dim=0)).requires_grad_()
        (pull,) = torch.autograd.grad(ce(mean, Y), mean)
    total = torch.zeros_like(X)
    for _ in range(4):
        leaf = X.clone().requires_grad_()
        logits = model(leaf)
        if mean is None:
            value = ce(logits, Y)
        elif average == "logits":
            value = (pull * logits).sum()
        else:
            log_p = logits.log_softmax(dim=1)
            value = (pull * (log_p.detach() - mean.detach()).exp() * log_p).sum()
        total += torch.autograd.grad(value, leaf)[0]
    return total / 4


def test_the_noise_says_what_its_rows_have():
    made = functools.partial(Perturbation, (2,), site="s")
    assert made().draws_by_row
    assert not made(sharing="per_batch").draws_by_row
    assert not made(place="weight").draws_by_row
    assert not made(relative=True).draws_by_row
    noise = made()
    for name, value in (("enabled", False), ("replay", 3)):
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, noise, name, getattr(noise, name))
            setattr(noise, name, value)
            assert not noise.draws_by_row
    assert noise.draws_by_row
