"""``diagnose(bpda=...)``: the gradient of chosen submodules replaced in an attack of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.diagnosis import QUICK, diagnose
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import ConfigError

N, EPS, NAME = 24, 0.2, "BPDA through pre"
BUDGET = dataclasses.replace(
    QUICK, name="few", images=N, some=12, scorings=2, eot=2, sweep_eot=1, steps=8, unbounded_steps=3, samples=4,
    judge_draws=2, eps_grid=(EPS,), draw_curve=(1, 4), step_curve=(2, 4), restarts=2, square_queries=5, square_draws=2,
    slope_images=2, slope_repeats=12, real_queries=10, descent_steps=2, descent_directions=2, surrogate_queries=24,
)  # fmt: skip


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * 15) / 15


class Quiet(Rounded):
    """The same without any gradient, as of another library."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Drawn(Rounded):
    """Rounded after a draw of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.05 * torch.randn_like(x))


class Behind(nn.Module):
    def __init__(self, pre: nn.Module) -> None:
        super().__init__()
        self.pre = pre
        with isolated_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.pre(x))


X = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    Y = Behind(nn.Identity())(X).argmax(dim=1)
    for _label in range(3):
        Y[_label] = _label


@pytest.mark.parametrize("pre", [Rounded(), Quiet(), Drawn()], ids=lambda pre: type(pre).__name__)
def test_rounding_falls_to_the_identitys_gradient(pre):
    model = Behind(pre).eval()
    found = diagnose(model, (X, Y), bpda="pre", budget=BUDGET, eps=EPS, engine="plain", progress=False)
    broken = found.measurement(NAME)
    assert broken.attack == "BPDA"
    assert broken.parameters["modules"] == "pre"
    assert broken.accuracy < found.measurement("reported").accuracy - 0.3
    assert found.check(2).evidence[NAME] == broken.accuracy
    assert found.measurement(found.lowest).accuracy <= broken.accuracy
    assert found.metadata["config"]["bpda"] == "pre"
    if not isinstance(pre, Quiet):  # of a model without gradients no gradients are said to be worth anything
        assert "BPDA" in found.check(2).sentence
        assert found.check(2).status == "failed"
    assert not any(list(module._forward_hooks) for module in model.modules())


def test_without_it_nothing_is_replaced():
    found = diagnose(Behind(Rounded()).eval(), (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    assert not any("BPDA" in one.name for one in found.measurements)


@pytest.mark.parametrize(
    ("model", "modules", "said"),
    [
        (Behind(Rounded()), "quantise", "no submodule 'quantise'; it has: pre, network"),
        (Behind(Rounded()), " ", "must be globs of names"),
        (Behind(Rounded()), 3, "must be globs of names"),
        (lambda x: Behind(Rounded())(x), "pre", "must be a module"),
    ],
)
def test_what_names_no_submodule_is_refused_before_any_work(model, modules, said):
    with pytest.raises(ConfigError, match=said):
        diagnose(model, "no data are read", bpda=modules, progress=False)
