"""A custom noise law: noise that grows with the size of each feature, learned, in one class.

    python examples/own_noise.py
    learn2perturb list noises own/affine --import examples/own_noise.py

A law says how a draw perturbs a value and what scales it. Registered by a name, it works on features and on weights, is
trained by any defense that learns noise, saved with a run, loaded, replayed and switched like the ones of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.noise import NoiseModule, add_noise, register_noise


@register_noise("own/affine")
class Affine(NoiseModule):
    """``v + (floor + slope |v|) eps``: a floor that is fixed, a slope that is learned."""

    settings = ("floor", "init")

    def __init__(self, shape: tuple[int, ...], *, floor: float = 0.05, init: float = 0.1, **place: object) -> None:
        super().__init__(shape, **place)
        self.floor, self.init = floor, init
        self.slope = nn.Parameter(torch.full(self.scale_shape, init))

    def noisy(self, value: Tensor, eps: Tensor) -> Tensor:
        """Return the value with noise; eps has zero mean and unit variance."""
        return value + (self.floor + self.slope.abs() * value.detach().abs()) * eps

    def scale(self) -> tuple[str, Tensor]:
        """Return what the metrics of a training show."""
        return "slope", self.slope.abs()


def main() -> nn.Module:
    """Put the law on the features of one network and on the weights of another, and use them."""
    network = l2p.build_model("digits_cnn", input_shape=(1, 8, 8))
    add_noise(network, "own/affine", input_shape=(1, 8, 8), granularity="channel")
    x = torch.rand(4, 1, 8, 8)
    print("two passes differ by", float((network(x) - network(x)).abs().max().detach()))
    with l2p.fixed_noise(network, seed=0):
        print("replayed, by", float((network(x) - network(x)).abs().max().detach()))
    weights = l2p.build_model("digits_cnn", input_shape=(1, 8, 8))
    return add_noise(weights, "own/affine", place="weight", granularity="layer")


if __name__ == "__main__":
    main()
