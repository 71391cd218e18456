"""A network of somebody else's, which knows nothing of this package: named as ``module:function``."""

from __future__ import annotations

import pathlib
import sys

import pytest

NETWORK = '''
import torch
from sklearn.datasets import load_digits
from torch import nn


def make():
    """A linear classifier of the digits, fitted by least squares, with noise on its logits."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    wanted = nn.functional.one_hot(torch.tensor(labels), 10).float()
    x1 = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    solved = torch.linalg.solve(x1.T @ x1 + torch.eye(65), x1.T @ wanted)
    net = Net()
    with torch.no_grad():
        net.inner.weight.copy_(solved[:64].T)
        net.inner.bias.copy_(solved[64])
    return net.eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x):
        logits = 10 * self.inner(x.flatten(1))
        return logits + 0.3 * torch.randn_like(logits)
'''


def write_network(folder: pathlib.Path, patch: pytest.MonkeyPatch, name: str = "somebody_elses") -> str:
    """Write the module into ``folder``, where it can be imported; return how a verb names the network."""
    (folder / f"{name}.py").write_text(NETWORK)
    patch.syspath_prepend(str(folder))
    sys.modules.pop(name, None)
    return f"{name}:make"
