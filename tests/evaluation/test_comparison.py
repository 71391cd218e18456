from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import FGSM
from learn2perturb.errors import ConfigError, InputError, UnknownNameError
from learn2perturb.evaluation import Comparison, compare, evaluate

N = 400


def right_on(share: float, seed: int):
    """A model that is right on a given random share of the images: the image is its own number."""
    right = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share

    def model(x: Tensor) -> Tensor:
        number = (x.flatten(1)[:, 0] * N).round().long().clamp(max=N - 1)
        return torch.nn.functional.one_hot((~right[number]).long(), 2).float() * 3 + 0 * x.flatten(1)[:, :1]

    return model


X = (torch.arange(N) / N).view(N, 1, 1, 1)
DATA = (X, torch.zeros(N, dtype=torch.int64))


def evaluation(share: float, seed: int = 0, data=DATA):
    return evaluate(right_on(share, seed), data, draws=1, name=f"model {share}")


def test_a_real_difference_is_found_and_signed():
    found = compare(evaluation(0.9), evaluation(0.7)).differences[0]
    assert found.difference == pytest.approx(0.2, abs=0.05)
    assert found.interval.low > 0
    assert found.mcnemar < 1e-6
    assert found.sentence.startswith("the first is better: +")
    assert compare(evaluation(0.7), evaluation(0.9)).differences[0].sentence.startswith("the second is better: -")


def test_pairing_sees_what_two_intervals_do_not():
    # The same seed: where 0.70 is right, 0.73 is too, so the difference has next to no noise.
    one, other = evaluation(0.73), evaluation(0.70)
    assert one.rows[0].interval.low < other.rows[0].interval.high
    found = compare(one, other).differences[0]
    assert found.interval.low > 0
    assert found.standard_error < 0.01


def test_equal_models_are_not_told_apart():
    same = compare(evaluation(0.8), evaluation(0.8)).differences[0]
    assert (same.difference, same.mcnemar) == (0.0, 1.0)
    wrong = sum(
        compare(evaluation(0.8, 2 * k), evaluation(0.8, 2 * k + 1)).differences[0].sentence[0] == "t" for k in range(12)
    )
    assert wrong <= 2


def test_records_of_other_images_are_refused():
    first = evaluation(0.8)
    with pytest.raises(InputError, match="400 images, the second of 100"):
        compare(first, evaluation(0.8, data=(X[:100], DATA[1][:100])))
    labels = DATA[1].clone()
    labels[:3] = 1
    with pytest.raises(InputError, match="labels of 3 of 400"):
        compare(first, evaluation(0.8, data=(X, labels)))
    other = dataclasses.replace(first, metadata={**first.metadata, "data": "cifar10"})
    with pytest.raises(InputError, match="cifar10"):
        compare(first, other)


def test_rows_are_paired_by_name_or_by_hand(tmp_path):
    linear = lambda x: torch.cat([x.flatten(1), 0.5 - x.flatten(1)], dim=1)  # noqa: E731
    first = evaluate(linear, DATA, {"fgsm": FGSM(0.1)}, draws=1)
    second = evaluate(linear, DATA, {"other": FGSM(0.1)}, draws=1)
    assert [one.first for one in compare(first, second).differences] == ["clean"]
    found = compare(first, second, pairs=[("fgsm", "other"), ("clean", "clean")])
    assert [one.difference for one in found.differences] == [0.0, 0.0]
    assert "Holm's correction for 2 rows" in str(found)
    assert Comparison.load(found.save(tmp_path / "comparison.json")) == found
    with pytest.raises(UnknownNameError, match="did you mean 'fgsm'"):
        compare(first, second, pairs=[("fgms", "other")])
    with pytest.raises(ConfigError, match="no row in common"):
        compare(dataclasses.replace(first, rows=first.rows[1:]), second)
