"""How far two images can drift apart up to the first convolution's output: the sensitivity D that PixelDP needs.

``|h(x) - h(x')| <= D |x - x'|`` for the output h of the first convolution, of all images of all sizes. What comes
before it may scale and shift each channel, as a normalisation does; its scale is measured and counted in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from learn2perturb.engine.modes import in_mode
from learn2perturb.engine.weights import advice, maker
from learn2perturb.errors import SiteError
from learn2perturb.noise.inject import noise_disabled

NORMS = ("l1", "l2")


class _Reached(Exception):
    """Ends a forward pass where it has told what was asked."""


def _apart(convolution: nn.Conv2d) -> list[int]:
    """Return how far apart, down and across, the taps are that see one and the same pixel."""
    return [
        stride // math.gcd(stride, dilation)
        for stride, dilation in zip(convolution.stride, convolution.dilation, strict=True)
    ]


def overlap(convolution: nn.Conv2d) -> float:
    """Return the root of how many outputs of one channel an input pixel reaches: ``ceil(k / stride)``, k x k kernels.

    The patches that a convolution sees repeat each pixel so often, so ``|patches| <= overlap |x|`` (l2 norms), and
    ``|conv(x)| <= overlap * sigma_max * |x|`` with the largest singular value of the reshaped kernel.
    """
    taps = zip(convolution.kernel_size, _apart(convolution), strict=True)
    return math.sqrt(math.prod(math.ceil(k / apart) for k, apart in taps))


@torch.no_grad()
def input_scale(network: nn.Module, convolution: nn.Conv2d, *, check: bool = True) -> Tensor:
    """Return what each channel of an image is multiplied by on its way to the first ``convolution``: (channels,).

    Found by running the network up to there on a black and a white image, in eval mode; ``check`` tries a third.

    Raises:
        SiteError: what comes before is more than a scale and a shift for each channel.
    """
    weight = convolution.weight
    size = max(8, *(k * d for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)))
    shape = (convolution.in_channels, size, size)
    ramp = torch.linspace(0, 1, math.prod(shape), device=weight.device, dtype=weight.dtype).view(shape)
    images = torch.stack([torch.zeros_like(ramp), torch.ones_like(ramp), ramp])
    found = _arriving(network, convolution, images)
    if found is not None and found.shape == images.shape:
        scale = found[1, :, 0, 0] - found[0, :, 0, 0]
        expected = found[:1, :, :1, :1] + images * scale[:, None, None]
        if not check or torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
            return scale
    raise SiteError(
        "what comes before the first convolution is more than a scale and a shift for each channel, so its "
        "sensitivity is not known; let the images reach a Conv2d directly, or through a normalisation"
    )


def _arriving(network: nn.Module, convolution: nn.Conv2d, images: Tensor) -> Tensor | None:
    """Return what reaches ``convolution``, or None where nothing does."""
    caught: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = convolution.register_forward_pre_hook(stop)  # the last one: what other hooks make of the images counts
    try:
        with in_mode(network, False), noise_disabled(network):
            network(images)
    except _Reached:
        return caught[0]
    except Exception:  # a network that takes no images of this size or these channels
        return None
    finally:
        handle.remove()
    return None


def checked_convolution(module: nn.Module, name: str) -> nn.Conv2d:
    """Return the first convolution if its sensitivity can be bounded.

    Raises:
        SiteError: it is no plain Conv2d with zero padding, or a pre-hook computes its weight.
    """
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        raise SiteError(
            f"the first convolution, {name!r}, is {module}; its sensitivity is known for a Conv2d with zero padding"
        )
    if maker(module, "weight") == "a forward pre-hook":  # it may be out of date when it is looked at
        raise SiteError(
            f"the first convolution, {name!r}, gets its weight from a forward pre-hook; make it a parameter first: "
            f"{advice(module, 'weight')}"
        )
    return module


@torch.no_grad()
def sensitivity(network: nn.Module, convolution: nn.Conv2d, norm: str = "l2", *, check: bool = True) -> Tensor:
    """Return D, a scalar, such that the outputs of ``convolution`` differ by at most D times the images (same norm).

    ``l2``: ``overlap`` times the largest singular value of the kernel, reshaped to (outputs, inputs * k * k), its
    inputs scaled as the images are on their way to it (Lecuyer et al. 2018, section 4.1). ``l1``: the largest sum of
    absolute weights that one pixel of one channel meets.

    Raises:
        SiteError: what comes before the convolution is more than a scale and a shift for each channel.
    """
    groups = convolution.groups
    scale = input_scale(network, convolution, check=check).view(groups, 1, -1, 1, 1)
    kernel = convolution.weight.unflatten(0, (groups, -1)) * scale  # (groups, outputs, inputs, k, k)
    if norm == "l1":
        down, across = _apart(convolution)
        met = kernel.abs().sum(1)
        sums = [met[..., i::down, j::across].sum((-2, -1)).max() for i in range(down) for j in range(across)]
        return torch.stack(sums).max()
    return overlap(convolution) * torch.linalg.matrix_norm(kernel.flatten(2), ord=2).max()
