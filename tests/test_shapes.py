"""Shapes at the public boundaries of noise, attacks and evaluation: as annotated, in all that runs here."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

import learn2perturb as l2p
from learn2perturb.attacks import PGD, losses
from learn2perturb.attacks.balls import BALLS
from learn2perturb.evaluation.predictors import Predictor
from learn2perturb.registry import ATTACKS
from tests import shapes

X, Y = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
# Short: what is tried is what goes in and out, not how well it searches.
SHORT = {
    "pgd": {"steps": 1, "eot": 2}, "fgsm": {}, "apgd": {"steps": 2}, "cw": {"steps": 2, "search_steps": 1},
    "square": {"queries": 4}, "spsa": {"steps": 1, "directions": 2}, "few_pixel": {"eps": 1, "generations": 1},
}  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    return l2p.perturb(l2p.build_model("digits_cnn", input_shape=(1, 8, 8)), input_shape=(1, 8, 8)).eval()


@pytest.fixture
def checked():
    with shapes.checking() as count:
        yield count


def test_the_boundaries_are_checked_and_afterwards_are_not():
    before = losses.margin
    with shapes.checking() as count:
        assert count >= 30
        assert losses.margin is not before
    assert losses.margin is before


@pytest.mark.parametrize(
    ("logits", "y"),
    [(torch.zeros(3, 4), torch.zeros(2).long()), (torch.zeros(3), Y), (torch.zeros(3, 4), torch.zeros(3))],
)
@pytest.mark.usefixtures("checked")
def test_what_does_not_fit_is_found(logits, y):
    with pytest.raises(jaxtyping.TypeCheckError):
        losses.cross_entropy(logits, y)


@pytest.mark.usefixtures("checked")
def test_a_wrong_answer_is_found(monkeypatch):
    monkeypatch.setattr(losses.functional, "cross_entropy", lambda *_, **__: torch.zeros(()))
    with pytest.raises(jaxtyping.TypeCheckError):
        losses.cross_entropy(torch.zeros(3, 4), Y)


@pytest.mark.parametrize("name", sorted(SHORT))
@pytest.mark.usefixtures("checked")
def test_attacks_keep_shapes(network, name):
    assert ATTACKS.entry(name).load()(**SHORT[name])(network, X, Y).shape == X.shape


@pytest.mark.parametrize("name", sorted(BALLS))
@pytest.mark.usefixtures("checked")
def test_balls_keep_shapes(name):
    ball = BALLS[name]
    moved = ball.project(X + ball.step(X, 0.1) + ball.random(X, 0.1), X, 0.05)
    assert ball.distance(moved, X).shape == (3,)


@pytest.mark.parametrize("rule", ["single", "vote", "mean_probability", "mean_logits"])
@pytest.mark.usefixtures("checked")
def test_predictors_give_scores_of_classes(network, rule):
    assert Predictor(network, rule, 2).predict(X).shape == (3,)


@pytest.mark.usefixtures("checked")
def test_an_evaluation_runs_with_its_shapes_checked(network):
    found = l2p.evaluate(network, (X, Y), attacks={"pgd": PGD(steps=1)}, draws=2, progress=False)
    assert len(found.rows) > 1
