"""Square's proposals, one by one, against the published code written again: schedule, stripes, squares, bumps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from learn2perturb.attacks import Square
from learn2perturb.attacks.proposals import Recolouring, Redistribution, bumps, stripes
from learn2perturb.errors import ConfigError
from tests.problems import Linear, two_logits

SHAPE = (3, 17, 20)  # not square, and no multiple of a bump's side
LIMITS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def middle(count: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Images that the box does not bind for perturbations up to 0.25."""
    return 0.25 + 0.5 * torch.rand(count, *shape, dtype=torch.float64)


# --- schedule


def by_hand(number: int, height: int, width: int, p: float) -> int:
    share = p
    for limit in LIMITS:
        if number > limit:
            share = share / 2
    return round((share * height * width) ** 0.5)


@pytest.mark.parametrize("p_init", [0.8, 0.3])
@pytest.mark.parametrize("number", sorted({n + more for n in LIMITS for more in (0, 1)} | {1, 9999}))
def test_the_share_is_halved_just_after_each_published_query(number, p_init):
    x = torch.empty(1).expand(1, 3, 100, 160)
    attack = Square(queries=10_000, p_init=p_init)
    assert attack._side(number, x) == min(by_hand(number, 100, 160, p_init), 99)


def test_the_schedule_is_stretched_to_the_queries():
    x = torch.empty(1).expand(1, 3, 100, 160)
    attack = Square(queries=20_000)
    sides = [attack._side(number, x) for number in (16_000, 16_001, 16_002, 19_999)]
    assert sides == [7, 7, 5, 5]  # the last limit is 8,000 of 10,000
    assert Square(queries=20_000, rescale=False)._side(8001, x) == 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 2), (3, 8), (8, 3), (4, 4), (9, 9)])
def test_a_square_is_smaller_than_the_image_where_it_can_be(height, width, norm):
    x = torch.empty(1, 3, height, width)
    attack = Square(0.5, norm=norm, queries=10_000, p_init=1.0)
    first, last = attack._side(1, x), attack._side(9999, x)
    assert first == max(min(height, width) - 1, 1)
    assert last == (1 if norm == "linf" else max(min(3, height - 1, width - 1), 1))


def test_bumps_have_an_odd_side_of_at_least_3():
    x = torch.empty(1).expand(1, 3, 100, 100)
    wide, odd = (Square(0.5, norm=norm, queries=10_000) for norm in ("linf", "l2"))
    for number in (1, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001):
        side = wide._side(number, x)
        assert odd._side(number, x) == max(side + (side % 2 == 0), 3)


@pytest.mark.parametrize("p_init", [0, -0.1, 1.001, True, "0.8", None, float("nan")])
def test_shares_that_are_none(p_init):
    with pytest.raises(ConfigError, match=r"p_init must be a share of the pixels in \(0, 1\], got .*; 0.8 is usual"):
        Square(p_init=p_init)
    assert Square(p_init=1).p_init == 1


# --- l_inf


def test_stripes_have_a_sign_of_their_own_in_each_column_channel_and_image():
    x = middle(200)
    delta = stripes(x, 0.1) - x
    torch.testing.assert_close(delta.abs(), torch.full_like(x, 0.1))
    torch.testing.assert_close(delta, delta[:, :, :1].expand_as(delta))  # the same from top to bottom
    signs = delta[:, :, 0].sign()
    assert signs.mean().abs() < 0.05
    flat = signs.flatten(1).T  # one row a column and channel
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.4  # independent of each other
    edge = stripes(torch.zeros_like(x), 0.1)
    assert set(edge.unique().tolist()) == {0.0, 0.1}


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_a_square_is_side_by_side_and_one_corner_of_the_ball(side):
    x = middle(40)
    best = x + 0.03
    moved = Recolouring.drawn(x, side).shown(best, x, 0.1)
    changed = moved != best
    assert torch.equal(changed.any(dim=1), changed.all(dim=1))  # all channels at one place
    for image, delta in zip(changed[:, 0], moved - x, strict=True):
        rows, columns = (image.any(dim=axis).nonzero().squeeze(1) for axis in (1, 0))
        assert len(rows) == len(columns) == side
        assert image.sum() == side * side
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1
        inside = delta[:, image]
        torch.testing.assert_close(inside.abs(), torch.full_like(inside, 0.1))
        torch.testing.assert_close(inside, inside[:, :1].expand_as(inside))  # one sign a channel
    signs = (moved - x)[changed].view(-1)
    assert 0.3 < (signs > 0).double().mean() < 0.7


def signs_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape) * 2.0 - 1


def test_a_seed_gives_the_same_signs_in_every_version():
    """0 is -1, 1 is +1: results of a seed that are written down can be had again."""
    x = middle(4)
    torch.manual_seed(1)
    found = [stripes(x, 0.1), bumps(x, 0.2), Recolouring.drawn(x, 3).shown(x, x, 0.1)]
    torch.manual_seed(1)
    torch.testing.assert_close(found[0], x + 0.1 * signs_of(4, 3, 1, 20).double())
    for row in range(1, 16, 3):
        for column in range(1, 19, 3):
            lying = torch.rand(()) > 0.5
            bump = torch.tensor(pair(3).T if lying else pair(3))
            wanted = bump * signs_of(4, 3, 1, 1) * 0.2 / math.sqrt(3 * 30)
            tile = (slice(None), slice(None), slice(row, row + 3), slice(column, column + 3))
            torch.testing.assert_close((found[1] - x)[tile], wanted, atol=1e-6, rtol=0)
    rows, columns = torch.randint(0, 15, (4, 1)), torch.randint(0, 18, (4, 1))
    signs = signs_of(4, 3, 1, 1).double()
    for image in range(4):
        delta = (found[2] - x)[image, :, rows[image], columns[image]]
        torch.testing.assert_close(delta, 0.1 * signs[image, :, :, 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_no_proposal_leaves_the_box(value):
    x = torch.full((3, *SHAPE), value, dtype=torch.float64)
    for point in (
        stripes(x, 0.1),
        bumps(x, 2.0),
        Recolouring.drawn(x, 3).shown(x, x, 0.1),
        Redistribution.drawn(x, 5).shown(bumps(x, 2.0), x, 2.0),
    ):
        assert point.min() >= 0
        assert point.max() <= 1
        assert not torch.equal(point, x)


def test_squares_start_anywhere_with_equal_chance():
    x = middle(3000, (1, 4, 5))
    changed = Recolouring.drawn(x, 2).shown(x, x, 0.1)[:, 0] != x[:, 0]
    tops, lefts = (changed.any(dim=axis).to(torch.int8).argmax(dim=1) for axis in (2, 1))
    counts = torch.bincount(tops * 4 + lefts, minlength=12)
    assert len(counts) == 12  # 3 places down, 4 across
    assert (counts / 3000 - 1 / 12).abs().max() < 0.03


# --- l2


def rectangle(height: int, width: int) -> np.ndarray:
    """``pseudo_gaussian_pert_rectangles`` of the published code."""
    delta = np.zeros((height, width))
    middle_row, middle_column = height // 2 + 1, width // 2 + 1
    top, left = middle_row - 1, middle_column - 1
    for counter in range(max(middle_row, middle_column)):
        rows = slice(max(top, 0), min(top + 2 * counter + 1, height))
        columns = slice(max(left, 0), min(left + 2 * counter + 1, width))
        delta[rows, columns] += 1.0 / (counter + 1) ** 2
        top, left = top - 1, left - 1
    return delta / np.sqrt((delta**2).sum())


def pair(side: int) -> np.ndarray:
    """``meta_pseudo_gaussian_pert`` of the published code, before it is laid on its side at random."""
    delta = np.zeros((side, side))
    if side // 2:
        delta[: side // 2] = rectangle(side // 2, side)
    delta[side // 2 :] = -rectangle(side - side // 2, side)
    return delta / np.sqrt((delta**2).sum())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_the_first_point_is_a_grid_of_published_bumps(side):
    shape = (2, 5 * side + side // 2, 5 * side + 4 * side // 5)
    x = middle(12, shape)
    delta = bumps(x, 0.2) - x
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((12,), 0.2, dtype=x.dtype))
    top, left = (length % side // 2 for length in shape[1:])
    rows, columns = ((length - start) // side for length, start in zip(shape[1:], (top, left), strict=True))
    wanted, lying, signs = pair(side), 0, []
    scale = 0.2 / math.sqrt(2 * rows * columns)  # all bumps are of equal norm
    inside = torch.zeros(shape[1:], dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            first, second = top + row * side, left + column * side
            place = slice(first, first + side), slice(second, second + side)
            inside[place] = True
            tile = delta[(slice(None), slice(None), *place)].numpy() / scale
            straight, turned = (np.abs(np.abs(tile) - np.abs(one)).max() < 1e-6 for one in (wanted, wanted.T))
            assert straight or turned
            lying += turned and not straight
            bump = wanted if straight else wanted.T
            sign = (tile * bump).sum(axis=(2, 3))  # of each image and channel
            np.testing.assert_allclose(np.abs(sign), 1, atol=1e-6)
            signs.append(sign)
    assert torch.equal(delta[:, :, ~inside], torch.zeros_like(delta[:, :, ~inside]))
    assert abs(np.mean(signs)) < 0.2
    assert len(np.unique(np.round(np.stack(signs).reshape(-1, 24), 3), axis=1).T) > 12  # images and channels differ
    if side > 2:
        assert 0 < lying < rows * columns


def window(top: int, left: int, side: int, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape)
    mask[top : top + side, left : left + side] = 1
    return mask


def redistributed_by_hand(best, x, eps, side, given, taken, bump, signs):
    """The l2 step of AutoAttack's code for one image (C, H, W): windows by their corner, the bump, a sign a channel."""
    channels, *plane = x.shape
    delta = best - x
    one, other = window(*given, side, plane), window(*taken, side, plane)
    both = np.maximum(one, other)
    norm_image = np.sqrt((delta**2).sum())
    norm_windows = np.sqrt(((delta * both) ** 2).sum())
    place = slice(given[0], given[0] + side), slice(given[1], given[1] + side)
    new = np.zeros_like(delta)
    for channel in range(channels):
        old = delta[channel][place]
        mixed = signs[channel] * bump + old / max(np.sqrt((old**2).sum()), 1e-12)
        budget = max(eps**2 - norm_image**2, 0) / channels + norm_windows**2 / channels
        new[channel][place] = mixed / max(np.sqrt((mixed**2).sum()), 1e-12) * np.sqrt(budget)
    delta = np.where(one > 0, new, np.where(other > 0, 0, delta))
    return np.clip(x + delta * eps / np.sqrt((delta**2).sum()), 0, 1)


@pytest.mark.parametrize("part", [1.0, 0.6])  # of the radius that is used already
@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_a_bump_is_paid_for_as_in_the_published_code(side, part):
    x, eps = middle(6, (3, 9, 8)), 0.4
    x[0] *= 0.1  # where the box binds
    best = bumps(x, part * eps)
    torch.manual_seed(side)
    moved = Redistribution.drawn(x, side).shown(best, x, eps)
    # The same draws once more: corners of both windows, how the bump lies, its signs.
    torch.manual_seed(side)
    corners = [torch.randint(0, length - side + 1, (6, 1)).flatten().tolist() for length in (9, 8, 9, 8)]
    bump = pair(side) if side > 1 else np.ones((1, 1))
    bump = bump.T if torch.rand(()) > 0.5 else bump
    signs = torch.randint(0, 2, (6, 3, 1, 1)).view(6, 3).numpy() * 2 - 1
    for image in range(6):
        top, left, top_taken, left_taken = (corner[image] for corner in corners)
        wanted = redistributed_by_hand(
            best[image].numpy(), x[image].numpy(), eps, side, (top, left), (top_taken, left_taken), bump, signs[image]
        )
        np.testing.assert_allclose(moved[image].numpy(), wanted, atol=1e-6)


# --- the search


class Counted:
    """Two logits, never wrong; ``rounds`` counts the passes, ``sizes`` their images."""

    def __init__(self, noise: float = 0.0) -> None:
        self.sizes: list[int] = []
        self.noise = noise

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        z = x.flatten(1).mean(dim=1) - 2
        z = z + self.noise * torch.randn(len(x)) if self.noise else z
        return torch.stack([torch.zeros_like(z), z], dim=1)


@pytest.mark.parametrize(
    ("noise", "eot", "restarts", "queries", "scores"),
    [
        (0.0, 1, 1, 12, 12),  # deterministic: no score of an incumbent
        (0.01, 1, 1, 9, 9),
        (0.01, 1, 1, 10, 10 + 1),  # after the tenth, its incumbent's
        (0.01, 1, 1, 12, 12 + 1),
        (0.0, 3, 1, 12, 3 * (12 + 1)),  # draws are asked for: taken at its word
        (0.0, 1, 2, 12, 2 * 12 + 2),  # and each run is judged
        (0.01, 2, 3, 12, 3 * (2 * (12 + 1) + 2)),
    ],
)
def test_what_a_search_costs(noise, eot, restarts, queries, scores):
    model, x = Counted(noise), torch.rand(2, 1, 4, 4)
    y = torch.zeros(2, dtype=torch.int64)
    result = Square(0.05, queries=queries, eot=eot, restarts=restarts, seed=0).run(model, x, y)
    probes = 0 if eot > 1 else 2 if noise else 8  # whether it is random
    clean = 1 if noise == 0 and eot == 1 else 0  # whether images are wrong as they are
    assert result.forward_passes == scores + probes + clean == len(model.sizes) - 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_first_query_is_the_stripes_or_the_bumps(norm):
    x, model = middle(3).float(), Linear(SHAPE, bias=-1000.0)
    torch.manual_seed(2)
    wanted = stripes(x, 0.1) if norm == "linf" else bumps(x, 0.1)
    torch.manual_seed(2)
    found = Square(0.1, norm=norm, queries=1)(model, x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found, wanted)


def test_what_one_run_breaks_needs_no_other():
    x, y = middle(4, (1, 4, 4)).float(), torch.zeros(4, dtype=torch.int64)

    def near(images):
        moved = (images[:, None] - x).flatten(2).abs().amax(dim=2).amin(dim=1) > 1e-3
        return two_logits(moved.float() - 0.5)

    once, often = (Square(0.1, queries=5, restarts=runs, seed=0).run(near, x, y) for runs in (1, 4))
    assert once.success.all()
    assert often.success.all()
    assert often.forward_passes == once.forward_passes + 1  # the first run is judged; there is no second


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_more_queries_are_never_worse_and_the_first_counts(eps):
    x, y = torch.rand(6, 1, 6, 6), torch.zeros(6, dtype=torch.int64)
    rise = [
        Counted()(Square(eps, queries=queries, seed=1)(Counted(), x, y))[:, 1] - Counted()(x)[:, 1]
        for queries in (1, 2, 10, 60)
    ]
    for less, more in itertools.pairwise(rise):
        assert (more >= less - 1e-6).all()
    assert (rise[-1] > rise[0] + 0.1 * eps).all()


def test_an_image_that_breaks_keeps_the_point_that_broke_it_and_the_others_go_on():
    linear, sizes = Linear((1, 6, 6)), []
    x = 0.4 + 0.2 * torch.rand(5, 1, 6, 6)
    # How far from the boundary each image is, in units of what can be had; the last one is out of reach.
    far = torch.tensor([0.05, 0.3, 0.5, 0.6, 1.5]) * 0.1 * linear.weight.detach().abs().sum()

    def model(images):
        sizes.append(len(images))
        rise = linear(images)[:, 1:] - linear(x)[:, 1]  # of each image over each of the first ones
        nearest = (images[:, None] - x).flatten(2).abs().amax(dim=2).argmin(dim=1)
        return two_logits(rise[torch.arange(len(images)), nearest] - far[nearest])

    result = Square(0.1, queries=600, seed=0).run(model, x, torch.zeros(5, dtype=torch.int64))
    assert result.success.tolist() == [True] * 4 + [False]
    passes = sizes[9:-1]
    assert passes[0] == 5
    assert passes == sorted(passes, reverse=True)
    assert len(passes) == 600
    assert passes[-1] == 1
    assert result.l2[4] > 0  # the best point that it found, though it broke nothing
