"""One noise module by itself: its shapes, its scale, what it replays, and which way a pass goes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from learn2perturb.engine import execution, fused, rows
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise import base, noise_modules, perturb_weights
from learn2perturb.noise.base import map_shape
from learn2perturb.noise.distributions import is_channels_last
from learn2perturb.noise.laws import Perturbation, spread
from learn2perturb.noise.places import drop_hook

SHAPE = (3, 4, 5)


def made(**arguments) -> Perturbation:
    return Perturbation(SHAPE, site="here", **arguments)


# --- shapes


@pytest.mark.parametrize(
    ("granularity", "channel_dim", "expected"),
    [
        ("element", 0, (3, 4, 5)), ("element", 2, (3, 4, 5)), ("channel", 0, (3, 1, 1)), ("channel", 1, (1, 4, 1)),
        ("channel", 2, (1, 1, 5)), ("layer", 0, (1, 1, 1)), ("layer", 2, (1, 1, 1)),
    ],
)  # fmt: skip
def test_theta_has_a_number_for_each_element_channel_or_layer(granularity, channel_dim, expected):
    assert map_shape(SHAPE, granularity, channel_dim) == expected
    noise = made(granularity=granularity, channel_dim=channel_dim, init=0.5)
    assert noise.theta.shape == expected
    assert (noise.theta == 0.5).all()
    assert map_shape((7,), granularity, 0) == {"layer": (1,)}.get(granularity, (7,))


@pytest.mark.parametrize(
    ("granularity", "channel_dim", "fits"),
    [
        ("element", 0, [(3, 4, 5)]),
        ("channel", 0, [(3, 4, 5), (3, 9, 9)]),
        ("channel", 2, [(3, 4, 5), (9, 9, 5)]),
        ("layer", 0, [(3, 4, 5), (3, 9, 9), (9, 9, 5), (9, 9, 9)]),
    ],
)
def test_features_of_another_shape_are_refused_where_theta_does_not_fit(granularity, channel_dim, fits):
    noise = made(granularity=granularity, channel_dim=channel_dim)
    for shape in [(3, 4, 5), (3, 9, 9), (9, 9, 5), (9, 9, 9), (3, 4), (3, 4, 5, 1), (3,), (60,)]:
        h = torch.zeros(2, *shape)
        if shape in fits:
            assert noise.perturb(h).shape == h.shape
            continue
        with pytest.raises(SiteError) as caught:
            noise.perturb(h)
        assert str(caught.value).startswith(
            f"site 'here' has features of shape {shape} but its {granularity}-wise noise was made for (3, 4, 5); feed "
        )


# --- scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_spread_is_unbiased_and_at_least_float32(dtype):
    values = torch.tensor([1.0, 3.0, 5.0], dtype=dtype, requires_grad=True)
    found = spread(values)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == 2.0
    assert not found.requires_grad
    assert spread(values[:2]).item() == pytest.approx(2**0.5)
    assert spread(values[:1]).item() == 0.0


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_what_is_learned_and_how_its_paper_calls_it(learned, relative):
    noise = made(learned=learned, relative=relative, granularity="layer", minimum=0.0)
    assert noise.noise_parameters() == ([noise.theta] if learned else [])
    assert noise.theta.requires_grad is learned
    with torch.no_grad():
        noise.theta.fill_(-0.5)
    name, scale = noise.scale()
    assert (name, scale.item()) == (("alpha", 0.5) if relative else ("theta", -0.5))


def test_the_first_values_of_theta_are_bounded():
    assert made(init=0.0, minimum=0.0).init == 0
    assert made(init=0.01, minimum=0.01).minimum == 0.01
    assert made(init=1, minimum=0).theta.dtype == torch.float32
    for arguments in ({"minimum": -1e-9}, {"init": 0.0099}, {"init": float("inf")}, {"init": float("nan")}):
        with pytest.raises(ConfigError, match=r"theta init is .* and minimum is .*; allowed: 0 <= minimum <= init"):
            made(**arguments)
    for name, value in itertools.product(("init", "minimum"), (True, "0.1", None)):
        with pytest.raises(ConfigError, match=f"theta {name} is .*; it must be a number, such as 0.25"):
            made(**{name: value})
    for name in ("granularity", "sharing"):
        with pytest.raises(ConfigError, match=f"{name} is 'other'; allowed: "):
            made(**{name: "other"})


# --- replay


def test_replayed_rows_are_drawn_once_and_kept_while_the_seed_is(monkeypatch):
    drawn, draw = [], base.draw_seeded
    monkeypatch.setattr(
        base, "draw_seeded", lambda name, shape, seed: (drawn.append(shape), draw(name, shape, seed))[1]
    )
    noise = made(granularity="layer")
    noise.replay = 1
    rows = {count: noise.draw(torch.zeros(count, *SHAPE)) for count in (2, 5, 3)}
    assert drawn == [SHAPE] * 5  # two, three more, none
    assert torch.equal(rows[5][:2], rows[2])
    assert torch.equal(rows[5][:3], rows[3])
    assert rows[3].shape == (3, *SHAPE)
    noise.draw(torch.zeros(3, 1, 2, 2))
    assert drawn[5:] == [(1, 2, 2)] * 3  # of another shape: all anew
    noise.replay = 2
    assert not torch.equal(noise.draw(torch.zeros(2, *SHAPE)), rows[2])
    noise.forget()
    noise.draw(torch.zeros(2, *SHAPE))
    assert len(drawn) == 12


@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
def test_a_draw_has_a_row_for_each_example_or_one_for_all(sharing):
    noise = made(sharing=sharing)
    rows = 6 if sharing == "per_example" else 1
    for replay in (None, 3):
        noise.replay = replay
        assert noise.draw(torch.zeros(6, *SHAPE)).shape == (rows, *SHAPE)
    assert len(noise.perturb(torch.zeros(6, *SHAPE)).unique(dim=0)) == rows


# --- the way of a pass


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("works", [False, True])
@pytest.mark.parametrize("replay", [None, 4])
@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
@pytest.mark.parametrize("fast", [False, True])
def test_which_way_a_pass_goes(inline, fuse, works, replay, sharing, fast, monkeypatch):
    """Compiled where it can be, but for replayed draws, which are ours; and shared ones need no fused draw."""
    ways = {
        "inlined": torch.full((2, *SHAPE), 1.0), "fused": torch.full((2, *SHAPE), 2.0) if works else None,
        "shared": torch.full((2, *SHAPE), 3.0),
    }  # fmt: skip
    monkeypatch.setattr(fused, "can_inline", lambda h: inline)
    monkeypatch.setattr(fused, "can_fuse", lambda h: fuse)
    monkeypatch.setattr(fused, "add_noise_inlined", lambda h, scale, name, *, shared: ways["inlined"])
    monkeypatch.setattr(fused, "add_noise", lambda h, scale, name: ways["fused"])
    monkeypatch.setattr(fused, "add_shared_noise", lambda h, scale, eps: ways["shared"])
    noise, h = made(sharing=sharing, init=0.5), torch.full((2, *SHAPE), 100.0)
    noise.replay = replay
    shared = sharing == "per_batch"
    with execution.running(execution.ExecutionMode("test", fused_noise=fast)):
        found = noise.perturb(h)
    if inline and replay is None:
        wanted = ways["inlined"]
    elif fuse and fast and not shared and replay is None and works:
        wanted = ways["fused"]
    elif shared and fast:
        wanted = ways["shared"]
    else:
        assert 95 < found.min() < 100 < found.max() < 105
        return
    assert torch.equal(found, wanted)


def test_a_layout_is_channels_last_only_where_it_is_no_other():
    images = torch.zeros(2, 3, 4, 5)
    assert not is_channels_last(images)
    assert is_channels_last(images.to(memory_format=torch.channels_last))
    assert not is_channels_last(torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last))  # both at once
    assert not is_channels_last(images[:, :, ::2].permute(0, 1, 3, 2))  # neither
    assert not is_channels_last(torch.zeros(4, 5).T)


def test_a_hook_is_dropped_by_identity_and_others_stay():
    layer, seen = nn.Identity(), []

    def one(*_):
        seen.append("one")

    def other(*_):
        seen.append("other")

    for hook in (one, other, one):
        layer.register_forward_hook(hook)
    drop_hook(layer._forward_hooks, one)
    layer(torch.zeros(1))
    assert seen == ["other"]


@pytest.mark.parametrize("place", ["output", "input"])
def test_noise_that_is_off_hands_features_on(place):
    noise, h = made(place=place), torch.rand(2, *SHAPE)
    assert noise(h) is h  # as a layer it is the identity
    noise.enabled = False
    assert noise.perturb(h) is h
    assert noise.spec()["enabled"] is False
    assert (
        Perturbation.from_spec({k: v for k, v in noise.spec().items() if k not in ("kind", "enabled")}).place == place
    )


@pytest.mark.parametrize(("sharing", "all_alike"), [("per_example", False), ("per_batch", True)])
def test_draws_for_a_whole_batch_are_those_of_every_process(sharing, all_alike, monkeypatch):
    asked = []
    monkeypatch.setattr(base, "shared_by_all", lambda shared: (asked.append(shared), contextlib.nullcontext())[1])
    made(sharing=sharing, init=0.5).draw(torch.zeros(2, *SHAPE))
    perturb_weights(network := nn.Sequential(nn.Linear(3, 2)))
    noise_modules(network)[0].draw(torch.zeros(2, 3))
    assert asked == [all_alike, True]  # a weight is one for all


@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
def test_maps_for_a_whole_batch_alone_are_scaled_once_for_all(sharing, monkeypatch):
    asked = []
    real = fused.add_shared_noise
    monkeypatch.setattr(fused, "add_shared_noise", lambda *given: (asked.append(given[2].shape[0]), real(*given))[1])
    noise, value = made(sharing=sharing, init=0.5), torch.rand(2, *SHAPE)
    eps = torch.randn(1 if sharing == "per_batch" else 2, *SHAPE)
    with execution.running(dataclasses.replace(execution.PLAIN, fused_noise=True)):
        torch.testing.assert_close(noise.noisy(value, eps), value + 0.5 * eps)
    assert asked == ([1] if sharing == "per_batch" else [])


def test_the_spread_of_a_weight_is_its_own_whoever_shares_the_batch(monkeypatch):
    monkeypatch.setattr(rows, "deviation", lambda values: values.std() + 1)
    weight = torch.randn(4, 5)
    assert spread(weight).item() == pytest.approx(weight.std().item())
    assert spread(weight, of_rows=True).item() == pytest.approx(weight.std().item() + 1)
    assert spread(weight[:1, :1]).item() == 0
