"""The parts of the substitute's training, one by one: its shape, its steps, its targets, where it asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb.attacks import PGD, Surrogate, surrogate
from learn2perturb.attacks.balls import BALLS
from learn2perturb.attacks.surrogate import Asked, Substitute, _Draws, _fit, _fresh, _near, train
from learn2perturb.errors import ConfigError


def test_numbers_that_decide_how_well_it_learns():
    found = {name: getattr(surrogate, name) for name in vars(surrogate) if name[0] == "_" and name[1:].isupper()}
    assert found == {
        "_BATCH": 128, "_EPOCHS": 8, "_UPDATES": 50, "_LR": 2e-3, "_GAP": 4.0, "_STEPS": 3, "_LOOKED_AT": 512,
        "_PROBED": 16, "_WALK": 40,
    }  # fmt: skip


@pytest.mark.parametrize(("side", "widths"), [(8, (16, 32, 32)), (15, (16, 32, 32)), (16, (32, 64, 64, 128))])
def test_the_small_network_layer_by_layer(side, widths):
    torch.manual_seed(0)
    network, x = Substitute(3, side, 7), torch.rand(5, 3, side, side)
    layers = [
        (one.in_channels, one.out_channels, one.kernel_size, one.stride, one.padding, one.bias)
        for one in network.features
        if isinstance(one, nn.Conv2d)
    ]
    assert layers == [
        (before, width, (3, 3), (stride, stride), (1, 1), None)
        for before, width, stride in zip((3, *widths), widths, (1, 2, 1, 2), strict=False)
    ]
    assert [one.num_groups for one in network.features if isinstance(one, nn.GroupNorm)] == [8] * len(widths)
    pooled = nn.functional.adaptive_avg_pool2d(network.features(4 * x - 2), 4)
    assert pooled.shape == (5, widths[-1], 4, 4)
    expected = pooled.flatten(1) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(x), expected)
    assert network(x).shape == (5, 7)
    for sides in ((side, side + 9), (side + 9, side)):  # the shorter one counts
        made = _fresh(None, torch.rand(2, 3, *sides), 7)
        assert isinstance(made, Substitute) and len(made.features) == 3 * len(widths)


def test_a_network_of_ones_own_is_copied_and_checked():
    own = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).requires_grad_(False)
    x = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    made = _fresh(own, x, 3)
    assert made is not own and all(p.requires_grad and p.dtype == torch.float64 for p in made.parameters())
    assert not any(p.requires_grad for p in own.parameters())
    with pytest.raises(ConfigError, match="network gives 3 classes and the model 4"):
        _fresh(own, x, 4)


@pytest.mark.parametrize(("n", "count"), [(5, 3), (5, 5), (5, 6), (5, 13), (1, 2)])
def test_rows_are_drawn_as_often_as_any_other_as_far_as_that_goes(n, count):
    torch.manual_seed(0)
    times = torch.bincount(_Draws().rows(n, count), minlength=n)
    assert times.sum() == count and times.max() - times.min() <= 1


def test_a_round_of_training_has_the_updates_batches_and_rates_that_it_says(monkeypatch):
    for n, sizes in (
        (10, [10] * 50),
        (128, [128] * 50),
        (129, [65, 64] * 25),
        (1000, [125] * 64),
        (900, [113] * 7 + [109]),
        (384, [128] * 50),  # of the last round of three a part
    ):
        rates, seen = [], []

        class Spy(torch.optim.SGD):
            def __init__(self, parameters, lr, *, fused):
                assert lr == 2e-3 and fused
                super().__init__(parameters, lr)

            def step(self, rates=rates):
                rates.append(self.param_groups[0]["lr"])
                super().step()

        class Net(nn.Linear):
            def forward(self, x, seen=seen):
                seen.append(len(x))
                assert self.training
                return super().forward(x)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "Adam", Spy)
            _fit(Net(2, 3).eval(), torch.rand(n, 2), torch.rand(n, 3).softmax(1), _Draws())
        updates = max(8 * -(-n // 128), 50)
        assert len(seen) == len(rates) == updates and seen[: len(sizes)] == sizes
        assert rates == pytest.approx([2e-3 * (1 - done / updates) for done in range(updates)])


def test_the_loss_of_a_round_is_the_cross_entropy_with_the_soft_answers(monkeypatch):
    torch.manual_seed(0)
    net, x, target = nn.Linear(2, 3), torch.rand(6, 2), torch.rand(6, 3).softmax(1)
    w, b = net.weight.detach().clone().requires_grad_(), net.bias.detach().clone().requires_grad_()
    (-(target * (x @ w.T + b).log_softmax(1)).sum(1).mean()).backward()

    class Once(torch.optim.SGD):
        def __init__(self, parameters, lr, *, fused):
            super().__init__(parameters, lr)

        def step(self):
            gradients.append([p.grad.clone() for p in self.param_groups[0]["params"]])

    gradients: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch.optim, "Adam", Once)
    _fit(net, x, target, _Draws())
    for found in gradients:  # each begins from no gradient
        torch.testing.assert_close(found, [w.grad, b.grad])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_half_of_what_is_asked_walks_away_and_half_is_random_in_the_ball(norm, monkeypatch):
    monkeypatch.setattr(surrogate, "_LOOKED_AT", 2)
    torch.manual_seed(0)
    ball, eps = BALLS[norm], 0.1
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.rand(7, 1, 3, 4, dtype=torch.float64) * 0.5 + 0.25
    target = torch.rand(7, 3, dtype=torch.float64).softmax(1)
    drawn, again = _Draws(), _Draws()
    found = _near(net, x, target, ball, eps, drawn)
    share, normal = again.share(x), again.normal(x)
    direction = normal.sign() if norm == "linf" else normal / normal.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    points = x + direction * eps * share
    torch.testing.assert_close(found[3:], points[3:])
    w, b = net[1].weight.detach(), net[1].bias.detach()
    for near, centre, answer, end in zip(points[:3], x[:3], target[:3], found[:3], strict=True):
        for _ in range(3):
            p = (near.flatten() @ w.T + b).softmax(0)
            g = ((p - nn.functional.one_hot(answer.argmax(), 3)) @ w).view_as(near)
            delta = near + eps / 2 * (g.sign() if norm == "linf" else g / g.norm()) - centre
            delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / delta.norm().item())
            near = centre + delta
        torch.testing.assert_close(end, near)


@pytest.mark.parametrize(("count", "queries", "rounds"), [
    (4, 4, [4]), (4, 5, [4, 5]), (4, 16, [4, 8, 16]), (4, 11, [4, 8, 11]), (9, 6, [6]), (1, 3, [1, 2, 3]),
])  # fmt: skip
def test_rounds_double_what_is_known_and_targets_are_soft_by_the_median_gap(count, queries, rounds, monkeypatch):
    torch.manual_seed(0)
    known, told = [], []
    monkeypatch.setattr(surrogate, "_fit", lambda net, x, target, draw: known.append((x, target)))
    weight = torch.randn(4, 3)
    images = torch.rand(count, 1, 2, 2)
    found = train(
        lambda x: 30 * x.flatten(1) @ weight, images, queries, BALLS["linf"], 0.1,
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), lambda *said: told.append(said),
    )  # fmt: skip
    assert [len(x) for x, _ in known] == rounds
    assert told == [(size, queries, "training a substitute") for size in rounds]
    first = known[0][0]
    z = 30 * first.flatten(1) @ weight
    top = z.sort(dim=1, descending=True).values
    scale = (top[:, 0] - top[:, 1]).median() / 4
    for x, target in known:
        torch.testing.assert_close(target, (30 * x.flatten(1) @ weight / scale).softmax(1))
        assert torch.equal(x[: len(first)], first)
    assert {tuple(row) for row in first.flatten(1).tolist()} <= {tuple(row) for row in images.flatten(1).tolist()}
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_what_crafts_on_the_substitute(monkeypatch):
    made = []
    monkeypatch.setattr(surrogate, "train", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    monkeypatch.setattr(PGD, "craft", lambda self, model, x, y, **_: (made.append(self), x)[1])
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    Surrogate(0.2, norm="l2", loss="margin", targeted=True)(model, x, y)
    Surrogate(0.2, attack=PGD(0.1, 0.05, 7, eot=5))(model, x, y)
    assert made == [PGD(0.2, steps=40, norm="l2", loss="margin", targeted=True), PGD(0.2, 0.05, 7)]


def test_a_substitute_is_trained_anew_for_other_settings_or_answers_only():
    asked, built = Asked(torch.rand(20, 1, 2, 2)), []

    def build(images):
        built.append((images, torch.rand(1)))
        return nn.Identity()

    def made(settings, scale):
        return asked.substitute(settings, lambda images: scale * images.flatten(1), build, x)

    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = made("one", 1)
    assert made("one", 1) is first and len(built) == 1
    second = made("other", 1)
    third = made("other", 2)
    assert made("other", 2) is third and len({id(one) for one in (first, second, third)}) == 3
    assert made("one", 1) is not first and len(built) == 4  # the last one alone is held
    assert all(torch.equal(images, asked.images.double()) for images, _ in built)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({drawn.item() for _, drawn in built}) == 1  # whichever batch comes first


@pytest.mark.parametrize("average", ["loss", "probability", "logits"])
def test_an_answer_is_the_mean_of_eot_passes(average, monkeypatch):
    """Of probabilities, as a black box gives them, but for an attacker who averages logits."""
    draws, turn, answered = torch.tensor([[2.0, 0, 0], [0, 0, 1.0]]), [], []

    def model(images):
        turn.append(0)
        return draws[len(turn) % 2].expand(len(images), 3)

    def trained(answers, images, *_):
        answered.append(answers(images))
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    monkeypatch.setattr(surrogate, "train", trained)
    Surrogate(0.2, eot=2, eot_average=average)(model, torch.rand(1, 1, 2, 2), torch.zeros(1).long())
    expected = draws.mean(0).softmax(0) if average == "logits" else draws.softmax(1).mean(0)
    torch.testing.assert_close(answered[0][0].softmax(0), expected)


def test_what_walks_away_is_asked_about_within_the_box():
    asked = []

    class Net(nn.Linear):
        def forward(self, x):
            asked.append(x.detach())
            return super().forward(x.flatten(1))

    x = torch.tensor([0.0, 1.0]).repeat(4, 2).view(4, 1, 2, 2)
    _near(Net(4, 3), x, torch.rand(4, 3).softmax(1), BALLS["linf"], 0.3, _Draws())
    assert len(asked) == 3 and all(one.min() >= 0 and one.max() <= 1 for one in asked)


def test_the_model_is_asked_in_eval_mode_and_without_gradients(monkeypatch):
    asked = []

    class Listening(nn.Linear):
        def forward(self, x):
            asked.append((self.training, torch.is_grad_enabled()))
            return super().forward(x.flatten(1))

    monkeypatch.setattr(surrogate, "_fit", lambda *_: None)
    model = Listening(64, 3).train()
    surrogate.distil(model, torch.rand(3, 1, 8, 8), queries=6, seed=0)
    assert set(asked) == {(False, False)} and model.training
