"""Noise in and out of a network: state dicts, switching, replay, copies, compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.errors import NoiseError, SiteError
from learn2perturb.models import build_model, list_models
from learn2perturb.noise import (
    fixed_noise,
    insert,
    is_stochastic,
    noise_disabled,
    noise_modules,
    noise_parameters,
    noise_sites,
    noise_spec,
    perturb,
    perturb_weights,
    remove_noise,
)

SHAPE = (1, 8, 8)


def digits(**arguments):
    """Return a perturbed digits network in eval mode, and its plain twin."""
    torch.manual_seed(0)
    plain = build_model("digits_cnn", input_shape=SHAPE).eval()
    return perturb(copy.deepcopy(plain), input_shape=SHAPE, **arguments), plain


def identity(features=(4, 5, 5)):
    """Return a network whose only site gives its input back, so that what is added is the noise."""
    return nn.Sequential(nn.Identity(), nn.Flatten()), features


def added(network, x):
    return network(x) - network[1](x)


# --- state dicts


def test_the_keys_of_the_network_stay_and_those_of_the_noise_are_apart():
    network, plain = digits()
    keys = list(network.state_dict())
    own = [key for key in keys if ".perturbation." not in key]
    assert own == list(plain.state_dict())
    assert len(keys) - len(own) == len(noise_sites(network)) == 3
    assert [name for name, _ in network.named_parameters() if ".perturbation." not in name] == [
        name for name, _ in plain.named_parameters()
    ]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_checkpoint_loads_strictly_and_theta_keeps_its_values(wrapped):
    network, plain = digits()
    for value in plain.state_dict().values():
        value.copy_(torch.full_like(value, 0.5))
    for theta in noise_parameters(network):
        theta.data.fill_(0.125)
    outer = nn.ModuleDict({"inner": network, "other": nn.Linear(2, 2)}) if wrapped else network
    source = nn.ModuleDict({"inner": plain, "other": nn.Linear(2, 2)}) if wrapped else plain
    state = source.state_dict()
    keys = list(state)
    outer.load_state_dict(state)
    assert list(state) == keys  # the caller's dictionary is not written to
    assert all(torch.equal(network.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert all((theta == 0.125).all() for theta in noise_parameters(network))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_noisy_checkpoint_with_a_missing_theta_is_an_error(wrapped):
    network, _ = digits()
    outer = nn.ModuleDict({"inner": network}) if wrapped else network
    state = outer.state_dict()
    del state[next(key for key in state if key.endswith("perturbation.theta"))]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*perturbation\.theta"):
        outer.load_state_dict(state)


def test_a_plain_checkpoint_that_lacks_a_weight_is_an_error():
    network, plain = digits()
    state = plain.state_dict()
    del state["fc.bias"]
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        network.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_draw_load_and_clean_as_the_original_does(copied):
    network, plain = digits()
    twin = copied(network)
    x = torch.rand(2, *SHAPE)
    torch.manual_seed(1)
    expected = network(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
    twin.load_state_dict(plain.state_dict())
    with noise_disabled(twin):
        assert is_stochastic(network)
        assert not is_stochastic(twin)
    remove_noise(twin)
    assert torch.equal(twin(x), plain(x))
    assert noise_sites(network)


# --- on and off


@pytest.mark.parametrize("name", list_models())
def test_noise_off_equals_the_plain_network_bit_for_bit(name):
    shape = SHAPE if name == "digits_cnn" else (3, 8, 8)
    torch.manual_seed(0)
    network = build_model(name, input_shape=shape).eval()
    x = torch.rand(2, *shape)
    with torch.no_grad():
        expected = network(x)
        perturb(network, input_shape=shape)
        assert noise_sites(network)
        assert not torch.equal(network(x), expected)
        with noise_disabled(network):
            assert torch.equal(network(x), expected)
        assert not torch.equal(network(x), expected)
        assert torch.equal(remove_noise(network)(x), expected)


def test_noise_off_leaves_gradients_and_statistics_as_in_the_plain_network():
    network, plain = digits()
    x, y = torch.rand(8, *SHAPE), torch.arange(8)
    for model in (network.train(), plain.train()):
        with noise_disabled(model):
            F.cross_entropy(model(x), y).backward()
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    gradients = dict(network.named_parameters())
    assert all(torch.equal(gradients[name].grad, value.grad) for name, value in plain.named_parameters())
    assert all(theta.grad is None for theta in noise_parameters(network))


def test_the_switch_is_restored_after_a_failure():
    network, _ = digits()
    with pytest.raises(ZeroDivisionError), noise_disabled(network):
        raise ZeroDivisionError
    assert all(module.enabled for module in noise_modules(network))


def test_remove_noise_restores_exactly_what_was():
    network, plain = digits()
    remove_noise(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in network.named_modules()] == [name for name, _ in plain.named_modules()]
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
    assert remove_noise(network) is network  # nothing to remove is no error
    assert not is_stochastic(network)
    assert not is_stochastic(lambda x: x)


def test_noise_in_train_mode_leaves_hooks_of_others_alone():
    network, _ = digits()
    seen = []
    handle = network.bn1.register_forward_hook(lambda *_: seen.append(1))
    remove_noise(network)
    network(torch.rand(1, *SHAPE))
    assert seen == [1]
    handle.remove()


# --- draws


def test_passes_differ_rows_differ_and_per_batch_rows_agree():
    x = torch.ones(3, 4, 5, 5)
    for sharing, agree in (("per_example", False), ("per_batch", True)):
        network, features = identity()
        perturb(network, input_shape=features, sites="0", sharing=sharing)
        first, second = added(network, x), added(network, x)
        assert not torch.equal(first, second)
        assert torch.equal(first[0], first[1]) is agree
        assert torch.equal(first[1], first[2]) is agree


def test_noise_is_on_in_train_and_in_eval():
    network, _ = digits()
    x = torch.rand(2, *SHAPE)
    for mode in (True, False):
        network.train(mode)
        assert not torch.equal(network(x), network(x))


@pytest.mark.parametrize("place", ["output", "input"])
def test_a_sequential_site_draws_once_with_variance_theta_squared(place):
    network = nn.Sequential(nn.Sequential(nn.Identity(), nn.Identity()), nn.Flatten())
    perturb(network, input_shape=(4, 5, 5), sites="0", init=0.5, place=place)
    assert isinstance(network[0][2], nn.Module)  # the container runs its children in order, this one too
    x = torch.zeros(2000, 4, 5, 5)
    noise = network(x)
    # Run twice, it would be 0.5; the standard error of a variance over n numbers is sqrt(2 / n) of it.
    assert noise.var().item() == pytest.approx(0.25, rel=5 * (2 / noise.numel()) ** 0.5)


def test_place_input_perturbs_what_the_site_is_given():
    network = nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        network[1].weight.fill_(10.0)
    perturb(network, input_shape=SHAPE, sites="1", place="input", init=0.1)
    assert network[1].perturbation.shape == SHAPE
    noise = network(torch.zeros(400, *SHAPE)).detach()
    assert noise.std().item() == pytest.approx(1.0, rel=0.05)  # 10 * 0.1
    plain = remove_noise(network)
    assert not plain[1]._forward_pre_hooks
    assert torch.equal(plain(torch.zeros(2, *SHAPE)), torch.zeros(2, 64))


def test_channels_last_features_get_independent_noise_and_keep_their_layout():
    network = perturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity()), input_shape=(3, 6, 6), sites="0", init=1.0)
    x = torch.rand(64, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        noisy = network(x)
        with noise_disabled(network):
            clean = network(x)
    assert noisy.is_contiguous(memory_format=torch.channels_last)
    noise = (noisy - clean).flatten(1)
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(64)).abs().max() < 6 / noise.shape[1] ** 0.5


def test_theta_scales_the_noise_element_by_element():
    network, features = identity((2, 3, 3))
    perturb(network, input_shape=features, sites="0")
    theta = network[0].perturbation.theta
    with torch.no_grad():
        theta.copy_(torch.linspace(0.1, 2.0, theta.numel()).view_as(theta))
        noise = network(torch.zeros(4000, *features))
    assert torch.allclose(noise.std(0), theta.flatten(), rtol=0.08)


# --- replay


def test_fixed_noise_is_a_function_of_seed_site_and_row():
    network, _ = digits()
    x = torch.rand(1, *SHAPE).expand(6, -1, -1, -1)
    with torch.no_grad():
        with fixed_noise(network, seed=3):
            whole, again, part = network(x), network(x), network(x[:2])
        other = network(x)
        with fixed_noise(network, seed=3):
            later, grown = network(x[:4]), network(x)
        with fixed_noise(network, seed=4):
            different = network(x)
    assert torch.equal(whole, again)
    assert torch.allclose(whole[:2], part, atol=1e-6)  # convolutions of other batch sizes may round differently
    assert torch.allclose(whole[:4], later, atol=1e-6)
    assert torch.equal(whole, grown)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)
    assert not torch.allclose(whole, other, atol=1e-3)
    assert not torch.allclose(whole, different, atol=1e-3)


def test_replayed_rows_are_bit_identical_whatever_the_batch_and_the_sites_differ():
    network = nn.Sequential(nn.Identity(), nn.Identity(), nn.Flatten())
    perturb(network, input_shape=(2, 3, 3), sites=["0", "1"], init=1.0)
    first, second = network[0].perturbation, network[1].perturbation
    h = torch.zeros(5, 2, 3, 3)
    with fixed_noise(network, seed=11):
        rows = first.draw(h)
        assert torch.equal(first.draw(h[:1]), rows[:1])
        assert torch.equal(copy.deepcopy(first).draw(h[:3]), rows[:3])
        assert not torch.equal(second.draw(h), rows)
    # A golden number: replayed draws must be the same next year.
    with fixed_noise(network, seed=0):
        golden = first.draw(h)[4, 1, 2, 2].item()
    assert golden == pytest.approx(GOLDEN, abs=1e-4)


GOLDEN = -0.29636


def test_fixed_noise_does_not_touch_the_generator_nests_and_is_restored_after_failure():
    network, _ = digits()
    x = torch.rand(3, *SHAPE)
    with torch.no_grad(), fixed_noise(network, seed=1):
        state = torch.get_rng_state()
        outer = network(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert not is_stochastic(network)
        with fixed_noise(network, seed=2):
            inner = network(x)
        assert torch.equal(network(x), outer)
        assert not torch.equal(inner, outer)
        with pytest.raises(ZeroDivisionError), fixed_noise(network, seed=2):
            raise ZeroDivisionError
        assert torch.equal(network(x), outer)
    assert is_stochastic(network)
    assert all(module.replay is None and module._kept is None for module in noise_modules(network))


@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
def test_fixed_noise_keeps_the_sharing(sharing):
    network, features = identity()
    perturb(network, input_shape=features, sites="0", sharing=sharing)
    with fixed_noise(network, seed=0):
        noise = added(network, torch.ones(3, *features))
    assert torch.equal(noise[0], noise[2]) is (sharing == "per_batch")


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    network, _ = digits()
    with pytest.raises(NoiseError, match="whole number"), fixed_noise(network, seed=seed):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fixed_noise_is_the_same_on_every_device():
    network, features = identity()
    perturb(network, input_shape=features, sites="0")
    x = torch.zeros(3, *features)
    with fixed_noise(network, seed=5):
        on_cpu = network(x)
    with fixed_noise(network.cuda(), seed=5):
        assert torch.equal(network(x.cuda()).cpu(), on_cpu)


# --- description and rebuilding


def test_a_description_rebuilds_the_noise_in_a_plain_network():
    network, plain = digits(granularity="channel", distribution="laplace", sharing="per_batch", init=0.5, minimum=0.1)
    spec = noise_spec(network)
    twin = insert(copy.deepcopy(plain), spec)
    assert noise_spec(twin) == spec
    twin.load_state_dict(network.state_dict())
    x = torch.rand(2, *SHAPE)
    with fixed_noise(network, 1), fixed_noise(twin, 1):
        assert torch.equal(network(x), twin(x))


def test_a_description_of_another_network_is_refused_and_nothing_is_inserted():
    network, plain = digits()
    spec = noise_spec(network)
    spec[-1]["site"] = "nowhere"
    with pytest.raises(SiteError, match="'nowhere'"):
        insert(plain, spec)
    assert noise_sites(plain) == []
    with pytest.raises(SiteError, match="perturbed already"):
        insert(network, noise_spec(network)[:1])


# --- compilation


def test_switches_take_effect_on_a_compiled_network_and_insertion_and_removal_are_refused():
    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    perturb(network, input_shape=(3,), sites="0")
    compiled = torch.compile(network, backend="aot_eager")
    x = torch.rand(5, 3)
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))
        with noise_disabled(compiled):
            off = compiled(x)
            assert torch.equal(off, compiled(x))
            assert torch.allclose(off, network(x), atol=1e-6)
        assert not torch.equal(compiled(x), compiled(x))
        with fixed_noise(compiled, 1):
            fixed = compiled(x)
            assert torch.equal(fixed, compiled(x))
            assert torch.allclose(fixed, network(x), atol=1e-6)
        assert not torch.equal(compiled(x), off)
    with pytest.raises(NoiseError, match="compiled"):
        remove_noise(compiled)
    with pytest.raises(NoiseError, match="compiled"):
        perturb(compiled, input_shape=(3,), sites="**.2")
    assert noise_sites(network) == ["0"]
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("where", ["features", "weights"])
def test_noise_is_replayed_in_either_mode(where, training):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    if where == "features":
        perturb(network, input_shape=(1, 8, 8), sites=["1"])
    else:
        perturb_weights(network)
    network.train(training)
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad(), fixed_noise(network, seed=1):
        first = network(x)
        assert torch.equal(network(x), first)
    with torch.no_grad():
        assert not torch.equal(network(x), first)
