"""Square asked ahead: the search of one query after the other, in fewer passes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from learn2perturb.attacks import Square, ahead
from learn2perturb.attacks.ahead import AheadSearch
from learn2perturb.attacks.proposals import MOVES, STARTS, Recolouring
from learn2perturb.attacks.query import Query
from learn2perturb.engine import execution, windows
from learn2perturb.models import build_model
from tests.problems import Linear, NoisyLinear, two_logits

AHEAD = dataclasses.replace(execution.PLAIN, full_passes=True)
SHAPE = (3, 8, 8)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


class Curved(nn.Module):
    """Two logits of a random network of sines, in float64; images are wrong where the second is above ``level``."""

    def __init__(self, level: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        numbers = math.prod(SHAPE)
        self.into = nn.Parameter(torch.randn(numbers, 30, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(30, generator=generator, dtype=torch.float64))
        self.level = level

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A row at a time: what an image gets does not hang on who is in the pass.
        z = torch.stack([(torch.sin(row.flatten() @ self.into) * self.out).sum() for row in x])
        return two_logits(z - self.level)


def one_after_the_other(model, x, y, eps, norm, stretches):
    """The search by its definition: a proposal at a time, the images as well, with the numbers of the other one."""
    best = STARTS[norm](x, eps)
    loss, broken = model(best)[:, 1].clone(), model(best)[:, 1] > 0
    for count, side in stretches:
        left = (~broken).nonzero().squeeze(1).tolist()
        if not left:
            break
        moves = MOVES[norm].drawn(x[left], side, count)
        for place, image in enumerate(left):
            for number in range(count):
                move = moves.of(torch.tensor([place * count + number]))
                trial = move.shown(best[image : image + 1], x[image : image + 1], eps)
                found = model(trial)[0, 1]
                if found > loss[image]:
                    best[image], loss[image] = trial[0], found
                if found > 0:
                    broken[image] = True
                    break
    return best, broken


def images(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, torch.zeros(count, dtype=torch.int64)


def search(model, x, y, attack: Square) -> AheadSearch:
    sides = [attack._side(number, x) for number in range(1, attack.queries)]
    return AheadSearch(Query(model, attack, y, strict=True), x, y, attack.eps, attack.norm, sides)


@norms
@pytest.mark.parametrize("level", [6.0, 1000.0])  # some break; none does
@pytest.mark.parametrize("at_once", [1, 2, 7, 1000, None])
def test_it_finds_what_one_query_after_the_other_finds(norm, level, at_once, monkeypatch):
    model, (x, y) = Curved(level), images()
    attack = Square({"linf": 0.02, "l2": 0.3}[norm], norm=norm, queries=80)
    if at_once is not None:
        monkeypatch.setattr(AheadSearch, "_ahead", lambda *_: at_once)
    torch.manual_seed(0)
    with torch.no_grad():
        found, broken = search(model, x, y, attack).run()
    torch.manual_seed(0)
    sides = [attack._side(number, x) for number in range(1, attack.queries)]
    with torch.no_grad():
        wanted, gone = one_after_the_other(model, x, y, attack.eps, norm, list(ahead._stretches(sides)))
    assert torch.equal(broken, gone)
    assert 0 < gone.sum() < len(x) or level == 1000.0
    assert torch.equal(found, wanted)
    assert not torch.equal(found, STARTS[norm](x, attack.eps))


def test_stretches_are_the_queries_in_order():
    sides = [9] * 3 + [4] * 1200 + [3]
    stretches = list(ahead._stretches(sides))
    assert stretches == [(3, 9), (500, 4), (500, 4), (200, 4), (1, 3)]
    assert list(ahead._stretches([])) == []


@norms
def test_the_attack_is_as_strong_and_makes_few_passes_more(norm):
    model, (x, y) = Curved(1000.0), images(4)
    attack = Square({"linf": 0.02, "l2": 0.3}[norm], norm=norm, queries=200, seed=0)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    plain = attack.run(model, x, y)
    each = len(sizes)
    with execution.running(AHEAD):
        fast = attack.run(model, x, y)
    with torch.no_grad():
        gains = [(model(one.x_adv) - model(x))[:, 1].mean().item() for one in (plain, fast)]
    assert gains[1] == pytest.approx(gains[0], rel=0.25)
    assert 200 < fast.forward_passes < 1.3 * plain.forward_passes
    assert len(sizes) - each < 0.8 * each
    assert fast.linf.max() <= attack.eps + 1e-6 or norm == "l2"


def test_a_broken_image_keeps_its_point_and_is_asked_no_more(monkeypatch):
    linear, (x, y) = Linear(SHAPE, bias=0.0).double(), images(3)
    reach = 0.1 * linear.weight.detach().abs().sum()
    far = torch.tensor([0.3, 0.5, 3.0], dtype=x.dtype) * reach
    asked: list[list[int]] = []

    class Model(nn.Module):
        def forward(self, given):
            nearest = (given[:, None] - x).flatten(2).abs().amax(dim=2).argmin(dim=1)
            asked.append(nearest.tolist())
            rise = linear(given)[:, 1:] - linear(x)[:, 1]
            return two_logits(rise[torch.arange(len(given)), nearest] - far[nearest])

    model = Model()
    with torch.no_grad():
        one = search(model, x, y, Square(0.1, queries=300))
        found, broken = one.run()
        assert broken.tolist() == [True, True, False]
        assert (model(found)[:, 1] > 0).tolist() == [True, True, False]
    assert one.query.left == 1
    passes = asked[8:-1]  # without those that ask whether it is random
    last = [max(number for number, of in enumerate(passes) if image in of) for image in range(3)]
    assert last[0] < last[2]
    assert last[1] < last[2]
    assert passes[-1] == [2] * len(passes[-1])


def test_rounding_alone_breaks_nothing(monkeypatch):
    model, (x, y) = Curved(6.0), images()
    monkeypatch.setattr(Query, "broken", lambda self, points, labels, margins: torch.zeros_like(margins, dtype=bool))
    with torch.no_grad():
        _, broken = search(model, x, y, Square(0.02, queries=50)).run()
    assert not broken.any()


def test_who_is_asked_ahead(monkeypatch):
    """A deterministic network in a mode that says so; no black box, no noise, no mean over draws, no plain passes."""
    ran: list[bool] = []
    run = AheadSearch.run
    monkeypatch.setattr(AheadSearch, "run", lambda self: (ran.append(True), run(self))[1])
    model, (x, y) = Curved(1000.0), images(2)

    def asked_ahead(model, mode=AHEAD, **settings) -> bool:
        ran.clear()
        with execution.running(mode):
            Square(0.02, queries=5, **settings)(model, x, y)
        return bool(ran)

    assert asked_ahead(model)
    assert asked_ahead(model, norm="l2")
    assert not asked_ahead(model, mode=execution.PLAIN)
    assert not asked_ahead(lambda x: model(x))
    assert not asked_ahead(NoisyLinear(SHAPE).double())
    assert not asked_ahead(model, eot=2)
    assert all(mode.full_passes for mode in (execution.FAST, execution.FAST32, execution.CUDA, execution.CUDA32))


@norms
def test_a_proposal_that_is_no_better_is_not_taken(norm):
    class Flat(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    x, y = images(3)
    with execution.running(AHEAD):
        first, last = (Square(0.1, norm=norm, queries=queries, seed=0)(Flat(), x, y) for queries in (1, 30))
    assert torch.equal(first, last)


# --- windows


@pytest.mark.parametrize("side", [1, 3, 8])
def test_squares_in_windows_are_the_squares(side):
    x, _ = images(4)
    moves = Recolouring.drawn(x, side, 5)
    owner = torch.arange(4).repeat_interleave(5)
    best = STARTS["linf"](x, 0.1)
    shown = moves.windowed(best, x, 0.1, owner)
    assert shown.shape == (20, *SHAPE)
    assert torch.equal(shown.whole(), moves.shown(best[owner], x[owner], 0.1))


@pytest.mark.parametrize("mode", [AHEAD, dataclasses.replace(AHEAD, windows=True)])
def test_small_squares_go_in_windows_and_find_the_same(mode, monkeypatch):
    network = build_model("resnet20", width=0.25).eval()
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    y = network(x).argmax(dim=1)
    kinds: list[bool] = []
    network.register_forward_pre_hook(lambda _, given: kinds.append(isinstance(given[0], windows.Windowed)))
    attack = Square(0.01, queries=60, seed=0)
    with execution.running(mode):
        found = attack.run(network, x, y)
    assert any(kinds) == mode.windows
    with execution.running(AHEAD):
        wanted = attack.run(network, x, y)
    torch.testing.assert_close(found.x_adv, wanted.x_adv)
    with execution.running(mode):
        Square(0.5, norm="l2", queries=5)(network, x, y)
    assert not any(kinds[-3:])


def test_large_squares_do_not():
    network = build_model("digits_cnn", input_shape=(1, 8, 8)).eval()
    x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    with execution.running(dataclasses.replace(AHEAD, windows=True)), torch.no_grad():
        one = search(network, x, y, Square(0.1, queries=5))
    assert one.in_windows
    assert [one._is_small(side) for side in (1, 3, 4, 8)] == [True, True, False, False]


def test_more_are_asked_ahead_where_few_are_better_and_few_images_are_left():
    model, (x, y) = Curved(1000.0), images(6)
    with torch.no_grad():
        one = search(model, x, y, Square(0.02, queries=5))
    one.accepted, one.asked = 1, 2
    often = one._ahead(6, 3)
    assert often == 1  # of two, one would be in vain
    one.asked = 2000
    seldom = one._ahead(6, 3)
    assert often < seldom < one._ahead(1, 3) <= 1000
    assert one._ahead(10**6, 3) == 1
