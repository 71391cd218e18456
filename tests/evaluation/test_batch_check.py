"""The check that an answer does not depend on the batch: what is rounding, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learn2perturb.errors import InputError
from learn2perturb.evaluation.inputs import check_batches, peculiarities


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shift", "refused"), [(0.0009, False), (0.0012, True), (0.4, True)])
def test_a_thousandth_of_the_logits_is_rounding(shift, refused, masked):
    def model(x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 3)
        logits[:, 1] = shift * 10 * (len(x) > 1)
        logits[:, 0] = 9.0  # 1 + 9 is what the tolerance is a share of
        return logits.masked_fill(torch.tensor([False, False, masked]), -torch.inf)

    x = torch.rand(4, 1, 2, 2)
    if refused:
        with pytest.raises(InputError, match="changes with the batch size"):
            check_batches(model, x, 0)
    else:
        assert check_batches(model, x, 0) == []


@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("pixel", [0.0, 0.5, 1.0, None])
def test_other_images_beside_an_image_are_images_too_and_others(pixel, images):
    """Of a model that is asked about nothing else, and whose answer is less the mean of its batch."""

    def model(x: Tensor) -> Tensor:
        assert x.min() >= 0 and x.max() <= 1
        logits = x.flatten(1)
        return 10 * (logits - logits.mean(dim=0))

    x = torch.rand(images, 1, 2, 2) if pixel is None else torch.full((images, 1, 2, 2), pixel)
    with pytest.warns(UserWarning, match="depends on the other images of its batch"):
        assert len(peculiarities(model, x, 0)) == 1
