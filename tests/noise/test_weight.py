"""Noise on weights: its size and moments, gradients, KL, switches, state dicts, copies, foreign networks."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl
from torch.nn.utils import parametrizations, parametrize

from learn2perturb.attacks import PGD
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError, NoiseError, SiteError
from learn2perturb.models import build_model
from learn2perturb.noise import (
    fixed_noise,
    insert,
    is_stochastic,
    kl_divergence,
    noise_disabled,
    noise_modules,
    noise_parameters,
    noise_sites,
    noise_spec,
    perturb,
    perturb_weights,
    remove_noise,
    vary_weights,
)
from learn2perturb.noise.laws import posteriors

SHAPE = (1, 8, 8)
KINDS = pytest.mark.parametrize("noisy", [perturb_weights, vary_weights])


def digits(noisy, **arguments):
    """Return a digits network with noise on its weights, in eval mode, and its plain twin."""
    torch.manual_seed(0)
    plain = build_model("digits_cnn", input_shape=SHAPE).eval()
    return noisy(copy.deepcopy(plain), **arguments), plain


def foreign():
    """Return layers as other people's networks have them: groups, transposed, 1-d, tokens, norms of every kind."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, groups=1, bias=False), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(2), nn.Conv1d(6, 3, 1),
        nn.LayerNorm(49), nn.Linear(49, 1), nn.Flatten(), nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 1),
    ).eval()  # fmt: skip


def draws(network, layer, count):
    with torch.no_grad():
        return torch.stack([network.get_submodule(layer).weight for _ in range(count)])


# --- PNI


@pytest.mark.parametrize("granularity", ["layer", "channel", "element"])
def test_the_noise_has_the_weights_std_times_alpha(granularity):
    network = perturb_weights(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), granularity=granularity)
    (module,) = noise_modules(network)
    shapes = {"layer": (1, 1, 1, 1), "channel": (4, 1, 1, 1), "element": (4, 3, 3, 3)}
    assert module.alpha.shape == shapes[granularity]
    with torch.no_grad():
        module.alpha.copy_(torch.linspace(-0.5, 0.8, module.alpha.numel()).view_as(module.alpha) + 0.03)
        plain = network[0].parametrizations.weight.original
        plain.add_(0.3)  # std is about the mean, not about zero
        std = plain.std()
    sample = draws(network, "0", 4000)
    expected = (module.alpha.detach().abs() * std).expand_as(plain)
    assert torch.allclose(sample.std(0), expected, rtol=0.08)
    assert ((sample.mean(0) - plain).abs() < 5.5 * expected / 4000**0.5).all()
    assert (torch.corrcoef(sample.flatten(1).T) - torch.eye(plain.numel())).abs().max() < 6 / 4000**0.5


def test_the_output_channels_of_a_transposed_convolution_have_the_alphas():
    network = perturb_weights(nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.Linear(4, 2)), granularity="channel")
    assert [tuple(alpha.shape) for alpha in noise_parameters(network)] == [(1, 5, 1, 1), (2, 1)]


def test_gradients_of_weight_and_alpha():
    """dL/dw = G, since the standard deviation is a constant; dL/dalpha = sum G * eta."""
    network = perturb_weights(nn.Sequential(nn.Linear(4, 3)), init=0.5)
    (module,), plain = noise_modules(network), network[0].parametrizations.weight.original
    x, y = torch.rand(6, 4), torch.arange(6) % 3
    with fixed_noise(network, 3):
        eta = module.draw(plain) * plain.detach().std()
        F.cross_entropy(network(x), y).backward()
    noisy = (plain + 0.5 * eta).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(F.linear(x, noisy, network[0].bias), y), noisy)
    assert torch.allclose(plain.grad, g, atol=1e-7)
    assert module.alpha.grad.item() == pytest.approx((g * eta).sum().item(), abs=1e-6)


def test_a_weight_of_one_number_has_no_spread_and_so_no_noise():
    network = perturb_weights(nn.Sequential(nn.Linear(1, 1)))
    x = torch.rand(3, 1)
    assert torch.equal(network(x), network(x))
    assert torch.isfinite(network(x)).all()


# --- PNI on activations


@pytest.mark.parametrize("place", ["output", "input"])
def test_relative_noise_has_the_features_std_times_alpha_and_their_gradient_unchanged(place):
    network = nn.Sequential(nn.Identity(), nn.Flatten())
    perturb(network, input_shape=(2, 3, 3), sites="0", place=place, granularity="layer", relative=True, minimum=0.0)
    alpha = noise_parameters(network)[0]
    x = (torch.rand(3000, 2, 3, 3) * torch.tensor([1.0, 7.0]).view(2, 1, 1)).requires_grad_()
    std = x.detach().std()  # over rows, channels and pixels alike
    noise = network(x) - x.flatten(1)
    assert noise.std().item() == pytest.approx(0.25 * std.item(), rel=0.02)
    assert noise[:, 0].std().item() == pytest.approx(noise[:, -1].std().item(), rel=0.1)
    with fixed_noise(network, 1):
        network(x).square().sum().backward()
        noisy = network(x).detach()
    eta = (noisy - x.detach().flatten(1)) / 0.25
    assert torch.allclose(x.grad.flatten(1), 2 * noisy, atol=1e-4)
    assert alpha.grad.item() == pytest.approx((2 * noisy * eta).sum().item(), rel=1e-4)


# --- Adv-BNN


def test_the_kl_is_that_of_torch_distributions_over_every_variational_tensor():
    network, plain = digits(vary_weights, prior=0.15)
    with torch.no_grad():
        for parameter in noise_parameters(network):
            parameter.uniform_(-4, 0)
    expected = sum(
        reference_kl(Normal(mean.double(), noise.log_std.double().exp()), Normal(0.0, 0.15)).sum()
        for noise, mean in posteriors(network)
    )
    assert kl_divergence(network).item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(posteriors(network)) == len(list(plain.parameters()))  # its layers are all convolution, linear or norm
    with pytest.raises(ConfigError, match="no variational weights"):
        kl_divergence(plain)


def test_sampled_weights_have_the_stated_moments_and_gradients_go_to_mean_and_std():
    network = vary_weights(nn.Sequential(nn.Linear(5, 4)))
    (module, _), mean = noise_modules(network), network[0].parametrizations.weight.original
    with torch.no_grad():
        module.log_std.copy_(torch.linspace(-3, 0, 20).view(4, 5))
    sample, std = draws(network, "0", 4000), module.log_std.detach().exp()
    assert torch.allclose(sample.std(0), std, rtol=0.08)
    assert ((sample.mean(0) - mean).abs() < 5.5 * std / 4000**0.5).all()
    eps = ((sample - mean) / std).detach()
    assert (eps.pow(4).mean() - 3).abs() < 5 * (96 / eps.numel()) ** 0.5  # Gaussian
    with fixed_noise(network, 1):
        drawn = network[0].weight
        drawn.square().sum().backward()
    assert torch.allclose(mean.grad, 2 * drawn.detach())
    assert torch.allclose(module.log_std.grad, 2 * drawn.detach() * (drawn - mean).detach(), atol=1e-6)


# --- switches, replay


@KINDS
def test_noise_off_equals_the_plain_network_bit_for_bit(noisy):
    for network, plain, x in (
        (*digits(noisy), torch.rand(4, *SHAPE)),
        (noisy(foreign()), foreign(), torch.rand(4, 1, 8, 8)),
    ):
        assert not torch.equal(network(x), network(x))
        assert is_stochastic(network)
        with noise_disabled(network):
            assert torch.equal(network(x), plain(x))
        assert torch.equal(remove_noise(network)(x), plain(x))
        assert [*network.state_dict()] == [*plain.state_dict()]
        assert {name: type(layer) for name, layer in network.named_modules()} == {
            name: type(layer) for name, layer in plain.named_modules()
        }


@KINDS
def test_all_images_of_a_pass_share_a_draw_and_each_pass_has_its_own(noisy):
    network, _ = digits(noisy)
    x = torch.rand(1, *SHAPE).expand(5, -1, -1, -1)
    with torch.no_grad():
        logits = network(x)
        assert torch.allclose(logits[:1].expand(5, -1), logits, atol=1e-5)
        assert not torch.allclose(network(x), logits, atol=1e-3)


def test_a_layer_draws_at_each_of_its_calls_unless_cached():
    network = perturb_weights(nn.Sequential(nn.Linear(3, 3)))
    x = torch.rand(2, 3)
    assert not torch.equal(network(x), network(x))
    with parametrize.cached():
        assert torch.equal(network(x), network(x))
    assert not torch.equal(network(x), network(x))


@KINDS
def test_fixed_noise_is_a_function_of_seed_and_tensor(noisy):
    network, _ = digits(noisy)
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():
        state = torch.get_rng_state()
        with fixed_noise(network, 3):
            assert not is_stochastic(network)
            first, part = network(x), network(x[:1])
        with fixed_noise(network, 4):
            other = network(x)
        with fixed_noise(copy.deepcopy(network), 3) as twin:
            assert torch.equal(twin(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(first[:1], part, atol=1e-6)
    assert not torch.allclose(first, other, atol=1e-3)
    with fixed_noise(network, 3):
        eps = [module.draw(torch.zeros(module.shape)).flatten() for module in noise_modules(network)]
    firsts = {numbers[0].item() for numbers in eps}
    assert len(firsts) == len(eps)  # no two tensors share their numbers
    assert all(module._kept is None for module in noise_modules(network))


@KINDS
def test_an_attack_sees_fresh_draws_at_every_step_with_frozen_weights(noisy):
    network, _ = digits(noisy)
    seen = []
    network.conv1.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    PGD(eps=0.1, step_size=0.05, steps=3)(network, torch.rand(2, *SHAPE), torch.tensor([1, 2]))
    assert len(seen) >= 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert all(parameter.requires_grad for parameter in network.parameters())


@KINDS
def test_the_fast_mode_draws_in_the_weights_layout(noisy):
    network, plain = digits(noisy)
    mode = execution.ExecutionMode("test", dtype=torch.bfloat16, channels_last=True, threaded_draws=True, folding=True)
    x = mode.place_images(torch.rand(2, *SHAPE))
    with execution.running(mode), execution.autocast("cpu"):
        mode.place(network)
        layer = network.block1.conv1
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert layer.parametrizations.weight[0].draw(layer.weight).stride() == layer.weight.stride()
        logits = network(x)
        assert not torch.equal(logits, network(x))
        with noise_disabled(network):
            assert torch.equal(network(x), mode.place(plain)(x))


# --- state dicts, copies, descriptions


@KINDS
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_checkpoint_loads_strictly_and_the_noise_keeps_its_values(noisy, wrapped):
    network, plain = digits(noisy)
    before = [parameter.detach().clone() for parameter in noise_parameters(network)]
    for value in plain.state_dict().values():
        value.copy_(torch.full_like(value, 0.5))
    outer = nn.ModuleDict({"inner": network}) if wrapped else network
    state = (nn.ModuleDict({"inner": plain}) if wrapped else plain).state_dict()
    keys = list(state)
    outer.load_state_dict(state)
    assert list(state) == keys  # the caller's dictionary is not written to
    assert all(torch.equal(old, new) for old, new in zip(before, noise_parameters(network), strict=True))
    remove_noise(network)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in plain.state_dict().items())
    fresh, _ = digits(noisy)
    missing = plain.state_dict()
    del missing["fc.weight"]
    with pytest.raises(RuntimeError, match=r"fc\.parametrizations\.weight\.original"):
        fresh.load_state_dict(missing)


@KINDS
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_draw_as_the_original_and_live_apart_from_it(noisy, copied):
    network, plain = digits(noisy)
    twin = copied(network)
    x = torch.rand(2, *SHAPE)
    results = []
    for one in (network, twin):
        torch.manual_seed(1)
        results.append(one(x))
    assert torch.equal(*results)
    if copied is copy.copy:
        return  # shares its layers with the original, as every shallow copy
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
    # PyTorch's own copies share a class, and this would break the original.
    assert torch.equal(remove_noise(twin)(x), plain(x))
    torch.manual_seed(1)
    assert torch.equal(network(x), results[0])
    again = copied(copied(network))
    again.load_state_dict(plain.state_dict())
    assert torch.equal(remove_noise(again)(x), plain(x))


@KINDS
def test_a_description_rebuilds_the_noise(noisy):
    network, plain = digits(noisy, init=0.3)
    noise_modules(network)[0].enabled = False
    spec = noise_spec(network)
    twin = insert(copy.deepcopy(plain), pickle.loads(pickle.dumps(spec)))
    assert noise_spec(twin) == spec
    twin.load_state_dict(network.state_dict())
    x = torch.rand(2, *SHAPE)
    with fixed_noise(network, 1), fixed_noise(twin, 1):
        assert torch.equal(network(x), twin(x))
    assert noise_sites(nn.ModuleDict({"inner": network})) == [f"inner.{site}" for site in noise_sites(network)]


def test_noise_on_weights_and_on_features_live_together():
    network, plain = digits(perturb_weights)
    perturb(network, input_shape=SHAPE)
    x = torch.rand(2, *SHAPE)
    with noise_disabled(network):
        assert torch.equal(network(x), plain(x))
    twin = insert(copy.deepcopy(plain), noise_spec(network))
    twin.load_state_dict(network.state_dict())
    assert torch.equal(remove_noise(twin)(x), plain(x))


# --- refusals


def test_what_cannot_be_perturbed_is_refused_with_the_fix_and_nothing_is_inserted():
    network, _ = digits(perturb_weights)
    with pytest.raises(SiteError, match=r"'conv1'.*remove_noise"):
        perturb_weights(network)
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(SiteError, match=r"'1' \(ReLU\) has no weight"):
        perturb_weights(plain, sites=["0", "1"])
    with pytest.raises(SiteError, match=r"'2' \(Linear\) gets its weight from a parametrization.*parametrize.remove"):
        perturb_weights(plain)
    with pytest.raises(SiteError, match=r"'0\.\*' matches no submodule.*candidates: 0, 2"):
        perturb_weights(plain, sites="0.*")
    assert noise_modules(plain) == []
    spec = noise_spec(perturb_weights(copy.deepcopy(plain), sites="0"))
    with pytest.raises(SiteError, match=r"shape \(4, 4\), the noise was made for \(2, 2\)"):
        insert(nn.Sequential(nn.Linear(4, 4)), spec)
    with pytest.raises(NoiseError, match="kind 'other' is unknown"):
        insert(plain, [spec[0] | {"kind": "other"}])
    with pytest.raises(SiteError, match="no layer with weights"):
        vary_weights(nn.Sequential(nn.ReLU()))
    with pytest.raises(NoiseError, match="network is a int"):
        perturb_weights(3)


@pytest.mark.parametrize(
    ("noisy", "arguments", "message"),
    [
        (perturb_weights, {"granularity": "pixel"}, "granularity is 'pixel'"),
        (perturb_weights, {"init": -1.0}, "init is -1.0; it must be a number at least 0"),
        (vary_weights, {"init": 0}, "init is 0; it must be a number above 0"),
        (vary_weights, {"prior": float("nan")}, "prior is nan"),
    ],
)
def test_values_that_make_no_sense_are_refused(noisy, arguments, message):
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=message):
        noisy(network, **arguments)
    assert noise_modules(network) == []


@pytest.mark.parametrize("replay", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@KINDS
def test_draws_of_a_weight_have_its_type_fresh_or_replayed(noisy, dtype, replay):
    model = noisy(build_model("digits_cnn", input_shape=SHAPE)).to(dtype)
    module = noise_modules(model)[0]
    module.replay = replay
    assert module.draw(torch.zeros(module.shape, dtype=dtype)).dtype == dtype
