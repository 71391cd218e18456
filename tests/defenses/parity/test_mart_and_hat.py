"""MART and HAT: three steps of training against a transcription of each; and the helper, beside the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.defenses.mart import margin_loss
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.models import build_model
from learn2perturb.runs import load
from learn2perturb.runs.checkpoint import read_resume
from learn2perturb.runs.files import checkpoints
from learn2perturb.training import TrainConfig, train
from tests.defenses.test_trades import EPS, STEP, STEPS, ByHand, check_equal, network, real_steps, settings

NORMS = ("linf", "l2")


def onto_ball(x_adv: torch.Tensor, x: torch.Tensor, norm: str) -> torch.Tensor:
    r = x_adv - x
    if norm == "linf":
        return (x + r.clamp(-EPS, EPS)).clamp(0, 1)
    length = r.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + r * (EPS / length).clamp(max=1)).clamp(0, 1)


def step_along(g: torch.Tensor, norm: str) -> torch.Tensor:
    return g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def climbed(start, x, norm, loss):
    """Return the last iterate of projected gradient ascent on ``loss``."""
    x_adv = start
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = onto_ball(x_adv.detach() + STEP * step_along(g, norm), x, norm)
    return x_adv


def mart(by_hand: ByHand, v, x_adv):
    """Table 1 of the paper: BCE(p(x'), y) + lambda KL(p(x) || p(x')) (1 - p_y(x))."""
    p, q = (by_hand.logits(v, image).softmax(1) for image in (by_hand.x, x_adv))
    own = F.one_hot(by_hand.y, 3).bool()
    bce = -q[own].log() - (1 - q.masked_fill(own, 0).amax(1)).log()
    kl = (p * (p / q).log()).sum(1)
    return (bce + 5 * kl * (1 - p[own])).mean()


@pytest.mark.parametrize("norm", NORMS)
def test_three_steps_of_mart_equal_the_paper_by_hand(norm):
    model = real_steps(settings(defense="mart", norm=norm, attack_random_start=False))
    by_hand = ByHand(network())
    for number in range(3):
        torch.manual_seed(number)
        loss = lambda z: F.cross_entropy(by_hand.logits(by_hand.v, z, evaluating=True), by_hand.y)  # noqa: E731
        x_adv = climbed(by_hand.x, by_hand.x, norm, loss)
        by_hand.step(by_hand.gradients(by_hand.v, lambda v, x_adv=x_adv: mart(by_hand, v, x_adv)))
    check_equal(model, by_hand)


@pytest.mark.parametrize("norm", NORMS)
def test_three_steps_of_hat_equal_the_paper_by_hand(norm):
    model = real_steps(settings(defense="hat", norm=norm))
    by_hand, helper = ByHand(network()), ByHand(network())
    for number in range(3):
        torch.manual_seed(number)
        p = by_hand.logits(by_hand.v, by_hand.x, evaluating=True).softmax(1)

        def divergence(z, p=p):
            q = by_hand.logits(by_hand.v, z, evaluating=True).log_softmax(1)
            return (p * (p.log() - q)).sum()

        x_adv = climbed(by_hand.x + 0.001 * torch.randn_like(by_hand.x), by_hand.x, norm, divergence)
        labels = helper.logits(helper.v, x_adv, evaluating=True).argmax(1)

        def objective(v, x_adv=x_adv, labels=labels):
            z, z_adv = by_hand.logits(v, by_hand.x), by_hand.logits(v, x_adv)
            far = by_hand.logits(v, by_hand.x + 2 * (x_adv - by_hand.x))
            kl = (z.softmax(1) * (z.log_softmax(1) - z_adv.log_softmax(1))).sum(1).mean()
            return F.cross_entropy(z, by_hand.y) + 2.5 * kl + 0.5 * F.cross_entropy(far, labels)

        by_hand.step(by_hand.gradients(by_hand.v, objective))
        helper.step(helper.gradients(helper.v, lambda v: F.cross_entropy(helper.logits(v, helper.x), helper.y)))
    check_equal(model, by_hand)
    check_equal(build_defense("hat").beside(model)["helper"], helper)


def test_the_margin_is_exact_where_one_minus_p_underflows():
    z = torch.tensor([[0.0, 80.0, 1.0], [3.0, 2.0, 1.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0, 1])
    # -log(1 - p_k) for the likeliest wrong k, in float64, as log(sum of all) - log(sum of the others)
    wide = z.detach().double()
    rivals = [1, 1, 2]
    expected = [
        torch.logsumexp(row, 0) - torch.logsumexp(torch.cat([row[:k], row[k + 1 :]]), 0)
        for row, k in zip(wide, rivals, strict=True)
    ]
    found = margin_loss(z, y)
    assert found.tolist() == pytest.approx([value.item() for value in expected], rel=1e-6)
    found.sum().backward()
    assert torch.isfinite(z.grad).all()


# --- the helper


def config(**changes) -> TrainConfig:
    values = {
        "defense": "hat", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 2, "limit": 48,
        "batch_size": 16, "attack_steps": 1, "monitor": 0, "engine": "plain", "device": "cpu", "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def test_a_resumed_hat_ends_as_if_it_had_never_stopped_and_its_network_has_no_helper(tmp_path):
    whole = train(config(), out=tmp_path / "whole", progress=False)
    train(config(epochs=1, schedule="constant"), out=tmp_path / "parts", progress=False)
    parts = train(config(schedule="constant"), out=tmp_path / "parts", progress=False)
    at_once = train(config(schedule="constant"), out=tmp_path / "once", progress=False)
    newest = [read_resume(checkpoints(tmp_path / name)[-1]) for name in ("parts", "once")]
    for key, value in newest[1]["beside"]["helper"].items():
        assert torch.equal(newest[0]["beside"]["helper"][key], value), key
    for key, value in at_once.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[key], value), key
    plain = set(build_model("digits_cnn", input_shape=(1, 8, 8)).state_dict())
    assert set(load(tmp_path / "whole").state_dict()) == set(whole.model.state_dict()) == plain


def test_a_helper_of_ones_own_is_asked_and_stays_as_it_is(tmp_path):
    none = train(config(defense="none", epochs=1), out=tmp_path / "none", progress=False)
    file = str(next((tmp_path / "none").rglob("model.safetensors")))
    hat = config(options={"helper": file})
    run = train(hat, out=tmp_path / "hat", progress=False)
    assert "helper_loss" not in run.metrics[0]
    helper = read_resume(checkpoints(tmp_path / "hat")[-1])["beside"]["helper"]
    for key, value in none.model.state_dict().items():
        assert torch.equal(helper[key], value), key
    beside = train(config(), progress=False)
    assert beside.metrics[0]["helper_loss"] > 0
    assert any(not torch.equal(value, run.model.state_dict()[key]) for key, value in beside.model.state_dict().items())


def test_what_makes_no_sense_is_refused(tmp_path):
    for name in ("mart", "hat"):
        for changes, message in (
            ({"eps": 0.0}, "has no adversary; set eps"),
            ({"objective": "trades"}, "trains on a loss of its own"),
            ({"awp": 0.01}, "loss of its own that takes none"),
            ({"options": {"kl_weight": -1.0}}, "kl_weight is -1.0"),
        ):
            with pytest.raises(ConfigError, match=message):
                train(config(defense=name, **changes), out=tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(config(options={"helper": str(tmp_path / "nowhere.pt")}), out=tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="helper is 3"):
        build_defense("hat", {"helper": 3})
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    with pytest.raises(ConfigError, match="the network has no helper"):
        build_defense("hat").loss(network().float(), x, y, Clock(0, 0, 1), settings(defense="hat").closed())


def test_before_the_adversary_starts_both_networks_learn_from_clean_images():
    late = settings(defense="hat", adversarial_delay=1)
    defense = build_defense("hat")
    model = defense.prepare(network(), (1, 4, 4))
    x, y = ByHand(network()).x, ByHand(network()).y
    losses = defense.loss(model, x, y, Clock(0, 0, 1), late)
    assert losses.adversarial is None
    clean = F.cross_entropy(network()(x), y).item()
    assert losses.total.item() == pytest.approx(2 * clean, abs=1e-5)
    assert build_defense("mart").loss(network(), x, y, Clock(0, 0, 1), late).total.item() == pytest.approx(
        clean, abs=1e-5
    )
