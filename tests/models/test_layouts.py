"""What a network gives back is laid out in memory as its features are: mixed layouts cost ten times the arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from learn2perturb.models.blocks import PadShortcut, pool_and_flatten

LAYOUTS = (torch.contiguous_format, torch.channels_last)
LAYERS = {
    "shortcut": (PadShortcut(2, 4), lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))),
    "pooling": (pool_and_flatten, lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_laid_out_as_the_features_and_values_are_what_they_were(name, layout, dtype):
    layer, reference = LAYERS[name]
    x = torch.rand(3, 4, 6, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
    found, expected = layer(x), reference(x)
    assert torch.equal(found, expected)
    weight = torch.rand_like(expected)
    gradient, wanted = (torch.autograd.grad(out, x, weight)[0] for out in (found, expected))
    assert gradient.is_contiguous(memory_format=layout)
    assert torch.equal(gradient, wanted)
