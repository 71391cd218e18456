"""The average of the weights against its closed form, and what it does to the network beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb.noise import noise_parameters, perturb
from learn2perturb.training.average import WeightAverage


def network():
    torch.manual_seed(0)
    return perturb(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), input_shape=(1, 5, 5), sites="1")


def test_it_is_the_weighted_sum_of_all_weights_with_the_decays_of_the_warm_up():
    model = network()
    decay, steps = 0.6, 16
    average = WeightAverage(model, decay)
    path = [{key: value.double().clone() for key, value in model.state_dict().items()}]
    for _ in range(steps):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn(value.shape).mul(3).to(value.dtype))
        average.update(model)
        path.append({key: value.double().clone() for key, value in model.state_dict().items()})
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(1, steps + 1)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays[-1] == decay
    # a_T = sum_t w_t (1 - d_t) prod_{s > t} d_s, with weight prod_s d_s on the first
    shares = [1.0] + [1 - d for d in decays]
    for t in range(steps + 1):
        for d in decays[t:]:
            shares[t] *= d
    assert sum(shares) == pytest.approx(1.0)
    values = average.state()["values"]
    for key in path[0]:
        expected = sum(share * one[key] for share, one in zip(shares, path, strict=True))
        if "num_batches" in key:
            expected = path[-1][key]  # a counter is no average
        assert torch.allclose(values[key].double(), expected, atol=1e-5), key
    assert any("theta" in key for key in values)
    assert any("running_var" in key for key in values)


def test_for_the_length_of_a_body_the_network_has_it_then_its_own_again_bit_for_bit_also_after_an_error():
    model = network()
    average = WeightAverage(model, 0.99)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    for error in (None, ValueError):
        try:
            with average.installed(model):
                assert torch.equal(noise_parameters(model)[0], torch.full_like(noise_parameters(model)[0], 0.25))
                if error is not None:
                    raise error
        except ValueError:
            pass
        assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


def test_it_is_kept_in_float32_beside_a_network_in_bfloat16_and_goes_on_where_it_was():
    model = network().bfloat16()
    average, twin = WeightAverage(model, 0.9999), WeightAverage(model, 0.9999)
    start = model[0].weight.detach().float().clone()
    for step in range(200):
        with torch.no_grad():
            model[0].weight.add_(0.001)
        average.update(model)
        if step == 99:
            twin.restore(average.state())
        elif step > 99:
            twin.update(model)
    value = average.state()["values"]["0.weight"]
    assert value.dtype == torch.float32
    assert (value > start).all()
    assert twin.updates == 200
    assert torch.equal(twin.state()["values"]["0.weight"], value)
    average.install(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, value.bfloat16())
