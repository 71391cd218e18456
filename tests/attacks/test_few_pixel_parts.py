"""The parts of the few-pixel attack: how candidates are drawn, bred, painted, compared and judged."""

from __future__ import annotations

import itertools

import pytest
import torch

from learn2perturb.attacks import FewPixel
from learn2perturb.attacks.few_pixel import _Search, _Swarm
from learn2perturb.attacks.query import Query
from learn2perturb.errors import ConfigError, InputError
from tests.problems import two_logits


def swarm(genes: torch.Tensor, score: torch.Tensor | None = None) -> _Swarm:
    score = torch.zeros(genes.shape[:2]) if score is None else score
    return _Swarm(torch.arange(len(genes)), genes, score, score - 1, torch.ones_like(score))


def search(model, x: torch.Tensor, fixed: bool = True, **settings) -> _Search:
    attack, y = FewPixel(**settings), torch.zeros(len(x), dtype=torch.int64)
    return _Search(attack, Query(model, attack, y, strict=True), x, y, fixed)


def mean_of(x: torch.Tensor) -> torch.Tensor:
    return two_logits(x.flatten(1).mean(dim=1) - 5)


# --- the first generation


def test_the_first_places_are_uniform_and_colours_normal_as_in_the_paper():
    genes = FewPixel(2, population=100_000)._first(2, torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    assert genes.shape == (2, 100_000, 2, 5)
    places, colours = genes[..., :2].flatten(), genes[..., 2:].flatten()
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert places.quantile(share) == pytest.approx(share, abs=0.004)
    for share, deviations in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        assert colours.quantile(share).item() == pytest.approx((128 + 127 * deviations) / 255, abs=0.0017)
    assert colours.min() == 0
    assert colours.max() == 1
    assert (colours == 0).double().mean() == pytest.approx(0.1567, abs=0.002)  # what is below is clipped
    assert places.min() >= 0
    assert places.max() < 1


def test_the_colours_are_of_mean_128_and_deviation_127(monkeypatch):
    asked = []
    real = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda own, *law: (asked.append((own.shape, *law)), real(own, *law))[1]
    )
    FewPixel(2, population=5)._first(3, torch.zeros(1, 3, 5, 5))
    assert asked == [((3, 5, 2, 3), 128 / 255, 127 / 255)]


# --- breeding


@pytest.mark.parametrize("images", [1, 3])
def test_best1bin_goes_from_the_best_along_a_difference_of_two_others(images):
    genes = 0.45 + 0.1 * torch.rand(images, 5, 2, 4, dtype=torch.float64)
    score = torch.rand(images, 5, dtype=torch.float64)
    trials = FewPixel(2, population=5)._trials(swarm(genes, score))
    factors = set()
    for image in range(images):
        best, own = genes[image, score[image].argmax()], set()
        for one in range(5):
            step = trials[image, one] - best
            fits = []
            for a, b in itertools.permutations([k for k in range(5) if k != one], 2):
                factor = step / (genes[image, a] - genes[image, b])
                if torch.allclose(factor, factor.flatten()[0].expand_as(factor)) and factor.flatten()[0] > 0:
                    fits.append(factor.flatten()[0].item())
            assert len(fits) == 1
            assert 0.5 <= fits[0] < 1
            own.add(round(fits[0], 9))
        assert len(own) == 1  # one factor a generation and image
        factors |= own
    assert len(factors) == images


def test_rand1_goes_from_another_member_by_half_a_difference():
    genes = 0.45 + 0.1 * torch.rand(2, 5, 1, 4, dtype=torch.float64)
    trials = FewPixel(population=5, strategy="rand1")._trials(swarm(genes))
    for image in range(2):
        for one in range(5):
            others = [genes[image, k] for k in range(5) if k != one]
            made = [a + 0.5 * (b - c) for a, b, c in itertools.permutations(others, 3)]
            assert sum(torch.allclose(trials[image, one], each) for each in made) == 1


def test_what_leaves_the_box_is_drawn_anew_and_its_edge_is_inside():
    attack = FewPixel(population=4)
    for edge in (0.0, 1.0):
        same = torch.full((3, 4, 1, 3), edge)
        assert torch.equal(attack._trials(swarm(same)), same)
    genes = torch.randint(0, 2, (400, 4, 1, 3)).float()
    trials = attack._trials(swarm(genes))
    assert trials.min() >= 0
    assert trials.max() <= 1
    redrawn = trials[(trials > 0) & (trials < 0.5)]  # a difference of at least half leads elsewhere
    assert len(redrawn) > 100
    assert redrawn.mean() == pytest.approx(0.25, abs=0.05)


def test_a_trial_replaces_its_parent_only_where_it_is_fitter():
    genes = torch.rand(2, 3, 1, 3)
    parents = swarm(genes, torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    trials = swarm(genes + 1, torch.tensor([[1.0, 2.5, 2.5], [-1.0, 1.0, 0.0]]))._replace(seen=torch.full((2, 3), 7.0))
    better = torch.tensor([[False, True, False], [False, True, False]])
    kept = parents.fitter(trials)
    assert torch.equal((kept.genes > 1).all(dim=3).all(dim=2), better)
    assert torch.equal(kept.score, torch.where(better, trials.score, parents.score))
    assert torch.equal(kept.margin, torch.where(better, trials.margin, parents.margin))
    assert torch.equal(kept.seen, torch.where(better, 7.0, 1.0))
    assert torch.equal(kept.image, parents.image)


# --- painting


def test_a_gene_names_its_place_and_colour():
    x = torch.rand(2, 3, 4, 5)
    for row, column in itertools.product(range(4), range(5)):
        for inside in (0.0, 0.5, 0.999):
            genes = torch.tensor([[[(row + inside) / 4, (column + inside) / 5, 0.1, 0.2, 0.3]]])
            (painted,) = search(mean_of, x).paint(torch.tensor([1]), genes)
            wanted = x[1].clone()
            wanted[:, row, column] = torch.tensor([0.1, 0.2, 0.3])
            assert torch.equal(painted, wanted)
    (corner,) = search(mean_of, x).paint(torch.tensor([0]), torch.tensor([[[1.0, 1.0, 0.1, 0.2, 0.3]]]))
    assert torch.equal(corner[:, 3, 4], torch.tensor([0.1, 0.2, 0.3]))  # 1 is the last place


def test_of_two_pixels_at_one_place_the_later_one_shows():
    x, genes = torch.zeros(1, 1, 3, 3), torch.tensor([[[0.5, 0.5, 0.2], [0.5, 0.5, 0.7]]])
    painted = search(mean_of, x, eps=2).paint(torch.tensor([0]), genes)
    assert painted.sum() == pytest.approx(0.7)
    assert x.sum() == 0  # the images themselves are left alone


# --- scoring


@pytest.mark.parametrize(("side", "size"), [(8, 1024), (32, 64), (300, 1)])
def test_a_pass_has_as_many_candidates_as_suit_the_cache(side, size):
    assert search(mean_of, torch.zeros(1, 1, side, side)).chunk == size
    assert search(mean_of, torch.zeros(1, 1, side, side), chunk=7).chunk == 7


@pytest.mark.parametrize(("fixed", "eot", "draws"), [(True, 3, 1), (False, 3, 3), (False, 1, 1)])
@pytest.mark.parametrize("targeted", [False, True])
def test_fitness_is_the_loss_of_the_mean_probability_and_the_aim_decides_its_sign(fixed, eot, draws, targeted):
    passes, x = [], torch.rand(3, 1, 4, 4)

    def model(images):
        passes.append(len(images))
        return two_logits(images.flatten(1).sum(dim=1) + (len(passes) - 1))

    made = search(model, x, fixed, eot=eot, targeted=targeted)
    loss, margins = made._values(x, torch.zeros(3, dtype=torch.int64))
    each = torch.stack([two_logits(x.flatten(1).sum(dim=1) + k).softmax(dim=1) for k in range(draws)]).mean(dim=0).log()
    sign = -1 if targeted else 1
    torch.testing.assert_close(loss, sign * -each[:, 0])
    torch.testing.assert_close(margins, sign * (each[:, 1] - each[:, 0]))
    assert passes == [3] * draws


def test_the_elite_is_scored_again_and_its_mean_counts():
    x = torch.rand(2, 1, 3, 3)
    made = search(mean_of, x, False, population=15)
    assert made.elite == 2  # a tenth, rounded up
    genes = torch.rand(2, 15, 1, 3)
    before = made.scored(torch.arange(2), genes)
    moved = before._replace(score=before.score + torch.rand(2, 15), seen=torch.full((2, 15), 3.0))
    after = made.elite_again(moved)
    top = moved.score.topk(2, dim=1).indices
    elite = torch.zeros(2, 15, dtype=torch.bool).scatter(1, top, True)
    wanted = torch.where(elite, (3 * moved.score + before.score) / 4, moved.score)
    torch.testing.assert_close(after.score, wanted)
    assert torch.equal(after.seen, torch.where(elite, 4.0, 3.0))


@pytest.mark.parametrize(("draws", "rounds"), [(1, 20), (3, 7), (20, 1), (30, 1)])
def test_the_last_choice_is_by_20_fresh_draws(draws, rounds):
    passes, x = [], torch.rand(1, 1, 3, 3)

    def model(images):
        passes.append(len(images))
        # The second of the elite is better on the mean, though the first has the higher score.
        return two_logits(images.flatten(1).sum(dim=1))

    made = search(model, x, False, eot=draws, population=20)
    genes = torch.rand(1, 20, 1, 3)
    genes[0, 4, 0, 2], genes[0, 7, 0, 2] = 0.9, 1.0
    genes[0, 4, 0, :2] = genes[0, 7, 0, :2] = 0.0
    score = torch.zeros(1, 20)
    score[0, 4], score[0, 7] = 2.0, 1.0
    chosen = made.best(swarm(genes, score))
    assert chosen[0, 0, 0, 0] == 1.0
    assert passes == [2] * rounds * draws
    assert search(model, x).best(swarm(genes, score))[0, 0, 0, 0] == pytest.approx(0.9)  # no noise: the score is true


def test_of_a_broken_population_the_widest_margin_is_painted():
    x = torch.zeros(3, 1, 3, 3)
    made, found = search(lambda images: two_logits(images.flatten(1).sum(dim=1) - 0.5), x), x.clone()
    genes = torch.zeros(3, 3, 1, 3)
    genes[..., 0, 2] = torch.tensor([[0.1, 0.2, 0.3], [0.6, 0.9, 0.7], [0.5, 0.1, 0.2]])
    newest = made.scored(torch.arange(3), genes)
    kept = made.unbroken(newest, found)
    assert kept.tolist() == [True, False, True]  # 0.5 is no margin
    assert torch.equal(found.flatten(1).sum(dim=1), torch.tensor([0.0, 0.9, 0.0]))


@pytest.mark.parametrize(("margin", "attacked"), [(-0.5, True), (0.0, True), (0.5, False), (1.5, False)])
def test_only_images_that_are_right_are_attacked_and_a_tie_is_right(margin, attacked):
    x, y = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)
    result = FewPixel(population=4, generations=1).run(
        lambda images: two_logits(torch.full((len(images),), margin)), x, y
    )
    assert result.forward_passes == 8 + 1 + (8 if attacked else 0)


# --- settings


def test_settings_at_their_bounds():
    assert FewPixel(population=4).population == 4
    with pytest.raises(ConfigError, match="population must be at least 4, got 3; the paper has 400"):
        FewPixel(population=3)
    for name in ("generations", "chunk", "population"):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
            FewPixel(**{name: 0})
    assert FewPixel(generations=1, chunk=1).chunk == 1
    assert FewPixel(3.0).pixels == 3
    with pytest.raises(ConfigError, match="eps of a few-pixel attack is a number of pixels, 1, 2, 3, ..., got 1.5"):
        FewPixel(1.5)


def test_as_many_pixels_as_the_image_has_are_allowed():
    x, y = torch.rand(1, 1, 2, 3), torch.zeros(1, dtype=torch.int64)
    result = FewPixel(6, population=4, generations=1, seed=0).run(mean_of, x, y)
    assert result.l0.max() <= 6
    with pytest.raises(InputError, match="eps=7 pixels are more than the 6 of an image; lower eps"):
        FewPixel(7, population=4, generations=1).run(mean_of, x, y)


def test_generations_are_counted_with_the_first_one_beside():
    x, y = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)
    result = FewPixel(population=6, generations=3).run(mean_of, x, y)
    assert result.forward_passes == 8 + 1 + 6 * 4  # whether it is random, whether it is right, and the candidates
