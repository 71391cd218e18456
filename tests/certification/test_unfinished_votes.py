"""Votes are kept as they are counted: a kill loses some passes, and the same call gives the same certificates."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb import load_data, perturb
from learn2perturb.certification import Certification, certify, certifying, risk_gap
from learn2perturb.certification.gap import RiskGap
from learn2perturb.cli.main import main
from learn2perturb.engine.random import isolated_rng, kept_generators, put_back_generators
from learn2perturb.evaluation import Unfinished
from learn2perturb.evaluation.pieces import Pieces

DATA = load_data("digits", "test", limit=5)
SETTINGS = {"n0": 3, "n": 20, "batch_size": 9, "progress": False}
METHODS: dict[str, Callable[..., Any]] = {
    "first_noise": certify,
    "smoothing": lambda *given, **more: certify(*given, sigma=0.2, **more),
    "renyi": risk_gap,
}


class Killed(BaseException):
    """As Ctrl-C comes."""


class Network(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
        self.network = perturb(plain, input_shape=(1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.fixture(autouse=True)
def every_piece(monkeypatch):
    monkeypatch.setattr(Pieces, "WORTH", 0.0)
    monkeypatch.setattr(Pieces, "INTERVAL", 0.0)


def killer(at: int | None, counted: list[float] | None = None) -> Callable[..., None]:
    """Return what progress is told to: it kills at the pass of a given number."""
    numbers = itertools.count()

    def told(done: float, total: float, label: str) -> None:
        if next(numbers) == at:
            raise Killed
        if counted is not None:
            counted.append(done)

    return told


def plain(found: Certification | RiskGap) -> object:
    """Return the record without what no two runs share: times."""
    metadata = {key: value for key, value in found.metadata.items() if key not in ("seconds", "date", "command")}
    return dataclasses.replace(found, metadata=metadata)


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_every_pass_the_certificates_are_the_same(method, tmp_path, capsys):
    model, run, counted = Network().eval(), METHODS[method], []
    whole = run(model, DATA, **SETTINGS | {"progress": killer(None, counted)})
    passes = list(counted)
    assert len(passes) > 10
    counted.clear()
    for _ in passes[1:]:  # each gets one pass further
        with pytest.raises(Killed), Unfinished(tmp_path) as keep:
            run(model, DATA, **SETTINGS | {"progress": killer(1, counted)}, keep=keep)
    with Unfinished(tmp_path) as keep:
        again = run(model, DATA, **SETTINGS | {"progress": killer(None, counted)}, keep=keep)
    assert counted == passes
    assert plain(again) == plain(whole)
    assert capsys.readouterr().err.count("going on: ") == len(passes) - 1
    assert list(tmp_path.iterdir()) == []


CHANGES = {
    "nothing": {}, "another alpha": {"alpha": 0.01},
    "weights": {"model": Network(1).eval()}, "images": {"data": load_data("digits", "train", limit=5)},
    "seed": {"seed": 1}, "batch size": {"batch_size": 8}, "sigma": {"sigma": 0.3}, "more draws": {"n0": 4, "n": 21},
}  # fmt: skip


def test_only_votes_of_the_same_draws_are_taken_up(tmp_path):
    given = {"model": Network().eval(), "data": DATA, "sigma": 0.2, **SETTINGS}
    certify(**given, keep=Unfinished(tmp_path))
    for number, (change, changed) in enumerate(CHANGES.items()):
        counted: list[float] = []
        told = {"progress": killer(None if number < 2 else 0, counted)}
        with contextlib.suppress(Killed):
            found = certify(**given | changed | told, keep=Unfinished(tmp_path))
            assert number < 2 and not counted, change
            assert found.alpha == changed.get("alpha", 0.001)


def test_votes_that_choose_are_not_those_that_certify(tmp_path):
    given = {"model": Network().eval(), "data": DATA, "sigma": 0.5, "progress": False, "n0": 9, "n": 9}
    kept = certify(**given, keep=Unfinished(tmp_path))
    assert plain(kept) == plain(certify(**given))


def test_votes_of_a_function_are_not_kept_and_that_is_said(tmp_path, capsys):
    certify(lambda x: x.flatten(1)[:, :10], DATA, **SETTINGS, sigma=0.2, keep=Unfinished(tmp_path))
    assert "nothing is kept on the way, so a kill loses all: the model is a function" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_generators_go_on_from_where_they_were_after_a_file(tmp_path):
    def drawn() -> tuple[float, ...]:
        return torch.rand(1).item(), torch.randn(1).item(), np.random.rand(), np.random.randn(), random.gauss(0, 1)

    with isolated_rng():
        drawn()
        torch.save(kept_generators(), tmp_path / "kept")
        first = drawn()
        put_back_generators(torch.load(tmp_path / "kept", weights_only=True))
        assert drawn() == first


@pytest.mark.parametrize("method", ["smoothing", "renyi"])
def test_the_verb_goes_on_and_tidies_up(method, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = tmp_path / "records" / "one.json"
    words = ["certify", f"{Path(__file__).stem}:network", "--dataset=digits", "--limit=5", "--n0=3", "--n=20", "-q"]
    words += ["--batch-size=9", "--method", method, "--device=cpu", "--out", str(out)]
    words += ["--sigma=0.2"] if method == "smoothing" else []
    passes = []
    real = certifying.checked_logits

    def killed(model: object, x: Tensor) -> Tensor:
        passes.append(len(x))
        if len(passes) == 6:
            raise Killed
        return real(model, x)

    monkeypatch.setattr(certifying, "checked_logits", killed)
    with pytest.raises(Killed):
        main(words)
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    assert main(words) == 0
    assert len(passes) == (14 if method == "smoothing" else 12) + 1
    assert "going on: " in capsys.readouterr().err
    assert list(out.parent.iterdir()) == [out]


def network() -> nn.Module:
    return Network().eval()
