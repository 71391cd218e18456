"""What may stand before the first convolution, and how exactly it is looked at: certificates rest on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from learn2perturb.errors import SiteError
from learn2perturb.noise import noise_modules, perturb_weights, vary_weights
from learn2perturb.noise.distributions import _laplace
from learn2perturb.noise.sensitivity import checked_convolution, input_scale, sensitivity


class Bent(nn.Module):
    """``x + size * x (1 - x)``: black and white stay, what is between moves by a quarter of the size at most."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        return x + self.size * x * (1 - x)


class Lifted(nn.Module):
    """Lifts dark pixels, other than black, by ``size``."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        return x + self.size * ((x > 0) & (x < 0.02))


@pytest.mark.parametrize(
    ("before", "known"),
    [(Bent(1.6e-4), True), (Bent(3.2e-4), False), (Lifted(1.1e-5), True), (Lifted(1.5e-5), False),
     (nn.Hardtanh(0.0, 1.0), True), (nn.Hardtanh(0.0, 0.9), False)],
)  # fmt: skip
def test_what_is_affine_on_images_up_to_rounding_is_known(before, known):
    convolution = nn.Conv2d(1, 2, 3).double()
    network = nn.Sequential(before, convolution)
    if known:
        assert input_scale(network, convolution).item() == pytest.approx(1)
        return
    with pytest.raises(SiteError, match="more than a scale and a shift for each channel"):
        input_scale(network, convolution)
    input_scale(network, convolution, check=False)  # by black and white alone


def test_a_batchnorm_before_it_counts_by_its_running_statistics():
    norm, convolution = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    network = nn.Sequential(norm, convolution).train()
    torch.testing.assert_close(input_scale(network, convolution), torch.tensor([0.5, 2.0]), rtol=1e-4, atol=0)
    assert norm.num_batches_tracked == 0
    assert network.training


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_hook_on_the_convolution_that_scales_its_input_counts(norm):
    convolution = nn.Conv2d(2, 3, 3)
    plain = sensitivity(nn.Sequential(convolution), convolution, norm)
    convolution.register_forward_pre_hook(lambda _, args: (3 * args[0],))
    torch.testing.assert_close(sensitivity(nn.Sequential(convolution), convolution, norm), 3 * plain)
    convolution.register_forward_pre_hook(lambda _, args: (args[0].square(),))
    with pytest.raises(SiteError, match="more than a scale and a shift"):
        sensitivity(nn.Sequential(convolution), convolution, norm)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(1, 1, 3),
        nn.ConvTranspose2d(1, 1, 3),
        nn.Linear(2, 2),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_only_a_plain_convolution_has_a_known_sensitivity(layer):
    with pytest.raises(
        SiteError, match=r"the first convolution, 'stem', is .*; its sensitivity is known for a Conv2d with"
    ):
        checked_convolution(layer, "stem")
    plain = nn.Conv2d(1, 1, 3)
    assert checked_convolution(plain, "stem") is plain


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_from_a_pre_hook_is_not_known():
    with pytest.raises(SiteError, match="'stem', gets its weight from a forward pre-hook; make it a parameter first"):
        checked_convolution(nn.utils.weight_norm(nn.Conv2d(1, 1, 3)), "stem")


def test_the_laplace_map_ends_where_the_uniform_numbers_do():
    ends = _laplace(torch.tensor([0.0, 0.25, 0.75]))
    torch.testing.assert_close(ends, torch.tensor([-24 * math.log(2), -math.log(2), math.log(2)]) / math.sqrt(2))


@pytest.mark.parametrize("noisy", [perturb_weights, vary_weights])
def test_weight_noise_is_inserted_and_taken_out_without_a_draw(noisy):
    network = nn.Sequential(nn.Linear(3, 2))
    weight, state = network[0].weight.detach().clone(), torch.get_rng_state()
    noisy(network)
    for module in reversed(noise_modules(network)):
        assert module.enabled
        module.detach(network[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network[0].weight, weight)
    assert list(network[0]._parameters) == ["weight", "bias"]
