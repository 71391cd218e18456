"""The attack losses against their definitions."""

from __future__ import annotations

import pytest
import torch

from learn2perturb.attacks.losses import LOSSES, targeted_cross_entropy, targeted_dlr, targeted_margin
from learn2perturb.errors import InputError


@pytest.fixture
def batch():
    return torch.randn(32, 5, dtype=torch.float64), torch.randint(5, (32,))


def test_names():
    assert list(LOSSES) == ["ce", "margin", "dlr"]


def test_margin_and_cross_entropy_and_dlr_row_by_row(batch):
    logits, y = batch
    for row, (z, label) in enumerate(zip(logits.tolist(), y.tolist(), strict=True)):
        gap = max(value for j, value in enumerate(z) if j != label) - z[label]
        highest = sorted(z, reverse=True)
        assert LOSSES["margin"](logits, y)[row].item() == pytest.approx(gap)
        assert LOSSES["dlr"](logits, y)[row].item() == pytest.approx(gap / (highest[0] - highest[2]))
        assert LOSSES["ce"](logits, y)[row].item() == pytest.approx(-logits[row].log_softmax(0)[label].item())


def test_margin_is_positive_exactly_where_the_prediction_is_wrong(batch):
    logits, y = batch
    assert torch.equal(LOSSES["margin"](logits, y) > 0, logits.argmax(dim=1) != y)


def test_dlr_ignores_shift_and_scale_of_the_logits(batch):
    logits, y = batch
    torch.testing.assert_close(LOSSES["dlr"](7 * logits + 3, y), LOSSES["dlr"](logits, y))


def test_dlr_of_two_classes_names_the_fix():
    with pytest.raises(InputError, match=r"at least 3 classes, got 2; use loss='margin'"):
        LOSSES["dlr"](torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


def test_the_targeted_losses_row_by_row(batch):
    logits, y = batch
    target = (y + 1 + torch.randint(4, (32,))) % 5
    for row, (z, label, aim) in enumerate(zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)):
        highest = sorted(z, reverse=True)
        scale = highest[0] - (highest[2] + highest[3]) / 2
        found = [
            loss(logits, y, target)[row].item() for loss in (targeted_cross_entropy, targeted_margin, targeted_dlr)
        ]
        wanted = [logits[row].log_softmax(0)[aim].item(), z[aim] - z[label], (z[aim] - z[label]) / scale]
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize(("classes", "good"), [(3, False), (4, True)])
def test_the_targeted_dlr_needs_four_classes(classes, good):
    logits, y = torch.randn(4, classes), torch.zeros(4, dtype=torch.int64)
    if good:
        assert targeted_dlr(logits, y, y + 1).shape == (4,)
    else:
        with pytest.raises(InputError, match="at least 4 classes, got 3"):
            targeted_dlr(logits, y, y + 1)


def test_logits_that_are_all_alike_have_a_ratio_of_zero():
    alike, y = torch.ones(2, 4), torch.tensor([0, 3])
    assert LOSSES["dlr"](alike, y).tolist() == targeted_dlr(alike, y, 3 - y).tolist() == [0, 0]
