"""A small trained network, for tests that compare the strength of attacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb.data import load_data
from learn2perturb.engine.random import isolated_rng


@pytest.fixture(scope="session")
def trained():
    """Return a network for the digits, hardened a little by one-step training, and 100 test images with labels."""
    train, test = load_data("digits", "train", limit=1000), load_data("digits", "test", limit=100)
    x, y = train.images.float() / 255, train.labels
    with isolated_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(60):
            leaf = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).requires_grad_()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(network(leaf), y), leaf)[0]
            loss = nn.functional.cross_entropy(network((x + 0.1 * gradient.sign()).clamp(0, 1)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False), test.images.float() / 255, test.labels
