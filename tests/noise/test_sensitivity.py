"""The sensitivity of the first convolution bounds what it does, and is exact where the bound is tight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from learn2perturb.errors import SiteError
from learn2perturb.models import Normalize, build_model
from learn2perturb.noise import perturb
from learn2perturb.noise.sensitivity import input_scale, overlap, sensitivity


def matrix_of(network: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """Return the matrix of an affine map of images, column by column."""
    eye = torch.eye(int(np.prod(shape)), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        columns = network(eye) - network(torch.zeros(1, *shape, dtype=torch.float64))
    return columns.flatten(1).numpy().T


CASES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "patches": {"kernel_size": 4, "stride": 4},
    "1x1": {"kernel_size": 1},
    "wide": {"kernel_size": 5, "padding": 2},
    "rectangular": {"kernel_size": (1, 3), "padding": (0, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_it_bounds_the_exact_operator_norm(case, norm):
    convolution = nn.Conv2d(2, 4, **CASES[case])
    network = nn.Sequential(Normalize((0.5, 0.4), (0.2, 0.5)), convolution).double()
    matrix = matrix_of(network, (2, 8, 8))
    exact = np.linalg.norm(matrix, 1 if norm == "l1" else 2)
    bound = sensitivity(network, convolution, norm).item()
    assert exact <= bound * (1 + 1e-9)
    tight = norm == "l1" or case in ("patches", "1x1")
    assert bound <= exact * (1 + 1e-6 if tight else 3)


def test_overlap_is_how_often_a_pixel_is_seen():
    assert overlap(nn.Conv2d(1, 1, 3, stride=1)) == 3
    assert overlap(nn.Conv2d(1, 1, 3, stride=2)) == 2
    assert overlap(nn.Conv2d(1, 1, 4, stride=4)) == 1
    assert overlap(nn.Conv2d(1, 1, 7, stride=2)) == 4


def test_the_scale_of_the_normalisation_is_measured_and_nothing_moves():
    network = build_model("resnet20", input_shape=(3, 8, 8))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    perturb(network, input_shape=(3, 8, 8))
    network.train()
    scale = input_scale(network, network.conv1)
    torch.testing.assert_close(scale, 1 / torch.tensor([0.2023, 0.1994, 0.2010]), rtol=1e-5, atol=0)
    assert network.training
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    assert not network.conv1._forward_pre_hooks


@pytest.mark.parametrize(
    "before",
    [nn.AvgPool2d(2), nn.Sigmoid(), nn.Sequential(Normalize((0.5,), (0.2,)), nn.ReLU())],
    ids=["pool", "sigmoid", "relu"],
)
def test_anything_else_before_it_is_refused(before):
    convolution = nn.Conv2d(1, 2, 3)
    with pytest.raises(SiteError, match="more than a scale and a shift"):
        sensitivity(nn.Sequential(before, convolution), convolution)


def test_a_convolution_that_is_not_called_is_refused():
    with pytest.raises(SiteError, match="more than a scale"):
        sensitivity(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Conv2d(1, 2, 3))
