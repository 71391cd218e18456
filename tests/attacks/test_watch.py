"""Gradients that are not finite or exactly zero: every attack tells, and training stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.attacks import ARC, CW, PGD, Square, build_attack, from_function
from learn2perturb.attacks.query import Query
from learn2perturb.defenses.objectives import TradesAdversary
from learn2perturb.errors import InputError, NonFiniteError
from learn2perturb.registry import ATTACKS
from tests.attacks.test_attacks import CASES, small
from tests.problems import two_logits

GRADIENT_CASES = [(name, norm) for name, norm in CASES if ATTACKS.entry(name).load().needs_gradient]
LOGIT_CASES = [case for case in CASES if case not in GRADIENT_CASES]


class Spoiled(nn.Module):
    """A linear network with finite logits whose input gradient, if ``bad`` is set, is ``bad`` (NaN or infinite)."""

    def __init__(self, bad: float = float("nan"), shape: tuple[int, int, int] = (3, 4, 4), classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(int(np.prod(shape)), classes)
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda gradient: torch.full_like(gradient, self.bad))
        return self.linear(x.flatten(1))


@pytest.fixture
def batch():
    return torch.rand(6, 3, 4, 4), torch.arange(6) % 5


def right(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


@pytest.mark.parametrize(("name", "norm"), GRADIENT_CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_are_refused(name, norm, bad, batch):
    model = Spoiled(bad)
    with pytest.raises(InputError, match="NaN gradient"):
        small(name, norm).run(model, batch[0], right(model, batch[0]))


@pytest.mark.parametrize(("name", "norm"), GRADIENT_CASES)
def test_crafted_images_are_nan_where_a_gradient_is(name, norm, batch):
    model = Spoiled()
    x_adv = small(name, norm).craft(model, batch[0], right(model, batch[0]))
    assert x_adv.isnan().all()


@pytest.mark.parametrize(("name", "norm"), LOGIT_CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_away_from_the_images_are_refused(name, norm, bad, batch):
    x, y = batch
    linear = nn.Linear(48, 5)

    def model(images: Tensor) -> Tensor:
        known = (images.flatten(1).unsqueeze(1) == x.flatten(1)).all(dim=2).any(dim=1)
        return linear(images.flatten(1)).masked_fill(~known.unsqueeze(1), bad)

    with torch.no_grad():
        y = model(x).argmax(dim=1)
    with pytest.raises(InputError, match="NaN or infinite logits"):
        small(name, norm).run(model, x, y)


def test_one_bad_draw_of_several_is_enough(batch):
    model, calls = Spoiled(1.0), []

    def sometimes(x: Tensor) -> Tensor:
        calls.append(0)
        model.bad = float("nan") if len(calls) == 5 else 1.0
        return model(x)

    with pytest.raises(InputError, match="NaN gradient"):
        PGD(steps=3, eot=3).run(sometimes, *batch)


def test_foreign_attacks_and_sources_are_watched(batch):
    x, y = batch

    def fgsm(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(images), labels)
        return images + 0.01 * torch.autograd.grad(loss, images)[0].sign()

    attack = from_function(fgsm, eps=0.1)
    assert attack.run(Spoiled(1.0), x, y).zero_gradients == 0
    assert attack.run(Spoiled(0.0), x, y).zero_gradients == 6
    with pytest.raises(InputError, match="NaN gradient"):
        attack.run(Spoiled(), x, y)
    transfer = build_attack("transfer", attack=PGD(), source=Spoiled(0.0))
    assert transfer.run(Spoiled(), x, y).zero_gradients == 6
    with pytest.raises(InputError, match="NaN gradient"):
        build_attack("transfer", attack=PGD(), source=Spoiled()).run(Spoiled(1.0), x, y)


@pytest.mark.parametrize(("name", "norm"), GRADIENT_CASES)
def test_zero_gradients_are_counted(name, norm, batch):
    x = batch[0]
    model = Spoiled(1.0)
    scale = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]).view(-1, 1, 1, 1)

    def masked(images: Tensor) -> Tensor:  # every second image, also where others have dropped out
        which = (images.detach().flatten(1)[:, None] - x.flatten(1)).abs().sum(dim=2).argmin(dim=1)
        if images.requires_grad:
            images = images.clone()
            images.register_hook(lambda gradient: gradient * scale[which])
        return model.linear(images.flatten(1))

    with torch.no_grad():
        y = masked(x).argmax(dim=1)
    assert small(name, norm).run(masked, x, y).zero_gradients == 3
    assert small(name, norm).run(lambda images: model.linear(images.flatten(1)), x, y).zero_gradients == 0


def test_attacks_without_gradients_count_none(batch):
    assert Square(queries=3).run(Spoiled(), *batch).zero_gradients is None


@pytest.mark.parametrize("objective", ["mixed", "trades"])
def test_training_stops_when_the_adversary_has_no_finite_gradient(objective):
    network = Spoiled(shape=(1, 8, 8), classes=10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = l2p.TrainConfig(
        defense="trades" if objective == "trades" else "pgd_at", model="digits_cnn", dataset="digits", recipe="fast",
        epochs=1, batch_size=16, limit=64, monitor=0, device="cpu", engine="plain", tensorboard=False,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="loss is nan at step 0"):
        l2p.train(config, model=network, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_monitored_images_that_were_not_attacked_are_no_score():
    network = Spoiled(shape=(1, 8, 8), classes=10)
    config = l2p.TrainConfig(
        defense="none", model="digits_cnn", dataset="digits", recipe="fast", epochs=1, batch_size=16, limit=64,
        monitor=20, device="cpu", engine="plain", tensorboard=False,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="monitored images"):
        l2p.train(config, model=network, progress=False)


def test_the_inner_attack_of_trades_is_watched(batch):
    with pytest.raises(InputError, match="NaN gradient"):
        TradesAdversary().run(Spoiled(), *batch)
    assert TradesAdversary().run(Spoiled(0.0), *batch).zero_gradients == 6


def test_evaluate_keeps_the_count_and_warns_from_a_twentieth_on(tmp_path):
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    linear = nn.Linear(64, 10)
    zero = 2

    def model(images: Tensor) -> Tensor:
        if images.requires_grad:
            which = (images.detach().flatten(1)[:, None] - x.flatten(1)).abs().sum(dim=2).argmin(dim=1)
            images = images.clone()
            images.register_hook(lambda gradient: gradient * (which >= zero).view(-1, 1, 1, 1))
        return linear(images.flatten(1))

    with pytest.warns(UserWarning, match="pgd 1/255: the gradient of 2 of 40 images is exactly zero"):
        found = l2p.evaluate(model, (x, y), {"pgd": PGD(1 / 255), "square": Square(queries=2)}, batch_size=15)
    assert [row.zero_gradients for row in found.rows] == [None, 2, None]
    found.save(tmp_path / "record.json")
    assert type(found).load(tmp_path / "record.json").rows[1].zero_gradients == 2
    zero = 1  # below a twentieth: kept, not said
    assert l2p.evaluate(model, (x, y), {"pgd": PGD(1 / 255)}).row("pgd").zero_gradients == 1


def test_a_hinge_that_is_reached_is_no_masked_gradient():
    """C&W's loss is flat where the image is misclassified already: nothing hides there."""
    model = l2p.build_model("digits_cnn", input_shape=(1, 8, 8)).eval()
    l2p.perturb(model, input_shape=(1, 8, 8), init=1e-3, minimum=1e-4)  # with noise no image leaves before it is tried
    x = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 10
    assert CW(search_steps=1, steps=3).run(model, x, wrong).zero_gradients == 0


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("lead", "counted"), [(-1.0, 2), (0.0, 2), (1.0, 0)])
def test_a_flat_model_hides_its_gradient_until_the_attack_has_its_way(lead, counted, targeted):
    """A margin of 0 is no success yet."""
    x, y = torch.rand(2, 1, 2, 2), torch.full((2,), int(targeted))
    query = Query(
        lambda images: two_logits(images.flatten(1).sum(1) * 0 + lead), PGD(targeted=targeted), y, strict=True
    )
    query.value_and_gradient(x, y)
    assert query.watch.zero_gradients == counted


@pytest.mark.parametrize(("lead", "counted"), [(-1.0, 2), (0.0, 2), (1.0, 0)])
def test_arc_counts_gradients_of_zero_where_a_member_is_not_fooled(lead, counted):
    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2).long()
    flat = lambda images: two_logits(images.flatten(1).sum(1) * 0 + lead)  # noqa: E731
    assert ARC(0.1, steps=1, seed=0).run(flat, x, y).zero_gradients == counted


@pytest.mark.parametrize("name", ["pgd", "apgd", "fgsm"])
def test_a_gradient_that_is_zero_at_a_tie_is_told(name, batch):
    """What is not wrong yet has still to go somewhere."""
    result = build_attack(name, eps=0.1).run(lambda x: 0 * x.flatten(1)[:, :5], *batch)
    assert result.zero_gradients == len(batch[0])
