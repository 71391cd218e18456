"""A record is what its raw bits say, and names what it is of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD, Transfer
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation, evaluate

X, Y = torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2


def noisy(x: Tensor) -> Tensor:
    score = x.flatten(1).mean(1, keepdim=True) + 0.1 * torch.randn(len(x), 1)
    return torch.cat([score, 0.5 + 0 * score], dim=1)


@pytest.fixture(scope="module")
def record() -> Evaluation:
    return evaluate(noisy, (X, Y), {"pgd": PGD(0.1, 0.05, 2)}, draws=4)


def test_a_true_record_loads(record, tmp_path):
    assert Evaluation.load(record.save(tmp_path / "a.json")) == record


@pytest.mark.parametrize("field", ["accuracy", "std", "interval", "worst_of", "pooled", "n", "draws"])
def test_a_number_that_contradicts_the_bits_is_refused(field, record, tmp_path):
    row = record.rows[1]
    false = {
        "accuracy": row.accuracy + 0.01,
        "std": 0.001,
        "interval": dataclasses.replace(row.interval, low=row.interval.low + 0.01),
        "worst_of": row.worst_of | {1: row.worst_of[1] + 0.01},
        "pooled": tuple(dataclasses.replace(one, accuracy=one.accuracy + 0.01) for one in row.pooled),
        "n": row.n + 1,
        "draws": row.draws + 1,
    }[field]
    forged = dataclasses.replace(record, rows=(record.rows[0], dataclasses.replace(row, **{field: false})))
    path = forged.save(tmp_path / "forged.json")
    with pytest.raises(CheckpointError, match="pgd") as caught:
        Evaluation.load(path)
    assert "\n" not in str(caught.value)


def test_a_record_names_the_weights(tmp_path):
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2))
    hashes = [evaluate(network, (X, Y)).metadata["weights"] for network in (one, one, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    sources = [evaluate(noisy, (X, Y), {"t": Transfer(0.1, source=s, attack=PGD(0.1, 0.05, 1))}) for s in (one, other)]
    assert sources[0].rows[1].parameters != sources[1].rows[1].parameters


def test_no_scoring_sees_a_draw_of_the_attack():
    drawn: list[tuple[float, ...]] = []

    def model(x: Tensor) -> Tensor:
        noise = torch.rand(len(x))
        drawn.append(tuple(noise.tolist()))
        return torch.stack([x.flatten(1).mean(1) + noise, torch.ones(len(x))], dim=1)

    evaluate(model, (X, Y), {"pgd": PGD(0.1, 0.05, 3, eot=2, random_start=False)}, draws=3)
    probes = 3  # what tells whether the model draws repeats a stream on purpose
    assert len(set(drawn[probes:])) == len(drawn[probes:])
