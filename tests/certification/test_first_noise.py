"""The constant of the first noise against brute force, to the last digit that counts, and each refusal at its edge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb.certification import first_noise as rules
from learn2perturb.certification.first_noise import check_draws, check_first_noise, first_noise
from learn2perturb.errors import NoiseError
from learn2perturb.noise import noise_modules, perturb

SHAPE = (1, 9, 9)  # 81 basis images: more than one pass of them, the last one not full
ROUNDED_UP = 1 + 1e-9  # a constant may only be too large


class Net(nn.Module):
    """A convolution, a norm, and a head; ``between`` comes after the norm, ``around`` reaches the logits."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.late = nn.Identity()
        self.out = nn.Linear(162, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        if self.between is not None:
            h = self.between(h, x)
        return self.out(torch.relu(self.late(h)).flatten(1))


def network(between: Callable[[Tensor, Tensor], Tensor] | None = None, site: str = "norm") -> nn.Module:
    torch.manual_seed(0)
    net = Net(between)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.weight.data.uniform_(-2, 2)
    net = perturb(net.eval(), input_shape=SHAPE, sites=site, init=0.5).eval()
    for module in noise_modules(net):
        module.theta.data.uniform_(0.2, 0.8)
    return net


X = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))


def matrix(net: nn.Module) -> np.ndarray:
    """Return ``diag(theta)^-1 A`` of the features after the norm, by their Jacobian."""
    twin = network().double()
    theta = noise_modules(net)[0].theta.detach().double()

    def before(x: Tensor) -> Tensor:
        h = twin.conv._conv_forward(x.view(1, *SHAPE), twin.conv.weight, twin.conv.bias)
        norm = twin.norm
        h = nn.functional.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return (h / theta).flatten()

    return torch.autograd.functional.jacobian(before, torch.rand(81).double()).numpy()


def test_the_constant_is_the_largest_singular_value_rounded_up():
    net = network()
    found = first_noise(net, X)
    assert (found.site, found.exact) == ("norm", True)
    assert found.constant == pytest.approx(np.linalg.norm(matrix(net), 2) * ROUNDED_UP, rel=1e-10)


def test_the_bound_of_large_images_is_the_root_of_row_and_column_sums_rounded_up(monkeypatch):
    """Of a convolution and a norm the absolute weights give the absolute matrix itself."""
    net = network()
    monkeypatch.setattr(rules, "EXACT_PIXELS", 80)
    found = first_noise(net, X)
    absolute = np.abs(matrix(net))
    expected = np.sqrt(absolute.sum(axis=1).max() * absolute.sum(axis=0).max())
    assert (found.site, found.exact) == ("norm", False)
    assert found.constant == pytest.approx(expected * ROUNDED_UP, rel=1e-10)
    monkeypatch.setattr(rules, "EXACT_PIXELS", 81)
    assert first_noise(net, X).exact  # the limit itself is still exact


@pytest.mark.parametrize("limit", [10, 81])
def test_one_image_is_enough(limit, monkeypatch):
    monkeypatch.setattr(rules, "EXACT_PIXELS", limit)
    assert first_noise(network(), X[:1]) == first_noise(network(), X)


def test_the_limit_is_as_documented():
    assert rules.EXACT_PIXELS == 4096


def test_the_model_is_left_alone_and_the_stream_of_draws_too():
    net = network()
    net.train()
    before = torch.get_rng_state()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    first_noise(net, X)
    assert net.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_large_images_refuse_what_absolute_weights_do_not_bound(monkeypatch):
    monkeypatch.setattr(rules, "EXACT_PIXELS", 10)
    with pytest.raises(NoiseError, match=r"is more than convolutions, .* more than 10 numbers"):
        first_noise(network(lambda h, x: -2 * h, site="late"), X)


def test_large_images_refuse_weights_that_are_computed(monkeypatch):
    monkeypatch.setattr(rules, "EXACT_PIXELS", 10)
    net = network()
    torch.nn.utils.parametrizations.weight_norm(net.conv)
    with pytest.raises(NoiseError, match="the weight of 'conv' is computed by .* make it a parameter first"):
        first_noise(net, X)


@pytest.mark.parametrize(("error", "refused"), [(0.95e-6, False), (1.05e-6, True)])
def test_what_is_affine_up_to_rounding_is_affine(error, refused):
    """Features are 9 at most, and rounding explains 1e-7 of one more than that."""
    calls: list[int] = []

    def between(h: Tensor, x: Tensor) -> Tensor:
        calls.extend([len(x)] * (len(x) == len(X) + 7))  # the chords: two ends, and the point between
        return 9 + 0 * h + (error if len(calls) == 3 else 0)

    net = network(between, site="late")
    if refused:
        with pytest.raises(NoiseError, match=r"at 'late', is not affine in the image \(off by 1e-06\)"):
            check_first_noise(net, X)
    else:
        assert check_first_noise(net, X)[1] == "late"
    assert len(calls) == 3


def test_an_activation_before_the_noise_is_not_affine():
    with pytest.raises(NoiseError, match="at 'late', is not affine in the image"):
        first_noise(network(lambda h, x: torch.relu(h), site="late"), X)


@pytest.mark.parametrize(("factor", "refused"), [(1.0, False), (1 + 1e-6, True), (1.5, True)])
def test_large_images_refuse_more_than_the_absolute_weights_give(factor, refused, monkeypatch):
    class Otherwise(Net):
        """It answers more weakly where all its weights are positive."""

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x) * (1.0 if bool((self.conv.weight >= 0).all()) else factor)
            return self.out(torch.relu(self.late(h)).flatten(1))

    monkeypatch.setattr(rules, "EXACT_PIXELS", 10)
    torch.manual_seed(0)
    net = Otherwise().eval()
    net.conv.bias.data.zero_()
    perturb(net, input_shape=SHAPE, sites="late", init=0.5).eval()
    if refused:
        with pytest.raises(NoiseError, match="S cannot be bounded: what comes before the first noise, at 'late'"):
            first_noise(net, X)
    else:
        assert not first_noise(net, X).exact


@pytest.mark.parametrize(("size", "refused"), [(0.95e-8, False), (1.05e-8, True)])
def test_a_path_around_the_noise_is_seen_where_it_is_more_than_rounding(size, refused):
    """Logits are 9 at most, and rounding explains 1e-9 of one more than that. No gradient shows a path of steps."""

    class Around(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + size * x.flatten(1)[:, :3].round().detach()

    torch.manual_seed(0)
    net = perturb(Around().eval(), input_shape=SHAPE, sites="norm", init=0.5).eval()
    net.out.weight.data.zero_()
    net.out.bias.data.fill_(9.0)
    if refused:
        with pytest.raises(NoiseError, match="goes around the first noise, at 'norm'"):
            check_first_noise(net, X)
    else:
        assert check_first_noise(net, X)[1] == "norm"


def test_a_path_around_the_noise_is_seen_by_its_gradient_however_small():
    class Shortcut(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-30 * x.flatten(1)[:, :3]

    net = perturb(Shortcut().eval(), input_shape=SHAPE, sites="norm", init=0.5).eval()
    with pytest.raises(NoiseError, match="goes around the first noise"):
        first_noise(net, X)


def test_one_noise_for_two_layers_is_refused():
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.norm(self.conv(x))).flatten(1))

    net = perturb(Net().eval(), input_shape=SHAPE, sites="norm", init=0.5).eval()
    net.__class__ = Twice
    with pytest.raises(NoiseError, match="the noise at 'norm' is applied more than once in a pass"):
        first_noise(net, X)


def test_noise_that_no_pass_meets_is_refused():
    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x).flatten(1))

    net = perturb(Net().eval(), input_shape=SHAPE, sites="norm", init=0.5).eval()
    net.__class__ = Unused
    with pytest.raises(NoiseError, match="no noise is met in a pass"):
        first_noise(net, X)


@pytest.mark.parametrize(("zeros", "refused"), [(0, False), (1, True), (5, True)])
def test_scales_that_are_not_above_zero_are_counted(zeros, refused):
    net = network()
    theta = noise_modules(net)[0].theta.data
    theta.view(-1)[:zeros] = 0
    if refused:
        with pytest.raises(NoiseError, match=f"^{zeros} scales of the first noise, at 'norm', are not above 0"):
            first_noise(net, X)
    else:
        theta.view(-1)[0] = 1e-3
        assert first_noise(net, X).constant > 1


def test_the_first_noise_is_the_first_that_a_pass_meets_and_later_ones_are_free():
    torch.manual_seed(0)
    net = perturb(Net().eval(), input_shape=SHAPE, sites=["norm", "late", "conv"], init=0.5).eval()
    twin, site, x = check_first_noise(net, X)
    assert site == "conv"
    assert x.dtype == torch.float64
    assert len(x) == 2
    assert not twin.training
    assert [name for name, _ in check_draws(net, what="it")] == ["conv", "norm", "late"]
    by_name = dict(check_draws(net, what="it"))
    by_name["conv"].enabled = False
    assert first_noise(net, X).site == "norm"
    assert [name for name, _ in check_draws(net, what="it")] == ["norm", "late"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sharing": "per_batch"}, r"the noise at 'norm' is shared \(per_batch\)"),
        ({"relative": True}, "the noise at 'norm' is relative to the features of the batch"),
    ],
)
def test_draws_that_are_not_independent_are_refused(settings, reason):
    net = perturb(Net().eval(), input_shape=SHAPE, sites="norm", init=0.5, **settings).eval()
    with pytest.raises(NoiseError, match=f"this certificate does not hold for this model: {reason}"):
        check_draws(net, what="this certificate")


def test_a_function_has_no_noise_of_this_package():
    assert check_draws(lambda x: x, what="it") == []
