"""Draws that repeat are found and named, in whatever way they are made to; honest models are left alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import Square, probing
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.errors import InputError
from learn2perturb.evaluation import evaluate, replays
from learn2perturb.evaluation.inputs import check_fixed
from learn2perturb.evaluation.replays import (
    BY_ROW,
    HIDDEN,
    SEEDS,
    Contained,
    replayed,
    seeds_decide,
    seeds_generators,
)
from tests.problems import as_if_on

X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def answer(x: Tensor, noise: Tensor) -> Tensor:
    return (x + 0.3 * noise).flatten(1) @ WEIGHT


def seeds_torch(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return answer(x, torch.randn(x.shape[1:]))


def seeds_torch_by_the_images(x: Tensor) -> Tensor:
    torch.manual_seed(int(1e6 * x.sum()))
    return answer(x, torch.randn(x.shape))


def seeds_torch_afterwards(x: Tensor) -> Tensor:
    logits = answer(x, torch.randn_like(x))
    torch.manual_seed(0)
    return logits


def seeds_numpy(x: Tensor) -> Tensor:
    np.random.seed(0)
    return answer(x, torch.from_numpy(np.random.randn(*x.shape)).float())


def seeds_python(x: Tensor) -> Tensor:
    random.seed(0)
    return answer(x, torch.full_like(x, random.gauss(0, 1)))


def forks(x: Tensor) -> Tensor:
    with isolated_rng():
        torch.manual_seed(0)
        return answer(x, torch.randn(x.shape[1:]))


def own_generator(x: Tensor) -> Tensor:
    return answer(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


def own_generator_by_the_image(x: Tensor) -> Tensor:
    noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(1e6 * one.sum()))) for one in x]
    return answer(x, torch.stack(noise))


def own_choices_by_the_image(x: Tensor) -> Tensor:
    own = [torch.Generator().manual_seed(int(1e6 * one.sum())) for one in x]
    return answer(x, torch.stack([torch.randint(2, x.shape[1:], generator=one) for one in own]))


def chooses_what_is_alike(x: Tensor) -> Tensor:
    """Its choices come again every time, yet it takes them from the default generator."""
    return answer(x, torch.ones_like(x) * torch.randint(1, (1,)))


def fresh(x: Tensor) -> Tensor:
    return answer(x, torch.randn_like(x))


def fresh_for_a_batch(x: Tensor) -> Tensor:
    return answer(x, torch.randn(x.shape[1:]))


def fresh_from_a_fork(x: Tensor) -> Tensor:
    seed = int(torch.randint(2**31, (1,)))
    with isolated_rng():
        torch.manual_seed(seed)
        return answer(x, torch.randn(x.shape))


def plain(x: Tensor) -> Tensor:
    return answer(x, torch.zeros_like(x))


REPLAYED = {
    seeds_torch: SEEDS, seeds_torch_by_the_images: SEEDS, seeds_torch_afterwards: SEEDS, seeds_numpy: SEEDS,
    seeds_python: SEEDS, forks: HIDDEN, own_generator: BY_ROW, own_generator_by_the_image: HIDDEN,
    own_choices_by_the_image: HIDDEN,
}  # fmt: skip
HONEST = [
    fresh,
    fresh_for_a_batch,
    fresh_from_a_fork,
    chooses_what_is_alike,
    plain,
    nn.BatchNorm2d(1, track_running_stats=False),
]


@pytest.mark.parametrize("model", list(REPLAYED))
def test_a_replay_is_named(model):
    with isolated_rng():
        assert replayed(model, X, 0) == REPLAYED[model]


@pytest.mark.parametrize(("images", "named"), [(1, HIDDEN), (2, BY_ROW)])
def test_two_images_tell_rows_apart(images, named):
    with isolated_rng():
        assert replayed(own_generator, X[:images], 0) == named


@pytest.mark.parametrize("model", HONEST)
def test_what_is_honest_is_no_replay(model):
    network = nn.Sequential(model, nn.Flatten()).eval() if isinstance(model, nn.Module) else model
    with isolated_rng():
        assert replayed(network, X, 0) == ""


@pytest.mark.parametrize("model", [seeds_torch, seeds_torch_afterwards, own_generator])
def test_a_replay_is_no_fixed_function_and_batchnorm_is_not_blamed(model):
    with isolated_rng(), pytest.raises(InputError) as caught:
        check_fixed(model, X, 0)
    assert "replayed" in str(caught.value)
    assert "BatchNorm" not in str(caught.value)


@pytest.mark.parametrize("model", [seeds_torch, seeds_numpy, seeds_python])
def test_a_model_that_seeds_is_contained(model):
    """Without that, an attack's own draws would come again after every query."""
    contained = Contained(model).eval()
    with isolated_rng():
        assert torch.equal(contained(X), model(X))
        assert seeds_generators(model, X, 0)
        assert not seeds_generators(contained, X, 0)
        seed_everything(3)
        expected = torch.rand(4), np.random.rand(), random.random()
        seed_everything(3)
        contained(X)
        assert torch.equal(torch.rand(4), expected[0])
        assert (np.random.rand(), random.random()) == expected[1:]


def test_evaluate_says_that_a_model_seeds_and_its_attacks_go_on():
    """Square would propose the same square again after every query, and leave nearly all."""
    weight = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))

    def seeding(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x.flatten(1) @ weight

    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = (x.flatten(1) @ weight).argmax(dim=1)
    attacks = {"square": Square(0.03, queries=100)}
    with pytest.warns(UserWarning, match="seeds the random generators"):
        found = evaluate(seeding, (x, y), attacks, engine="plain")
    honest = evaluate(lambda x: x.flatten(1) @ weight, (x, y), attacks, engine="plain")
    assert found.rows[1].accuracy == pytest.approx(honest.rows[1].accuracy, abs=0.1)
    assert found.metadata["model"] == "seeding"


@pytest.mark.parametrize(("kind", "size", "same"), [
    ("mps", 1e-4, True), ("mps", 2e-4, False), ("cpu", 1e-4, False), ("cpu", 1e-7, False),
])  # fmt: skip
def test_rounding_is_no_noise_where_kernels_add_in_any_order(kind, size, same):
    """Of answers of 1/2, of which one part in 10,000 more than as much is allowed."""
    turn = []

    def model(x: Tensor) -> Tensor:
        turn.append(0)
        return torch.full((len(x), 3), 0.5) + size * (len(turn) % 2)

    assert seeds_decide(model, as_if_on(kind, X), 0) is same
    assert probing.passes_differ(model, as_if_on(kind, X)) is not same


@pytest.mark.parametrize("size", [0.3, 1e-6])
def test_a_generator_that_runs_on_decides_however_little_it_draws(size):
    own = torch.Generator().manual_seed(0)
    assert not seeds_decide(lambda x: x.flatten(1) + size * torch.randn(8, 16, generator=own), X, 0)
    assert seeds_decide(lambda x: x.flatten(1) + size * torch.randn(8, 16), X, 0)


@pytest.mark.parametrize("least", [0, 1])
def test_passes_that_draw_less_than_the_first_are_no_replay_of_it(least):
    """The first pass draws two times, each later one so many times: what comes again is none of the rest."""
    passes = []

    def model(x: Tensor) -> Tensor:
        passes.append(0)
        for _ in range(2 if len(passes) == 1 else least):
            torch.randint(1, (1,))
        return plain(x)

    with isolated_rng():
        assert replays.draws_afresh(model, X)
    assert len(passes) == 2


def test_a_contained_model_has_no_mode_of_its_own():
    assert Contained(plain).training is False


def test_numbers_from_a_continuum_that_come_again_are_replayed_whatever_else_is_fresh():
    def model(x: Tensor) -> Tensor:
        torch.randint(10**9, (4,))
        return own_generator(x)

    with isolated_rng():
        assert not replays.draws_afresh(model, X)


@pytest.mark.parametrize(("draw", "passes"), [
    (lambda: torch.rand(3), 2), (lambda: torch.rand(3, generator=torch.Generator().manual_seed(0)), 2),
    (lambda: torch.randint(9, (3,)), 2),
    (lambda: torch.randint(9, (3,), generator=torch.Generator().manual_seed(0)), 65),
    (lambda: None, 1),
])  # fmt: skip
def test_choices_that_come_again_are_looked_at_longest(draw, passes):
    """They may come again by chance; numbers from a continuum do not, and a generator that moves on tells enough."""
    made = []

    def model(x: Tensor) -> Tensor:
        made.append(draw())
        return plain(x)

    with isolated_rng():
        replays.draws_afresh(model, X)
    assert len(made) == passes
