"""WCA, RPF, RNA and CTRW: one step of training against a transcription of each, with the same draws.

All train on adversarial examples alone (PGD, one draw held through its steps), here in two steps of the attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.noise import RandomNorm
from learn2perturb.training.alternating import iterate
from learn2perturb.training.config import TrainConfig
from tests.defenses.parity.draws import recorded

EPS, STEP, LR, DECAY = 0.1, 0.06, 0.05, 1e-3
Weights = dict[str, Tensor]
SHAPE = (2, 5, 5)


def convolutional(norm: bool = False) -> nn.Module:
    """A convolution of 8 filters, perhaps a norm, and a classifier."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(8)] if norm else []
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(200, 3))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3))


def head(w: Weights, h: Tensor, layer: str) -> Tensor:
    return torch.tanh(h).flatten(1) @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]


def wca_logits(w: Weights, x: Tensor, eps: Tensor, train: bool) -> Tensor:
    h = torch.tanh(x.flatten(1) @ w["1.weight"].T + w["1.bias"])
    noisy = h + torch.stack([w["3.perturbation.factor"] @ one for one in eps])  # z = h + L eps
    return noisy @ w["3.weight"].T + w["3.bias"]


def wca_term(w: Weights) -> Tensor:
    classes = [row @ w["3.perturbation.factor"] for row in w["3.weight"]]
    return -torch.stack([one @ one for one in classes]).sum().log()  # -log tr(W L L^T W^T)


def rpf_logits(w: Weights, x: Tensor, eps: Tensor, train: bool) -> Tensor:
    learned = [one / (one.std() + 1e-5) / 3 for one in w["0.parametrizations.weight.original"][:2]]
    filters = torch.stack([*learned, *(eps[2:] / 3)])  # 6 of 8 are N(0, 1 / k^2)
    return head(w, F.conv2d(x, filters, padding=1), "3")


def ctrw_logits(w: Weights, x: Tensor, eps: Tensor, train: bool) -> Tensor:
    weighted = x * (w["0.perturbation.mu"] + w["0.perturbation.sigma"] * eps)
    return head(w, F.conv2d(weighted, w["0.weight"], padding=1), "3")


def rna_logits(w: Weights, x: Tensor, pick: Tensor, train: bool) -> Tensor:
    h = F.conv2d(x, w["0.weight"], padding=1)
    if int(pick) == 0:
        mean, var = (h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)) if train else (torch.zeros(8), torch.ones(8))
        mean, var, name = mean.view(1, -1, 1, 1), var.view(1, -1, 1, 1), "1"
    else:  # a group is a channel
        mean, var = h.mean((2, 3), keepdim=True), h.var((2, 3), correction=0, keepdim=True)
        name = "1.perturbation.norms.0"
    h = (h - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)
    return head(w, h, "4")


def sgd(decays: dict[str, float]) -> Callable[[str, Tensor, Tensor], Tensor]:
    """The first step of SGD with momentum, without Nesterov."""
    return lambda name, value, slope: value - LR * (slope + decays.get(name, DECAY) * value)


def adam(name: str, value: Tensor, slope: Tensor) -> Tensor:
    """The first step of Adam, with decay on classifier and noise; L stays lower triangular."""
    slope = slope + (DECAY if name.startswith("3.") else 0.0) * value
    stepped = value - LR * slope / (slope.abs() + 1e-8)
    return stepped.tril() if name.endswith("factor") else stepped


@dataclass(frozen=True)
class Case:
    defense: str
    network: Callable[[], nn.Module]
    logits: Callable[[Weights, Tensor, Tensor, bool], Tensor]
    update: Callable[[str, Tensor, Tensor], Tensor]
    term: Callable[[Weights], Tensor] | None = None
    picks: Sequence[int] = ()


CASES = {
    "wca_at": Case("wca_at", dense, wca_logits, adam, wca_term),
    "rpf": Case("rpf", convolutional, rpf_logits, sgd({"0.parametrizations.weight.original": 1e-2})),
    "ctrw": Case("ctrw", convolutional, ctrw_logits, sgd({})),
    "rna, the BatchNorm": Case("rna", lambda: convolutional(True), rna_logits, sgd({}), picks=(1, 0)),
    "rna, the GroupNorm": Case("rna", lambda: convolutional(True), rna_logits, sgd({}), picks=(0, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_equals_a_transcription(case, monkeypatch):
    settings = TrainConfig(
        defense=case.defense, recipe="paper", epochs=2, schedule="constant", lr=LR, weight_decay=DECAY, eps=EPS,
        attack_steps=2, attack_step_size=STEP, attack_random_start=False, attack_draws="held",
    ).resolve()  # fmt: skip
    defense = build_defense(case.defense, settings.options)
    model = defense.prepare(case.network(), SHAPE).double().train()
    w = {name: value.detach().clone() for name, value in model.named_parameters()}
    x, y = torch.rand(5, *SHAPE, dtype=torch.float64), torch.arange(5) % 3
    if case.picks:
        attack, trained = (torch.tensor([pick]) for pick in case.picks)
        picks = iter([attack, attack, trained])
        monkeypatch.setattr(RandomNorm, "_pick", lambda self, value: next(picks))
    else:
        made = recorded(monkeypatch)
    (stage,) = defense.stages(settings)
    losses = iterate(
        defense, model, Clock(0, 0, 4), stage.optimizers(model),
        lambda: defense.loss(model, x, y, Clock(0, 0, 4), settings), lambda losses: None,
    ).losses  # fmt: skip
    if not case.picks:
        attack, again, trained = (one.double() for one in made)
        assert torch.equal(attack, again) and not torch.equal(attack, trained)  # held, then anew
    x_adv = x
    for _ in range(2):
        leaf = x_adv.clone().requires_grad_()
        loss = F.cross_entropy(case.logits(w, leaf, attack, False), y)
        (g,) = torch.autograd.grad(loss, leaf)
        x_adv = torch.minimum(torch.maximum(x_adv + STEP * g.sign(), x - EPS), x + EPS).clamp(0, 1)
    leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    total = F.cross_entropy(case.logits(leaves, x_adv, trained, True), y)
    assert losses.adversarial.item() == pytest.approx(total.item(), rel=1e-9)
    total = total if case.term is None else total + case.term(leaves)
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-9)
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, value), slope in zip(w.items(), slopes, strict=True):
        expected = case.update(name, value, torch.zeros_like(value) if slope is None else slope)
        assert torch.allclose(model.get_parameter(name), expected, rtol=1e-6, atol=1e-9), name
