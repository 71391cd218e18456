"""The pieces of a training step, one by one, with pytest-benchmark: ``make bench``.

Batch 128, features of the second stage of ResNet-V1(20) where one site stands for all. Compilation falls into the
warm-up round, which is not counted.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.attacks import PGD
from learn2perturb.data import ImageData, make_source
from learn2perturb.engine import execution, fused
from learn2perturb.engine.draws import standard_normal
from learn2perturb.errors import ConfigError

CPU = torch.device("cpu")
BATCH, CHANNELS, SIDE = 128, 32, 16


@pytest.fixture(params=["plain", "fast"])
def mode(request):
    """Run in one execution mode after the other; skip what this hardware has not."""
    try:
        found = execution.select(request.param, CPU)
    except ConfigError as error:
        pytest.skip(str(error))
    with execution.running(found):
        yield found


@pytest.fixture
def timed(benchmark):
    """Time a call: one warm-up round, then five."""
    return lambda call: benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))


def test_draw(mode, timed):
    """Draw the noise of one site, a number for every element."""
    numbers = timed(lambda: standard_normal((BATCH, CHANNELS, SIDE, SIDE), CPU, channels_last=mode.channels_last))
    assert numbers.shape == (BATCH, CHANNELS, SIDE, SIDE)


@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
def test_add_noise(mode, timed, sharing):
    """Draw and add the noise of one site, without gradients."""
    network = l2p.perturb(nn.Sequential(nn.Identity()), input_shape=(CHANNELS, SIDE, SIDE), sites="0", sharing=sharing)
    mode.place(network)
    h = mode.place_images(torch.zeros(BATCH, CHANNELS, SIDE, SIDE, dtype=mode.dtype))
    with torch.no_grad():
        noisy = timed(lambda: network(h))
    assert noisy.float().std() > 0.1


def test_add_noise_and_pull_its_gradient(mode, timed):
    """One site forward and backward, with the gradients of features and theta."""
    network = l2p.perturb(nn.Sequential(nn.Identity()), input_shape=(CHANNELS, SIDE, SIDE), sites="0")
    mode.place(network)
    h = mode.place_images(torch.zeros(BATCH, CHANNELS, SIDE, SIDE, dtype=mode.dtype)).requires_grad_()
    (theta,) = l2p.noise_parameters(network)
    gradients = timed(lambda: torch.autograd.grad(network(h).float().square().sum(), (h, theta)))
    assert gradients[1].abs().max() > 0


def test_fused_draws_uncompiled(timed):
    """What the fused draws cost where there is no compiler."""
    key, table = torch.tensor([1, 2], dtype=torch.int32), fused.quantile_table("gaussian")
    timed(lambda: fused.draws(BATCH, CHANNELS * SIDE * SIDE, key, table))


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "plain network"])
def test_step_of_pgd(mode, timed, noise):
    """One gradient of the images of a batch, ResNet-V1(20)."""
    model = l2p.build_model("resnet20").eval()
    model = mode.place(l2p.perturb(model, input_shape=(3, 32, 32)) if noise else model)
    x, y = images()
    attack = PGD(steps=1, random_start=False)
    adversarial = timed(lambda: attack.craft(model, mode.place_images(x), y))
    assert not torch.equal(adversarial, x)


def test_fold(mode, timed):
    """Enter and leave the context in which BatchNorm is folded, ResNet-V1(20); its plan is found in the warm-up."""
    model = mode.place(l2p.build_model("resnet20").eval())
    x = mode.place_images(images()[0])

    def fold() -> None:
        with execution.attacking(model, x, True):
            pass

    timed(fold)


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
def test_forward(mode, timed, folded):
    """One forward pass in eval mode, ResNet-V1(20)."""
    model = mode.place(l2p.build_model("resnet20").eval())
    x = mode.place_images(images()[0])
    with torch.no_grad(), execution.autocast("cpu"), execution.attacking(model, x, folded):
        timed(lambda: model(x))


@pytest.mark.parametrize("augment", [True, False], ids=["augmented", "as it is"])
def test_read(timed, augment):
    """Read an epoch of 20 batches from memory, shuffled, as float32."""
    pixels = torch.randint(0, 256, (20 * BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(pixels),))
    half = (0.5,) * 3
    data = ImageData("random", pixels, labels, tuple("0123456789"), flip=True, crop_padding=4, mean=half, std=half)
    source = make_source(data, batch_size=BATCH, shuffle=True, augment=augment)

    def read() -> int:
        return sum(len(y) for _, y in source.epoch(0))

    assert timed(read) == len(pixels)
