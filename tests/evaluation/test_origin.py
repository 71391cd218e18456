"""What a record says of the network and the images that it is of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from learn2perturb.data import ImageData
from learn2perturb.evaluation.origin import identity_of, origin, weights_of

SEEN = SimpleNamespace(count=6, hexdigest=lambda: "abc")


def images(whole="test"):
    pixels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    return ImageData("mine", pixels, torch.arange(6) % 2, ("a", "b"), False, 0, (0.5,), (0.25,), whole=whole)


@pytest.mark.parametrize(("trained", "found"), [
    (None, {}), ((7, "w", "w"), {"step": 7}), ((0, "w", "w"), {"step": 0}), ((7, "other", "f"), {}),
    ((None, "w", "w"), {}), ((None, "w", "f"), {"file": "f"}), ((7, "w", "f"), {"step": 7, "file": "f"}),
])  # fmt: skip
def test_step_and_file_are_those_of_weights_that_have_not_changed_since(trained, found):
    network = nn.Linear(2, 2)
    if trained is not None:
        network.trained = trained
    said = origin(network, images(), None, weights="w", seen=SEEN)
    assert {key: said[key] for key in ("step", "file") if key in said} == found


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


# --- all that is seen of what a network answers by


class Mine(nn.Module):
    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in held.items():
            setattr(self, name, value)
        with torch.no_grad():
            for weight in self.layer.parameters():
                weight.fill_(1.0)


def test_what_a_network_is_known_by():
    weights, text, held, sources = identity_of(nn.Sequential(Mine(levels=8), nn.ReLU()))
    assert weights == weights_of(nn.Sequential(Mine(), nn.ReLU())) and text.startswith("<class 'torch.nn")
    assert {name: own for name, own in held.items() if "levels" in own} == {"0": {"levels": 8}}
    assert all(own for own in held.values())
    ((kind, code),) = sources
    assert kind == "Mine" and isinstance(code, str)
    assert identity_of(len) is None
    assert identity_of(nn.Sequential(nn.Linear(2, 2)))[3] == []


@pytest.mark.parametrize(("one", "other", "same"), [
    (8, 8, True), (8, 9, False), ("a", "b", False), (0.5, 0.25, False), (None, 1, False), (True, False, False),
    ([1, (2, "a")], [1, (2, "b")], False), (torch.ones(2), torch.zeros(2), False), (torch.ones(2), torch.ones(2), True),
    (SimpleNamespace(a=1), SimpleNamespace(a=2), True),  # what is no plain value shows nothing
    ([SimpleNamespace()], [1], False), ([len], [max], True),
])  # fmt: skip
def test_plain_values_and_tensors_that_a_module_holds_count(one, other, same):
    assert (identity_of(Mine(held=one)) == identity_of(Mine(held=other))) is same


def test_what_every_module_has_is_not_told():
    model = Mine()
    before = identity_of(model)
    model.training = not model.training
    assert identity_of(model) == before


def test_a_class_of_an_installed_package_is_known_by_its_file(monkeypatch):
    monkeypatch.setattr("learn2perturb.evaluation.origin.is_installed", lambda module: True)
    ((kind, source),) = identity_of(Mine())[3]
    assert (kind, source["module"], source["file"]) == ("Mine", __name__, "test_origin.py")
