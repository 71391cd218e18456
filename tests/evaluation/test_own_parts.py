"""The parts that are the user's own: each told once, and which are not told at all."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learn2perturb.attacks import PGD, Attack
from learn2perturb.evaluation.own_parts import named_parts, own_parts
from learn2perturb.models import build_model
from learn2perturb.plugins import PARTS
from learn2perturb.registry import MODELS


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Inner(), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Inner(nn.Identity):
    pass


class Own(Attack):
    def perturb(self, query: object, x: Tensor, y: Tensor) -> Tensor:
        return x


def flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def joined(items: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return items


def told(*given: object, **settings: object) -> list[tuple[str, str]]:
    return [(part["kind"], part["name"]) for part in own_parts(*given, **settings).get("parts", [])]


def test_a_class_of_many_modules_is_told_once_and_those_of_torch_never():
    model = nn.Sequential(Mine(), Inner(), nn.Linear(2, 2))
    assert told(model, others=[Mine()]) == [("module", "Mine"), ("module", "Inner")]
    assert told(nn.Sequential(nn.Linear(2, 2))) == []
    assert told(build_model("digits_cnn", input_shape=(1, 8, 8))) == []
    assert told(flip, others=[flip, abs, torch.relu]) == [("function", "flip")]


def test_an_attack_of_ones_own_is_told_and_one_of_ours_is_not():
    assert told(attacks=[PGD(0.1), None, Own(0.1), Own(0.2)]) == [("attack", "Own")]


def test_checks_are_told_by_their_names():
    assert told(checks=[flip]) == [("check", "flip")]


def build(**_: object) -> nn.Module:
    return Inner()


def test_a_registered_part_is_told_by_its_name_if_it_is_the_users():
    MODELS.register("of the tests", f"{__name__}:build", "a model of the tests")
    (part,) = named_parts((MODELS, "of the tests"))
    assert (part["kind"], part["name"]) == ("network", "of the tests")
    model = Inner()
    model.registered_name = "of the tests"
    assert told(model) == [("network", "of the tests"), ("module", "Inner")]
    for name in ("of others", "digits_cnn", None, 3):
        assert named_parts((MODELS, name)) == []


DATA = TensorDataset(torch.zeros(2, 1, 2, 2), torch.zeros(2))


class Pictures(TensorDataset):
    transform = staticmethod(flip)
    target_transform = "no function"


@pytest.mark.parametrize(("data", "expected"), [
    (None, []),
    (DATA, []),
    (DataLoader(DATA), []),
    (DataLoader(DATA, collate_fn=joined), [("collate_fn", "joined")]),
    (types.SimpleNamespace(loader=DataLoader(DATA, collate_fn=joined)), [("collate_fn", "joined")]),
    (types.SimpleNamespace(source=types.SimpleNamespace(source=DataLoader(DATA, collate_fn=joined))),
     [("collate_fn", "joined")]),
    (Pictures(*DATA.tensors), [("data set", "Pictures"), ("transform", "transform flip")]),
    (DataLoader(Pictures(*DATA.tensors)), [("data set", "Pictures"), ("transform", "transform flip")]),
    (types.SimpleNamespace(transforms=types.SimpleNamespace(steps=[("turn", flip)])), [("transform", "turn")]),
])  # fmt: skip
def test_what_reads_the_images(data, expected):
    assert told(data=data) == expected


def test_where_nothing_is_of_the_users_nothing_is_said():
    assert own_parts() == own_parts(PGD(0.1)) == own_parts(build_model("digits_cnn", 10)) == {}
    assert set(own_parts(Inner())) == {PARTS}
