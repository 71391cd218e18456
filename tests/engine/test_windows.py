"""Images that differ in a window: the answers of the whole batch, from no more than the window reaches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.engine import execution, windows
from learn2perturb.engine.windows import Windowed
from learn2perturb.models import build_model
from learn2perturb.models.blocks import PadShortcut
from tests.engine.test_folding import lived_in
from tests.problems import as_if_on

EXAMPLES, BASES = 12, 3
WINDOWED = dataclasses.replace(execution.PLAIN, windows=True)


def pair(channels: int = 3, size: int = 20, window: tuple[int, int] = (1, 1)) -> tuple[Windowed, Tensor]:
    """Return a batch in windows, some of them at the border, and the same batch whole."""
    base = torch.rand(BASES, channels, size, size, dtype=torch.float64)
    owner = torch.arange(BASES).repeat_interleave(EXAMPLES // BASES)
    top, left = (torch.randint(size - extent + 1, (EXAMPLES,)) for extent in window)
    top[0], left[1] = 0, size - window[1]
    values = torch.rand(EXAMPLES, channels, *window, dtype=torch.float64)
    whole = base[owner].clone()
    for example, (first, second) in enumerate(zip(top, left, strict=True)):
        whole[example, :, first : first + window[0], second : second + window[1]] = values[example]
    return Windowed(base, owner, top, left, values), whole


def parts_of(x: Windowed) -> tuple[Tensor, ...]:
    return x._parts.base, x._parts.owner, x._parts.top, x._parts.left, x._parts.values


def is_in_windows(x: Tensor) -> bool:
    return isinstance(x, Windowed) and x._parts is not None


def same(x: Tensor, whole: Tensor) -> None:
    """Check shape and values."""
    assert x.shape == whole.shape
    assert x.dtype == whole.dtype
    torch.testing.assert_close(x.whole() if isinstance(x, Windowed) else x, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3)])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("window", [(1, 1), (3, 2)])
def test_a_convolution_of_windows_is_that_of_the_whole_batch(window, kernel, stride, padding, dilation, groups):
    x, whole = pair(4, window=window)
    weight, bias = torch.rand(6, 4 // groups, *kernel, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    found = F.conv2d(x, weight, bias, **settings)
    assert is_in_windows(found)
    same(found, F.conv2d(whole, weight, bias, **settings))


norm = (torch.rand(3, dtype=torch.float64), 1 + torch.rand(3, dtype=torch.float64))
KEPT = {
    "relu": F.relu,
    "normalised": lambda x: (x - norm[0].view(1, 3, 1, 1)) / norm[1].view(3, 1, 1),
    "batch norm": lambda x: F.batch_norm(x, *norm),
    "every second": lambda x: x[:, :, ::2, ::2],
    "shortcut": PadShortcut(2, 3),
    "more channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 2), value=1.0),
    "block": lambda x: F.conv2d(F.relu(x), torch.ones(3, 3, 3, 3, dtype=x.dtype), padding=1) - x,
    "block, other order": lambda x: x - F.conv2d(x, torch.ones(3, 3, 3, 3, dtype=x.dtype), padding=1),
    "sum with itself": lambda x: x + x,
    "in place": lambda x: F.relu(x.clone().sub_(0.5), inplace=True).mul_(2),
    "in float32": lambda x: x.to(torch.float32),
}


@pytest.mark.parametrize("name", KEPT)
def test_layers_that_are_known_keep_to_the_windows(name):
    x, whole = pair()
    found = KEPT[name](x)
    assert is_in_windows(found)
    same(found, KEPT[name](whole))


WHOLE = {
    "another law of a place": lambda x: x + torch.linspace(0, 1, 20, dtype=x.dtype),
    "a number an example": lambda x: x * torch.arange(EXAMPLES, dtype=x.dtype).view(-1, 1, 1, 1),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "every second example": lambda x: x[::2, :, ::2, ::2],
    "a part": lambda x: x[:, :, 2:, 1:],
    "another padding": lambda x: F.pad(x, (1, 0, 0, 0, 0, 0)),
    "a kernel that spans all": lambda x: F.conv2d(x, torch.ones(1, 3, 19, 19, dtype=x.dtype), padding=9),
    "same": lambda x: F.conv2d(x, torch.ones(1, 3, 3, 3, dtype=x.dtype), padding="same"),
    "transposed": lambda x: x.transpose(2, 3),
    "pooled": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "joined": lambda x: torch.cat([x, x.square()], dim=1),
    "bounded by tensors": lambda x: torch.clamp(x, torch.full((20,), 0.4, dtype=x.dtype)),
    "in another type, in place": lambda x: x.float().add_(x),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_other_function_is_given_the_whole_batch(name):
    x, whole = pair()
    found = WHOLE[name](x)
    assert not is_in_windows(found)
    same(found, WHOLE[name](whole))


def test_what_works_in_place_on_the_whole_batch_is_seen_later():
    x, whole = pair()
    x[:, 0] = 0.25
    whole[:, 0] = 0.25
    same(F.relu(x), F.relu(whole))
    base = torch.rand(1, 3, 8, 8)
    before = base.clone()
    one = Windowed(
        base, torch.zeros(2, dtype=torch.int64), torch.tensor([1, 2]), torch.tensor([0, 7]), torch.rand(2, 3, 1, 1)
    )
    one.relu_().mul_(0)
    assert torch.equal(base, before)
    assert not one.whole().any()


@pytest.mark.parametrize("moved", [0, 3])
def test_the_sum_of_two_windows_is_kept_where_one_holds_the_other(moved):
    x, _ = pair()
    parts = x._parts
    top, left = (((place + moved) % 20 - 1).clamp(0, 17) for place in (parts.top, parts.left))
    other = Windowed(parts.base, parts.owner, top, left, torch.rand(EXAMPLES, 3, 3, 3, dtype=torch.float64))
    expected = parts.whole() + other._parts.whole()
    found = x + other
    assert is_in_windows(found) == (moved == 0)
    same(found, expected)


def test_windows_on_other_bases_are_not_added():
    x, whole = pair()
    parts = x._parts
    other = Windowed(parts.base, parts.owner.flip(0), parts.top, parts.left, parts.values)
    expected = whole + other._parts.whole()
    found = x + other
    assert not is_in_windows(found)
    same(found, expected)


class Residual(nn.Module):
    """As many write it: activations in place, and the shortcut added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.kept = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out += self.shortcut(x)
        self.kept = is_in_windows(out)
        return F.relu(out).mean(dim=(2, 3))


def test_a_network_answers_as_to_the_whole_batch():
    x, whole = pair(size=32)
    for network in (build_model("resnet20"), Residual()):
        network = lived_in(network).double()
        with torch.no_grad():
            torch.testing.assert_close(network(x), network(whole), rtol=1e-9, atol=1e-9)
        x, whole = pair(size=32)


def test_layers_in_place_keep_to_the_windows():
    network = lived_in(Residual()).double()
    with torch.no_grad():
        network(pair()[0])
    assert network.kept


def test_a_layer_computes_no_more_than_the_windows_reach():
    """The first stage of ResNet-20 at 32 x 32: windows of 3 to 15, beside the bases."""
    network = lived_in(build_model("resnet20"))
    sizes = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(tuple(output._parts.values.shape[2:]) if is_in_windows(output) else None)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    x, _ = pair(size=32)
    with torch.no_grad():
        network.double()(x)
    assert sizes == [*((size, size) for size in (3, 5, 7, 9, 11, 13, 15, 9, 11)), *[None] * 10]


@pytest.mark.parametrize("of", ["base", "values"])
def test_windows_may_begin_anywhere_in_memory(of):
    """Runs are copied 16 bytes at a time, which a view by type of an odd place in memory cannot be."""
    x, whole = pair(channels=4)
    parts = dict(zip(("base", "owner", "top", "left", "values"), parts_of(x), strict=True))
    dense = parts[of].permute(0, 2, 3, 1)
    moved = torch.empty(dense.numel() + 1, dtype=dense.dtype)[1:].view(dense.shape).copy_(dense)
    with torch.no_grad():
        same(Windowed(**{**parts, of: moved.permute(0, 3, 1, 2)}).whole(), whole)


def test_gradients_pass_through_windows():
    x, whole = pair(channels=2)
    base, owner, top, left, values = parts_of(x)
    base.requires_grad_()
    values.requires_grad_()
    whole.requires_grad_()
    layer = nn.Conv2d(2, 2, 3, padding=1).double()
    weights = torch.rand(EXAMPLES, 2, 20, 20, dtype=torch.float64)
    wanted = torch.autograd.grad((layer(whole) * weights).sum(), whole)[0]
    (layer(Windowed(base, owner, top, left, values)).whole() * weights).sum().backward()
    mask = torch.zeros_like(wanted)
    for example, (first, second) in enumerate(zip(top, left, strict=True)):
        mask[example, :, first, second] = 1
    torch.testing.assert_close(values.grad, (wanted * mask).sum(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(base.grad, (wanted * (1 - mask)).view(BASES, -1, *base.shape[1:]).sum(dim=1))


def test_windows_serve_networks_in_modes_that_ask_for_them():
    network = build_model("digits_cnn")
    compiled = nn.Module()
    compiled._orig_mod = network  # as torch.compile leaves it
    assert not windows.serve(network)
    with execution.running(WINDOWED):
        assert windows.serve(network)
        assert not windows.serve(network.forward)
        assert not windows.serve(compiled)
    assert execution.FAST.windows
    assert execution.FAST32.windows
    assert not execution.CUDA.windows


def test_so_many_examples_fill_a_pass():
    """64 of 32 x 32 on a CPU, eight times as many in windows; 8,192 elsewhere; one at least."""
    x = torch.zeros(2, 3, 32, 32)
    assert windows.rows_at_once(x) == 64
    assert windows.rows_at_once(x, in_windows=True) == 512
    assert windows.rows_at_once(as_if_on("cuda", x)) == 8192
    assert windows.rows_at_once(torch.zeros(1, 1, 300, 300)) == 1
    assert windows.COMPARED == 8


@pytest.mark.parametrize("gap", [0.0, 5e-5, 1e-3])
def test_answers_agree_but_for_rounding(gap):
    x, whole = pair()

    def answer(x: Tensor) -> Tensor:
        return torch.stack([x.sum(dim=(1, 2, 3)) * 0, x.sum(dim=(1, 2, 3)) * 0 + gap * isinstance(x, Windowed)], dim=1)

    assert windows.agree(answer, whole, x) == (gap < 1e-4)


def test_a_model_that_windows_break_is_no_error():
    x, whole = pair()

    def picky(x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise TypeError("tensors only")
        return x.sum(dim=(2, 3))

    assert not windows.agree(picky, whole, x)
