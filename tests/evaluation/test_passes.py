"""What records say of where passes were made, and where a model is taken to be."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn

from learn2perturb.engine.execution import PLAIN
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.passes import circumstances, classes_of, device_of


def test_the_hardware_is_the_card_or_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card of {device}")
    on_card, on_cpu = (circumstances(torch.device(kind), PLAIN) for kind in ("cuda", "cpu"))
    assert (on_card["device"], on_card["hardware"]) == ("cuda", "the card of cuda")
    assert on_cpu["hardware"] == f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    assert on_cpu["engine"] == "plain"


class Buffered(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, device=device))


class Card:
    """A model's only weight, as if it were on the second card."""

    device = torch.device("cuda", 1)


@pytest.mark.parametrize(("model", "asked", "found"), [
    (nn.Linear(2, 2), None, "cpu"), (nn.Linear(2, 2), "cpu", "cpu"), (nn.Linear(2, 2, device="meta"), None, "meta"),
    (Buffered("meta"), None, "meta"), (nn.Flatten(), None, "cpu"), (nn.Flatten(), "meta", "meta"),
    (torch.relu, None, "cpu"), (torch.relu, "meta", "meta"),
])  # fmt: skip
def test_a_model_is_where_its_weights_are_and_a_function_where_it_is_asked_to_be(model, asked, found):
    assert device_of(model, asked) == torch.device(found)


@pytest.mark.parametrize(("asked", "good"), [("cuda", True), ("cuda:1", True), ("cuda:0", False), ("cpu", False)])
def test_a_card_without_a_number_is_any_card(asked, good, monkeypatch):
    model = nn.Module()
    monkeypatch.setattr(model, "parameters", lambda: iter([Card()]))
    monkeypatch.setattr("learn2perturb.evaluation.passes.checked_device", torch.device)
    if good:
        assert device_of(model, asked) == Card.device
        return
    with pytest.raises(ConfigError, match=rf"the model is on cuda:1, but device is '{asked}'; move it first"):
        device_of(model, asked)


def test_classes_are_told_by_one_image():
    asked = []

    def model(x: torch.Tensor) -> torch.Tensor:
        asked.append((len(x), torch.is_grad_enabled()))
        return x.flatten(1)

    assert classes_of(model, torch.rand(5, 1, 2, 3)) == 6
    assert asked == [(1, False)]
