"""ARC on ensembles whose best attack is known by looking at every point of the ball."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import ARC, PGD, arc, build_attack
from learn2perturb.attacks.balls import BALLS
from learn2perturb.attacks.probing import passes_differ
from learn2perturb.engine.finite import expected_correct, members_of
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation import exact_accuracy
from learn2perturb.models import RandomEnsemble
from tests.problems import two_logits

EPS, IMAGES = 0.1, 12


class Plane(nn.Module):
    """Wrong where ``w . (x - 1/2) > t``, for images of two pixels."""

    def __init__(self, weight: Tensor, threshold: float) -> None:
        super().__init__()
        self.weight, self.threshold = weight, threshold

    def forward(self, x: Tensor) -> Tensor:
        return two_logits(20 * ((x.flatten(1) - 0.5) @ self.weight - self.threshold))


def ensemble(seed: int, members: int, probabilities=None, sharing="per_example") -> RandomEnsemble:
    generator = torch.Generator().manual_seed(seed)
    angles = 2.4 * (torch.rand(members, generator=generator) - 0.5)  # some pairs have a point that fools both
    planes = [Plane(torch.stack([angle.sin(), angle.cos()]), 0.06) for angle in angles]
    return RandomEnsemble(planes, probabilities, sharing=sharing).eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.full((IMAGES, 1, 1, 2), 0.5), torch.zeros(IMAGES, dtype=torch.int64)


def least(model: RandomEnsemble, norm: str) -> float:
    """The lowest expected accuracy in the ball, by looking everywhere."""
    line = torch.linspace(-EPS, EPS, 201)
    delta = torch.cartesian_prod(line, line)
    delta = delta[BALLS[norm].distance(delta.view(-1, 1, 1, 2), torch.zeros(1)) <= EPS]
    members = members_of(model)
    return float(expected_correct(members, 0.5 + delta.view(-1, 1, 1, 2), torch.zeros(len(delta)).long()).min())


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("probabilities", [(0.5, 0.5), (0.9, 0.1), (0.4, 0.3, 0.3)])
def test_arc_finds_what_there_is_to_find(norm, probabilities):
    x, y = batch()
    gap = 0.0
    for seed in range(5):
        model = ensemble(seed, len(probabilities), probabilities)
        x_adv = ARC(EPS, norm=norm, steps=12, seed=0)(model, x, y)
        assert float(BALLS[norm].distance(x_adv, x).max()) <= EPS + 1e-6
        left = expected_correct(members_of(model), x_adv, y)
        gap += float((left - least(model, norm)).mean()) / 5
    assert gap <= 0.02


def test_members_whose_gradients_cancel_are_both_fooled():
    """The mean gradient points to where one is fooled and the other safe; a point that fools both is between."""
    planes = [Plane(torch.tensor([1.0, 0.2]), 0.015), Plane(torch.tensor([-1.0, 0.2]), 0.015)]
    model, (x, y) = RandomEnsemble(planes).eval(), batch()
    assert exact_accuracy(model, ARC(EPS, restarts=3, seed=0)(model, x, y), y) <= 0.05
    assert exact_accuracy(model, PGD(EPS, 0.02, 20, eot=1, seed=0)(model, x, y), y) > 0.2


def test_a_kept_point_is_never_worse_than_the_image():
    model, (x, y) = ensemble(3, 3), batch()
    before = expected_correct(members_of(model), x, y)
    assert bool((expected_correct(members_of(model), ARC(EPS, steps=1, seed=0)(model, x, y), y) <= before).all())


@pytest.fixture
def watched_points(monkeypatch) -> list[Tensor]:
    """The points that the members are asked about, in turn."""
    asked: list[Tensor] = []
    right = arc._Ensemble.right

    def watched(self, points: Tensor) -> Tensor:
        asked.append(points.clone())
        return right(self, points)

    monkeypatch.setattr(arc._Ensemble, "right", watched)
    return asked


@pytest.mark.parametrize("seed", range(4))
def test_a_point_is_kept_if_and_only_if_the_exact_accuracy_falls(seed, watched_points):
    """Of all points that the members were asked about, the one returned has the lowest expected accuracy."""
    model, (x, y) = ensemble(seed, 3, (0.5, 0.3, 0.2)), batch()
    found = ARC(EPS, steps=6, seed=seed)(model, x, y)
    members = members_of(model)
    every = torch.stack([expected_correct(members, points, y) for points in watched_points])
    assert len(set(every[:, 0].tolist())) > 1  # some were better than others
    assert torch.equal(expected_correct(members, found, y), every.min(dim=0).values)


@pytest.mark.parametrize("random_start", [True, False])
def test_a_descent_starts_at_random_in_the_ball_if_asked_to_and_otherwise_at_the_image(random_start, watched_points):
    model, (x, y) = ensemble(0, 2), batch()
    ARC(EPS, steps=1, restarts=3, random_start=random_start, seed=0)(model, x, y)
    leaders, asked = 2, 2  # asked about: the start, and what each member's turn makes of it
    starts = watched_points[1 :: 1 + asked]
    assert len(starts) == 3 * leaders
    for start in starts:
        far = BALLS["linf"].distance(start, x)
        assert bool((far > 0).all()) == random_start and float(far.max()) <= EPS + 1e-6
    assert len({start.numpy().tobytes() for start in starts}) == (len(starts) if random_start else 1)


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_a_descent_starts_at_an_image(pixel, watched_points):
    model, (x, y) = ensemble(0, 2), batch()
    ARC(EPS, steps=1, seed=0)(model, torch.full_like(x, pixel), y)
    points = torch.stack(watched_points)
    assert float(points.min()) >= 0 and float(points.max()) <= 1 and bool((points != pixel).any())


@pytest.mark.parametrize("norm", BALLS)
def test_a_local_step_goes_over_the_nearest_boundary(norm):
    """Written out for one image after the other: far, near, near after the step so far, beyond, at two."""
    eps, size = 0.1, 0.03
    centre = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.995, 0.005, 0.5]).view(7, 1, 1, 1).expand(7, 1, 1, 2)
    local = torch.tensor([[0, 0], [0, 0], [0.01, -0.03], [-0.01, 0.02], [0.03, 0.01], [0.0525, -0.01506], [0, 0]])
    local = local.view(7, 1, 1, 2)
    slopes = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])  # of the leads of two classes
    leads = torch.tensor(
        [[-1.0, -0.3], [-0.03, -2.0], [-0.01, -0.02], [-0.04, -1.0], [0.01, -0.5], [-3e-5, -1.0], [0, 0]]
    )
    asked = []

    def ask(attack, rank, at):
        asked.append((rank, at))
        return zip(leads.T, slopes.view(2, 1, 1, 1, 2).expand(2, 7, 1, 1, 2), strict=True)

    found, fooled = ARC(eps, norm=norm, step_size=size)._local_step(
        types.SimpleNamespace(leads=ask), 1, centre, local, centre
    )
    ((rank, at),) = asked
    assert rank == 1 and torch.allclose(at, (centre + local).clamp(0, 1))
    for image in range(7):
        so_far = local[image].flatten().double()
        norms = [float(slope.abs().sum() if norm == "linf" else slope.norm()) for slope in slopes]  # dual ones
        far, nearest = min((-float(leads[image, number]) / norms[number], number) for number in (0, 1))
        whole = far + float(slopes[nearest].double() @ so_far) / norms[nearest]
        if whole < size:
            length = size / max(size - whole, size / 1000) * max(far, 0.0) + 0.05 * eps
        else:
            length = size
        way = slopes[nearest].sign() if norm == "linf" else slopes[nearest] / slopes[nearest].norm()
        moved = so_far + length * way.double()
        moved *= size / float(moved.abs().max() if norm == "linf" else moved.norm())
        torch.testing.assert_close(found[image].flatten().double(), moved, atol=1e-6, rtol=1e-5)
    assert fooled.tolist() == [False, False, False, False, True, False, False]


def test_arc_is_an_attack_like_any_other():
    model, (x, y) = ensemble(0, 2, (0.9, 0.1)), batch()
    attack = build_attack("arc", eps=EPS, steps=2, seed=1)
    found = attack.run(model, x, y)
    assert torch.equal(found.x_adv, attack(model, x, y))
    leaders, rounds, members = 2, 2, 2
    assert found.backward_passes == leaders * rounds * members  # of one wrong class
    assert found.forward_passes == members + leaders * (members + rounds * members * (1 + members))
    assert attack.resized(0.2).step_size == pytest.approx(0.05)
    assert ARC(0.0)(model, x, y).equal(x)
    for settings, reason in (({"targeted": True}, "targeted"), ({"loss": "ce"}, "loss"), ({"step_size": 1}, "step")):
        with pytest.raises(ConfigError, match=reason):
            ARC(EPS, **settings)


def test_a_network_without_noise_is_an_ensemble_of_one():
    plane, (x, y) = ensemble(0, 1).members[0], batch()
    assert float((plane(ARC(EPS, seed=0)(plane, x, y)).argmax(dim=1) == y).float().mean()) == 0


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return two_logits(x.flatten(1).sum(dim=1) + torch.randn(len(x)))


class Shifted(nn.Module):
    """Does more to an image than its members know of."""

    def __init__(self, inner: RandomEnsemble) -> None:
        super().__init__()
        self.members, self.probabilities, self.inner = inner.members, inner.probabilities, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - 0.3)


class Uneven(nn.Module):
    def __init__(self, probabilities) -> None:
        super().__init__()
        self.members, self.probabilities = nn.ModuleList(ensemble(0, 2).members), probabilities

    def forward(self, x: Tensor) -> Tensor:
        return self.members[0](x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Noisy(), "no finite ensemble"),
        (RandomEnsemble([Noisy(), Noisy()]), "member 0 draws noise of its own"),
        (Shifted(ensemble(0, 2)), "answers as none of its members"),
        (Uneven((0.5, 0.6)), "must be at least 0 and add up to 1"),
        (Uneven(torch.tensor([1.5, -0.5])), "must be at least 0 and add up to 1"),
        (Uneven((1.0,)), "2 members and 1 probabilities"),
    ],
)
def test_what_is_no_finite_ensemble_is_refused(model, reason):
    x, y = batch()
    with pytest.raises(InputError, match=reason):
        ARC(EPS)(model.eval(), x, y)
    with pytest.raises(ConfigError if isinstance(model, Noisy) else InputError, match=reason.replace("no finite", "")):
        exact_accuracy(model.eval(), x, y) if not isinstance(model, Noisy) else _refused(model, x, y)


def _refused(model: nn.Module, x: Tensor, y: Tensor) -> None:
    try:
        exact_accuracy(model, x, y)
    except ConfigError as error:
        raise ConfigError(f"{error} ensemble") from None


@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
def test_exact_accuracy_is_what_draws_average_to(sharing):
    x = torch.rand(200, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(200, dtype=torch.int64)
    model = ensemble(1, 2, (0.9, 0.1), sharing)
    exact = exact_accuracy(model, x, y, batch_size=64)
    shares = [float((member(x).argmax(dim=1) == y).float().mean()) for member in model.members]
    assert shares[0] != shares[1]
    assert exact == pytest.approx(0.9 * shares[0] + 0.1 * shares[1])
    torch.manual_seed(0)
    drawn = torch.stack([(model(x).argmax(dim=1) == y).float().mean() for _ in range(600)])
    assert drawn.mean().item() == pytest.approx(exact, abs=4 * drawn.std().item() / 600**0.5)
    assert (drawn.std().item() > 0.02) == (sharing == "per_batch") or abs(shares[0] - shares[1]) < 0.07


def test_rows_of_a_batch_draw_their_own_member_or_share_one():
    x = torch.rand(64, 1, 1, 2)
    for sharing, mixed in (("per_example", True), ("per_batch", False)):
        model = ensemble(1, 2, sharing=sharing)
        torch.manual_seed(0)
        answers, pure = model(x), torch.stack([member(x) for member in model.members])
        rows = ((answers - pure).abs().amax(dim=2) < 1e-4).long()  # (members, images): who answered
        assert bool((rows.sum(dim=0) == 1).all())
        assert (0 < int(rows[0].sum()) < 64) == mixed
    with pytest.raises(ConfigError, match="sharing"):
        ensemble(1, 2, sharing="never")


@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
def test_rare_draws_are_noticed(sharing):
    """Of eight passes of a 0.9/0.1 ensemble all ask one member in 43 % of all cases."""
    x = torch.rand(16, 1, 1, 2)
    model = ensemble(1, 2, (0.9, 0.1), sharing)
    with torch.no_grad():
        assert sum(not passes_differ(model, x, seed) for seed in range(100)) <= 1
        assert not passes_differ(model.members[0], x)


def test_a_model_without_noise_is_asked_few_images():
    asked = []

    def plain(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x.flatten(1)

    assert not passes_differ(plain, torch.rand(256, 1, 1, 2))
    assert sum(asked) < 2 * 256


def test_the_spec_is_a_value():
    assert dataclasses.replace(ARC(EPS), norm="l2").norm == "l2"
    assert ARC(EPS).step_size == pytest.approx(EPS / 4)


def test_another_radius_has_steps_of_the_same_share():
    assert ARC(0.2, step_size=0.1).resized(0.4).step_size == pytest.approx(0.2)
    assert ARC(0.0).resized(0.4).step_size == pytest.approx(0.1)  # a quarter, as by default
    assert ARC(0.2).resized(0.0).step_size == 1.0


def test_a_boundary_that_is_as_far_as_a_step_is_long_is_out_of_its_reach():
    """The length that would reach it is without end there: half of the step is kept, and half goes uphill."""
    ask = types.SimpleNamespace(leads=lambda *_: [(torch.tensor([-1 / 32]), torch.tensor([[[[1.0, 0.0]]]]))])
    local = torch.full((1, 1, 1, 2), 1 / 32)
    centre = torch.full_like(local, 0.5)
    found, _ = ARC(0.25, step_size=1 / 16)._local_step(ask, 0, centre, local, centre)
    torch.testing.assert_close(found.flatten(), torch.tensor([1 / 16, 1 / 48]))


def test_of_points_that_are_equally_good_the_image_is_kept():
    planes = [Plane(torch.tensor([1.0, 0.2]), 9.0), Plane(torch.tensor([-1.0, 0.2]), 9.0)]
    x, y = batch()
    assert torch.equal(ARC(EPS, steps=2, seed=0)(RandomEnsemble(planes).eval(), x, y), x)
