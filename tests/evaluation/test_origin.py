"""What a record says of the network and the images that it is of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from learn2perturb.data import ImageData
from learn2perturb.evaluation.origin import origin, weights_of

SEEN = SimpleNamespace(count=6, hexdigest=lambda: "abc")


def images(whole="test"):
    pixels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    return ImageData("mine", pixels, torch.arange(6) % 2, ("a", "b"), False, 0, (0.5,), (0.25,), whole=whole)


@pytest.mark.parametrize(("trained", "found"), [
    (None, None), ((7, "w"), 7), ((0, "w"), 0), ((7, "other"), None), ((None, "w"), None),
])  # fmt: skip
def test_the_step_is_that_of_weights_that_have_not_changed_since(trained, found):
    network = nn.Linear(2, 2)
    if trained is not None:
        network.trained = trained
    assert origin(network, images(), None, weights="w", seen=SEEN).get("step") == found


@pytest.mark.parametrize(("data", "count", "name", "split"), [
    (images(), 6, "mine", "test"), (images(), 5, "mine", None), (images(None), 6, "mine", None), ([1], 6, "list", None),
])  # fmt: skip
def test_a_split_is_named_where_all_of_its_images_were_used(data, count, name, split):
    found = origin(len, data, None, weights=None, seen=SimpleNamespace(count=count, hexdigest=lambda: "abc"))
    assert found == {"model": "len", "data": name, "weights": None, "images": "abc", "split": split}


def test_a_network_is_called_as_its_user_calls_it_or_as_it_is_registered():
    network = nn.Linear(2, 2)
    assert origin(network, [], None, weights=None, seen=SEEN)["model"] == "Linear"
    network.registered_name = "own"
    assert origin(network, [], None, weights=None, seen=SEEN)["model"] == "own"
    assert origin(network, [], "mine", weights=None, seen=SEEN)["model"] == "mine"
    assert weights_of(len) is None and len(weights_of(network)) > 8
