"""The few-pixel attack: it finds a planted pixel, changes no more than k, and is not fooled by a lucky draw."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import FewPixel
from learn2perturb.attacks.few_pixel import STRATEGIES, _others
from learn2perturb.engine import execution
from learn2perturb.engine.windows import Windowed
from learn2perturb.errors import ConfigError, InputError
from tests.problems import two_logits

SHAPE = (3, 6, 6)
COLOUR = torch.tensor([1.0, 0.0, 0.0])


def planted(x: Tensor) -> Tensor:
    """Return logits that change class where the pixel (4, 1) is nearly red, and rise on the way there."""
    return two_logits(1 - 4 * (x[:, :, 4, 1] - COLOUR).abs().sum(dim=1))


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(count, *SHAPE)
    return x, torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pixels", [1, 2])
def test_finds_the_planted_pixel_and_changes_no_more_than_k(pixels, strategy):
    x, y = batch()
    generations = {"best1bin": 40, "rand1": 150}[strategy]
    result = FewPixel(pixels, population=60, generations=generations, strategy=strategy, seed=0).run(planted, x, y)
    assert result.success.all()
    changed = (result.x_adv != x).any(dim=1)
    assert changed[:, 4, 1].all()
    assert torch.equal(result.l0, changed.flatten(1).sum(dim=1).float())
    assert result.l0.max() <= pixels
    assert result.backward_passes == 0


def test_whole_generations_of_all_images_are_scored_in_passes_of_bounded_size():
    x, y = batch(3)
    sizes = []

    def stubborn(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return two_logits(x.flatten(1).sum(dim=1) - 1000)

    result = FewPixel(population=10, generations=2, chunk=16).run(stubborn, x, y)
    generations = sizes[9:-1]  # after 8 probes and the clean pass, before the verification
    assert generations == [16, 14] * 3
    assert result.forward_passes == pytest.approx(sum(sizes[:-1]) / 3)


def test_images_leave_once_broken_and_wrong_ones_stay_as_they_are():
    x, y = batch(4)
    y[0] = 1  # wrong as it is
    left = []

    def model(x: Tensor) -> Tensor:
        left.append(len(x))
        return planted(x)

    result = FewPixel(population=60, generations=60, seed=0, chunk=10_000).run(model, x, y)
    assert torch.equal(result.x_adv[0], x[0])
    assert result.success.all()
    generations = left[9:-1]
    assert generations[0] == 180
    assert generations == sorted(generations, reverse=True)
    assert generations[-1] < 180
    assert len(generations) < 60


def test_a_targeted_attack_reaches_its_class():
    x, y = batch()
    result = FewPixel(population=60, generations=40, targeted=True, seed=0).run(planted, x, y + 1)
    assert result.success.all()


def test_lucky_draws_choose_nothing_on_a_stochastic_model():
    """Red helps, all the rest is noise as large: what is kept is red, and success is that of fresh draws."""
    x, y = batch(6)

    def noisy(x: Tensor) -> Tensor:
        return planted(x) + 1.0 * torch.randn(len(x), 1) * torch.tensor([0.0, 1.0])

    result = FewPixel(population=60, generations=30, eot=4, seed=0).run(noisy, x, y)
    assert planted(result.x_adv)[:, 1].mean() > 0
    # Two passes to see that it draws. No image has left: each was scored in every generation, its elite twice, and the
    # elite judged at the end.
    assert result.forward_passes == pytest.approx(2 + 4 * (31 * 60 + 30 * 6 + 5 * 6))


def test_seeds_reproduce():
    x, y = batch()
    first, again, other = (
        FewPixel(population=10, generations=3, seed=seed)(lambda x: planted(x) - 10, x, y) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [2, 3])
def test_parents_are_different_members_and_none_is_the_candidate_itself(count):
    size = 5
    genes = torch.arange(size, dtype=torch.float32).view(1, size, 1, 1).expand(400, size, 1, 1)
    drawn = torch.stack([genes, *_others(genes, count)]).flatten(3).squeeze(3)  # (1 + count, 400, size)
    for a in range(count + 1):
        for b in range(a):
            assert (drawn[a] != drawn[b]).all()
    for one in drawn[1:]:
        for own in range(size):
            share = torch.bincount(one[:, own].long(), minlength=size) / 400
            assert share[own] == 0
            assert (share - 0.25).abs().sort().values[:-1].max() < 0.12  # uniform over the others


def test_what_low_precision_alone_takes_for_broken_is_not_kept_as_such():
    x, y = batch()

    def model(x: Tensor) -> Tensor:
        return planted(x) + 4.0 * torch.is_autocast_enabled("cpu") * torch.tensor([0.0, 1.0])

    with execution.running(execution.ExecutionMode("half", dtype=torch.bfloat16)):
        result = FewPixel(population=60, generations=40, seed=0).run(model, x, y)
    assert (model(result.x_adv)[:, 1] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8 / 255}, "eps of a few-pixel attack is a number of pixels, 1, 2, 3, ..., got 0.031"),
        ({"norm": "linf"}, "norm is 'linf'; allowed: l0"),
        ({"population": 3}, "population must be at least 4, got 3"),
        ({"strategy": "best2bin"}, "strategy is 'best2bin'; allowed: best1bin, rand1"),
        ({"generations": 0}, "generations must be a whole number"),
        ({"chunk": 0}, "chunk must be a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        FewPixel(**settings)


def test_more_pixels_than_the_image_has_are_refused():
    x, y = batch()
    with pytest.raises(InputError, match="eps=37 pixels are more than the 36 of an image; lower eps"):
        FewPixel(37)(planted, x, y)


class Planted(nn.Module):
    """A convolution, then a class of the planted pixel's neighbourhood."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.seen: list[tuple[type, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((type(x), len(x)))
        return two_logits(self.layer(x).sigmoid()[:, :, 4, 1].sum(dim=1) - 10)


IN_WINDOWS = dataclasses.replace(execution.PLAIN, windows=True)


def crafted(mode: execution.ExecutionMode, attack: FewPixel, network: nn.Module) -> Tensor:
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    with execution.running(mode):
        return attack(network, x, torch.zeros(6, dtype=torch.int64))


def test_windows_find_what_whole_images_do():
    network, attack = Planted(), FewPixel(population=20, generations=10, seed=0)
    whole = crafted(execution.PLAIN, attack, network)
    assert not any(kind is Windowed for kind, _ in network.seen)
    passes, network.seen = network.seen, []
    torch.testing.assert_close(crafted(IN_WINDOWS, attack, network), whole)
    kinds = [kind for kind, _ in network.seen]
    # Two passes more, which compare the two.
    assert [count for _, count in network.seen if count != 8] == [count for _, count in passes]
    assert kinds.count(Windowed) == 1 + attack.generations + 1


def test_passes_of_windows_hold_more_candidates():
    network = Planted()
    crafted(IN_WINDOWS, FewPixel(population=2000, generations=1), network)
    whole, inside = (max(count for kind, count in network.seen if (kind is Windowed) == flag) for flag in (False, True))
    assert (whole, inside) == (8, 12_000)
    network = Planted()
    crafted(IN_WINDOWS, FewPixel(population=2000, generations=1, chunk=500), network)
    assert max(count for _, count in network.seen) == 500


@pytest.mark.parametrize("reason", ["several pixels", "noise", "another answer"])
def test_whole_images_are_painted_where_windows_do_not_serve(reason):
    network = Planted()
    if reason == "noise":
        network.layer.register_forward_hook(lambda module, args, output: output + torch.randn(len(output), 1, 1, 1))
    if reason == "another answer":
        network.layer.register_forward_hook(lambda module, args, output: output + (type(args[0]) is Windowed))
    crafted(IN_WINDOWS, FewPixel(2 if reason == "several pixels" else 1, population=10, generations=2), network)
    assert sum(kind is Windowed for kind, _ in network.seen) == (reason == "another answer")
