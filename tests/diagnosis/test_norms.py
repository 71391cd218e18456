"""A diagnosis follows the norm and the radius that are asked for, in every check."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks.balls import BALLS
from learn2perturb.cli.figures import diagnosis_figures
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import QUICK, Diagnosis, budget, diagnose
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.result import format_eps
from learn2perturb.sizes import sweep, whole_box

PIXELS = 16
EPS = {"linf": 0.6, "l2": 0.5}  # the one above all radii that were once swept, the other below one that is
FEW = dataclasses.replace(
    QUICK, name="quick", images=24, some=24, steps=8, unbounded_steps=20, samples=10, judge_draws=2, step_curve=(4, 8),
    restarts=1, square_queries=20, real_queries=20, descent_steps=2, descent_directions=2,
    surrogate_queries=48,
)  # fmt: skip


def linear(x: Tensor) -> Tensor:
    """Bright on the left or on the right."""
    halves = x.flatten(2).mean(dim=1).view(len(x), 4, 4)
    return 8 * torch.stack([halves[:, :, :2].mean(dim=(1, 2)), halves[:, :, 2:].mean(dim=(1, 2))], dim=1)


def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 2
    y = torch.arange(24) % 2
    x[y == 0, :, :, :2] += 0.4
    x[y == 1, :, :, 2:] += 0.4
    return x, y


@pytest.fixture(scope="module", params=BALLS)
def found(request) -> Diagnosis:
    norm = request.param
    return diagnose(linear, images(), budget=FEW, norm=norm, eps=EPS[norm], engine="plain")


def test_every_attack_of_a_diagnosis_has_its_norm(found):
    sizes = {one.name: one.parameters for one in found.measurements if "eps" in one.parameters}
    assert {parameters["norm"] for parameters in sizes.values()} == {found.norm}
    ours = {name: one["eps"] for name, one in sizes.items() if not name.startswith(("eps ", "unbounded"))}
    assert {"reported", "square", "one step (FGSM)", "8 steps", "loss margin"} <= ours.keys()
    assert set(ours.values()) == {EPS[found.norm]}
    assert sizes["unbounded"]["eps"] == whole_box(found.norm, PIXELS) == {"linf": 1.0, "l2": 4.0}[found.norm]
    for one in sizes.values():  # steps follow the radius: none stands still, none leaves its ball
        assert one.get("step_size", one["eps"]) == pytest.approx(one["eps"] / one.get("steps", 1), rel=10)
        assert one.get("step_size", 0) <= one["eps"]


def test_the_curve_over_eps_goes_beyond_the_radius_that_is_diagnosed(found):
    (curve,) = (one for one in found.curves if one.axis == "eps")
    at = [point.at for point in curve.points]
    assert at == pytest.approx([0.0, *sweep(found.norm, EPS[found.norm], PIXELS)])
    assert at[-1] > EPS[found.norm] in at
    assert found.check(5).status == found.check(3).status == "passed", str(found)
    assert found.budget["eps_grid"] == at[1:]


def test_the_verdict_and_the_figure_name_the_norm(found, tmp_path, monkeypatch):
    assert f"{found.norm} {format_eps(EPS[found.norm])}" in str(found)
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", lambda _, label, **__: labels.append(label))
    assert len(diagnosis_figures(found, tmp_path)) == len(found.curves)
    assert any("255ths" in label for label in labels) == (found.norm == "linf")
    assert any(label.startswith("l2 eps") for label in labels) == (found.norm == "l2")


class Rounded(nn.Module):
    """Its gradients are zero."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(torch.round(8 * x) / 8)


@pytest.mark.parametrize(
    "norm", [pytest.param(norm, marks=[pytest.mark.slow] if norm == "l2" else []) for norm in BALLS]
)
def test_masked_gradients_fail_in_every_norm(norm):
    found = diagnose(Rounded().eval(), images(), budget=FEW, norm=norm, eps=EPS[norm], engine="plain")
    assert {one.number for one in found.checks if one.status == "failed"} >= {3, 5}


def test_a_radius_in_other_units_is_refused():
    with pytest.raises(ConfigError, match="eps is 128 and the whole range of these images has l2 radius 4"):
        diagnose(linear, images(), budget=FEW, norm="l2", eps=128.0, engine="plain")


def test_the_command_line_takes_a_norm(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(budget.BUDGETS, "quick", dataclasses.replace(FEW, images=10, some=10))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_norms.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()\n"
    )
    words = ["diagnose", "mine_of_norms:net", "--dataset", "digits", "--device", "cpu", "--json", "--norm", "l2"]
    assert main([*words, "--eps", "0.5"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["norm"], said["eps"]) == ("l2", 0.5)
    assert said["curves"]["eps"][-1][0] == 4.0
    assert main(words) == 2
    assert "8/255 is an l_inf radius, so give one of this norm: eps=0.5" in capsys.readouterr().err
