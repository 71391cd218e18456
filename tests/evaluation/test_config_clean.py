"""``clean``: the rows of the images as they are can be left out, and nothing else changes by it."""

from __future__ import annotations

import pytest
import torch

from learn2perturb import evaluate
from learn2perturb.attacks import FGSM
from learn2perturb.errors import ConfigError
from tests.problems import Linear


def test_without_clean_rows_the_others_are_the_same():
    data = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    model = Linear((1, 2, 2))
    both, alone = (evaluate(model, data, {"a": FGSM(0.1)}, clean=clean, progress=False) for clean in (True, False))
    assert [row.attack for row in both.rows] == ["clean", "a"] and [row.attack for row in alone.rows] == ["a"]
    assert both.row("a").correct == alone.row("a").correct
    with pytest.raises(ConfigError, match="nothing is left to score"):
        evaluate(model, data, clean=False, progress=False)
