from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import learn2perturb as l2p
from learn2perturb.attacks import PGD
from learn2perturb.data import ImageData, load_data, make_source
from learn2perturb.data.subset import balanced_order, known_labels
from learn2perturb.diagnosis.budget import QUICK, resized

CLASSES = 10


def sorted_digits() -> ImageData:
    """Return the test digits as a folder has them: class after class."""
    data = load_data("digits", "test")
    return data._select(data.labels.argsort(stable=True))


def loader(shuffled: bool = False, batch_size: int = 50) -> DataLoader:
    data = sorted_digits()
    pairs = TensorDataset(data.images.float() / 255, data.labels)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return DataLoader(Subset(pairs, rows) if shuffled else pairs, batch_size=batch_size)


class Unlabelled(Dataset):
    """The same without a word on its labels."""

    def __init__(self, whole: Dataset) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple:
        return self.whole[index]


@pytest.mark.parametrize("sizes", [[50] * 10, [900, 50, 30, 10, 10], [3, 3000], [1] * 7, [400]])
def test_every_beginning_has_the_classes_of_the_set(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = balanced_order(labels)
    assert sorted(order) == list(range(len(labels)))
    shares = np.array(sizes) / sum(sizes)
    for n in (1, 7, len(labels) // 3 + 1, len(labels) - 1):
        counts = np.bincount(labels[order[:n]], minlength=len(sizes))
        assert (abs(counts - n * shares) < 1.01).all(), (n, counts)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.9 or len(sizes) > 1


def test_the_order_is_fixed_and_random_within_a_class() -> None:
    order = balanced_order(np.zeros(500, dtype=np.int64))
    # Written down: records of two versions are of the same images.
    assert order[:6].tolist() == FIRST
    assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 0.15


FIRST = [410, 366, 254, 203, 319, 53]


@pytest.mark.parametrize("kind", ["image_data", "pair", "dataset", "source"])
def test_a_part_of_what_is_held_has_all_classes(kind: str) -> None:
    data = sorted_digits()
    pair = (data.images, data.labels)
    given = {
        "image_data": data, "pair": pair, "dataset": TensorDataset(*pair), "source": data.take(400),
    }[kind]  # fmt: skip
    x, y = (torch.cat(part) for part in zip(*make_source(given, batch_size=16, limit=40).epoch(0), strict=True))
    assert y.bincount().tolist() == [4] * CLASSES
    again = torch.cat([x for x, _ in make_source(given, batch_size=40, limit=40, seed=3).epoch(0)])
    assert torch.equal(x, again)


def test_a_part_of_a_set_without_known_labels_is_random() -> None:
    data = sorted_digits()
    unlabelled = Unlabelled(TensorDataset(data.images, data.labels))
    assert known_labels(unlabelled) is None
    y = torch.cat([y for _, y in make_source(unlabelled, limit=100).epoch(0)])
    assert len(y) == 100 and len(y.unique()) == CLASSES and y.bincount().max() < 25
    trained = make_source(unlabelled, limit=30, shuffle=True, batch_size=10)
    first, second = (torch.cat([x for x, _ in trained.epoch(epoch)]).flatten(1) for epoch in (0, 1))
    assert not torch.equal(first, second)  # another order of the same images
    assert torch.equal(first.sum(1).sort().values, second.sum(1).sort().values)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).eval()


def evaluate(data: object) -> object:
    return l2p.evaluate(network(), data, limit=100)


def certify(data: object) -> object:
    return l2p.certify(network(), data, n0=2, n=4, sigma=0.25, limit=100)


def diagnose(data: object) -> object:
    budget = resized(QUICK, 100)
    changes = {"some": 4, "unbounded_steps": 2, "samples": 2, "square_queries": 2, "restarts": 1, "scorings": 1}
    changes |= {"step_curve": (1, 2), "draw_curve": (1, 4), "eps_grid": (2 / 255, 1.0), "slope_repeats": 3}
    budget = l2p.diagnosis.budget.budget_of(budget, **changes)
    return l2p.diagnose(network(), data, budget=budget, attack=PGD(0.1, 0.05, 1))


def settings(**changes: object) -> l2p.TrainConfig:
    plain = {"defense": "none", "recipe": "fast", "epochs": 1, "device": "cpu", "engine": "plain", "monitor": 0}
    return l2p.TrainConfig(**(plain | changes))  # type: ignore[arg-type]


def train(data: object) -> object:
    return l2p.train(settings(limit=100), model=network(), data=data, progress=False)


def monitor(data: object) -> object:
    config = settings(limit=100, monitor=100)
    return l2p.train(config, model=network(), data=(sorted_digits(), data), progress=False)


@pytest.mark.parametrize("labels", ["known", "unknown"])
@pytest.mark.parametrize("verb", [evaluate, certify, diagnose, train, monitor])
def test_a_part_of_a_sorted_loader_is_warned_of_and_of_a_shuffled_one_not(verb, labels: str) -> None:  # type: ignore[no-untyped-def]
    def of(shuffled: bool) -> DataLoader:
        given = loader(shuffled)
        return given if labels == "known" else DataLoader(Unlabelled(given.dataset), batch_size=50)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verb(of(True))
        verb(sorted_digits())
    with pytest.warns(UserWarning, match="the first 100 of 500 images of your data"):
        verb(of(False))


@pytest.mark.parametrize(
    ("labels", "classes", "strange"),
    [
        ([0] * 9, 10, True),
        ([0] * 2, 10, False),
        ([0] * 50 + [1] * 50, 2, True),
        ([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1], 2, False),
        ([0] * 90 + [1] * 10, 2, True),
        (list(range(10)) * 3, 10, False),
        (list(range(50)), 100, False),
    ],
)
def test_strange_labels_without_a_known_set(labels: list[int], classes: int, strange: bool) -> None:
    from learn2perturb.data.subset import _strange

    assert (_strange(np.array(labels), classes, None) is not None) is strange


def test_a_rare_class_is_not_missed_where_the_set_is_known() -> None:
    from learn2perturb.data.subset import _strange

    known = torch.tensor([0] * 990 + [1] * 10)
    assert _strange(np.zeros(100, dtype=np.int64), 2, known) is None
    assert "whole set for" in str(_strange(np.array([0] * 90 + [1] * 10), 2, known))


def test_the_costly_checks_of_a_small_sorted_set_see_all_classes() -> None:
    from learn2perturb.diagnosis.diagnosing import _images
    from learn2perturb.evaluation.target import Target

    _, y = _images(Target(torch.nn.Flatten()), make_source(sorted_digits(), limit=1000), 0)
    assert len(y) == 500 and y[:20].bincount().tolist() == [2] * CLASSES
