"""The diagnosis and its controls: each faked robustness is caught by the check meant for it, a real one passes."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb import records
from learn2perturb.attacks import FGSM, PGD
from learn2perturb.data import load_data
from learn2perturb.diagnosis import BUDGETS, CHECKS, QUICK, Diagnosis, diagnose
from learn2perturb.diagnosis.blackbox import SURROGATE
from learn2perturb.diagnosis.draws import gradient_slope, row_slope
from learn2perturb.diagnosis.verdict import Draft, Statement, conclude, judge
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import CheckpointError, ConfigError, DataError, InputError, UnknownNameError
from learn2perturb.evaluation.intervals import Scores
from learn2perturb.evaluation.significance import exceeds, holm
from learn2perturb.noise import fixed_noise, perturb, perturb_weights

EPS = 0.15
TINY = dataclasses.replace(
    QUICK, name="tiny", images=100, some=60, scorings=4, eot=2, sweep_eot=1, steps=20, unbounded_steps=200, samples=20,
    judge_draws=8, eps_grid=(8 / 255, 32 / 255, 128 / 255), draw_curve=(1, 4), step_curve=(20, 40), restarts=2,
    square_queries=150, square_draws=1, slope_images=6, slope_repeats=16,
    real_queries=300, descent_steps=20, descent_directions=8, surrogate_queries=1500,
)  # fmt: skip


class Small(nn.Module):
    """A network that trains on the digits in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 2, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 2, 1)
        self.out = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv2(F.relu(self.conv1(2 * x - 1)))).flatten(1))


def trained(seed: int, *, adversarial: bool) -> nn.Module:
    data = load_data("digits", "train")
    x, y = data.images.float() / 255, data.labels
    with isolated_rng():
        torch.manual_seed(seed)
        network = Small()
        optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
        for _ in range(14 if adversarial else 8):
            for rows in torch.randperm(len(y)).split(64):
                images = PGD(EPS, 0.05, 5).craft(network, x[rows], y[rows]) if adversarial else x[rows]
                optimizer.zero_grad()
                F.cross_entropy(network(images), y[rows]).backward()
                optimizer.step()
    return network.eval()


@pytest.fixture(scope="session")
def networks() -> dict[str, nn.Module]:
    return {
        "undefended": trained(0, adversarial=False),
        "pgd_at": trained(1, adversarial=True),
        "twin": trained(2, adversarial=True),
    }


@pytest.fixture(scope="session")
def digits():
    return load_data("digits", "test")


def examined(model, digits, sources, budget=TINY, **settings) -> Diagnosis:
    return diagnose(model, digits, budget=budget, eps=EPS, sources=sources, engine="plain", **settings)


def failed(found: Diagnosis) -> set[int]:
    return {check.number for check in found.checks if check.status == "failed"}


# --- a robust network, and controls


@pytest.fixture(scope="session")
def honest(networks, digits) -> Diagnosis:
    sources = {name: networks[name] for name in ("undefended", "twin")}
    return examined(networks["pgd_at"], digits, sources)


def test_a_pgd_trained_network_passes(honest):
    assert failed(honest) == set()
    statuses = {check.number: check.status for check in honest.checks}
    assert statuses == {**dict.fromkeys(CHECKS, "passed"), 6: "does not apply", 9: "does not apply"}
    assert honest.verdict == "trusted"
    assert honest.claim is None
    assert "stand" not in honest.summary  # a word for claims, of which there is none
    assert "no proof" in honest.summary
    assert honest.check(2).missing == ("transfer from pgd_at (a PGD-trained network)",)
    lowest = honest.measurement(honest.lowest)
    assert 0.2 < lowest.accuracy < honest.measurement("clean").accuracy
    assert lowest.accuracy <= honest.measurement("reported").accuracy


def test_the_curves_fall(honest):
    curves = {curve.axis: [point.accuracy for point in curve.points] for curve in honest.curves}
    assert set(curves) == {"eps", "steps"}
    assert curves["eps"] == sorted(curves["eps"], reverse=True)
    assert curves["eps"][-1] <= 0.1


def test_a_diagnosis_is_kept_and_read_back(honest, tmp_path):
    path = honest.save(tmp_path / "diagnosis.json")
    assert Diagnosis.load(path) == honest
    lines = str(honest).splitlines()
    assert lines[0].startswith("GRADIENTS CAN BE TRUSTED")
    assert all(f"{number}".ljust(4) + one.name in lines[number + 3] for number, one in CHECKS.items())
    assert all(f"{check.number}. {check.sentence}" in lines for check in honest.checks)
    bits = honest.measurement("reported").correct.unpack()
    assert bits.shape == (1, TINY.images)
    assert bits.mean() == honest.measurement("reported").accuracy
    older = json.loads(path.read_text())
    del older["checksum"]
    assert [check.pop("notes") for check in older["checks"]] == [[]] * 10  # a record from before there were notes
    assert records.from_json(json.dumps(older), Diagnosis) == honest
    path.write_text(path.read_text().replace('"verdict": "trusted"', '"verdict": "maybe"'))
    with pytest.raises(CheckpointError, match="verdict"):
        Diagnosis.load(path)


def _forged(found: Diagnosis, what: str) -> Diagnosis:
    check, reported = found.check(1), found.measurement("reported")
    claim = check.claims[0]
    checks = {
        "status": dataclasses.replace(check, status="failed"),  # so that the verdict does not follow
        "holds": dataclasses.replace(check, claims=(dataclasses.replace(claim, holds=False), *check.claims[1:])),
        "broken": dataclasses.replace(
            check, claims=(dataclasses.replace(claim, p_value=0.0, adjusted=0.0, holds=False), *check.claims[1:])
        ),
        "p_value": dataclasses.replace(check, claims=(dataclasses.replace(claim, difference=0.5), *check.claims[1:])),
        "number": dataclasses.replace(check, number=7),
        "adjusted": dataclasses.replace(
            check, claims=(dataclasses.replace(claim, adjusted=claim.adjusted / 2), *check.claims[1:])
        ),
    }
    measurements = {
        "accuracy": dataclasses.replace(reported, accuracy=reported.accuracy + 0.1),
        "interval": dataclasses.replace(
            reported, interval=dataclasses.replace(reported.interval, low=reported.interval.low - 0.1)
        ),
        "n": dataclasses.replace(reported, n=reported.n - 1),
    }
    if what == "unfailed":  # a claim that is refuted by right, in a check that says that it passed
        p_value = exceeds(0.5, claim.allowed, claim.standard_error)
        refuted = dataclasses.replace(claim, difference=0.5, p_value=p_value, holds=False)
        rest = [one for other in found.checks[1:] for one in other.claims]
        own = [refuted, *check.claims[1:]]
        adjusted = iter(holm([one.p_value for one in [*own, *rest]]))
        new = [
            dataclasses.replace(
                one, claims=tuple(dataclasses.replace(claim, adjusted=next(adjusted)) for claim in one.claims)
            )
            for one in (dataclasses.replace(check, claims=tuple(own)), *found.checks[1:])
        ]
        return dataclasses.replace(found, checks=tuple(new))
    if what in checks:
        return dataclasses.replace(found, checks=(checks[what], *found.checks[1:]))
    if what in measurements:
        rest = tuple(one for one in found.measurements if one.name != "reported")
        return dataclasses.replace(found, measurements=(*rest, measurements[what]))
    if what == "curve":
        curve = found.curves[0]
        point = dataclasses.replace(curve.points[0], accuracy=curve.points[0].interval.high + 0.01)
        curve = dataclasses.replace(curve, points=(point, *curve.points[1:]))
        return dataclasses.replace(found, curves=(curve, *found.curves[1:]))
    return dataclasses.replace(found, **{"verdict": {"verdict": "not shown"}, "lowest": {"lowest": "magic"}}[what])


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("status", "the verdict is 'trusted', and its checks give 'not trusted'"),
        ("verdict", "the verdict is 'not shown', and its checks give 'trusted'"),
        ("holds", "is not judged as its p-value says"),
        ("adjusted", "is not judged as its p-value says"),
        ("broken", "is not that of its difference"),
        ("p_value", "is not that of its difference"),
        ("unfailed", "check 1 'passed', though a statement of it does not hold"),
        ("number", "the checks are 7, 2"),
        ("accuracy", "but its bits give"),
        ("interval", "is not that of its bits"),
        ("n", "its bits are of others"),
        ("curve", "lies outside of its interval"),
        ("lowest", "unknown measurement 'magic'"),
    ],
)
def test_a_diagnosis_that_contradicts_its_data_is_refused(what, reason, honest, tmp_path):
    path = _forged(honest, what).save(tmp_path / "forged.json")
    with pytest.raises(CheckpointError, match=reason) as caught:
        Diagnosis.load(path)
    assert "\n" not in str(caught.value)


class Quantised(nn.Module):
    """Masks gradients: rounding has a derivative of zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.round(x * 15) / 15)


class Saturated(nn.Module):
    """Masks the gradient of the cross-entropy: softmax of huge logits is constant in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * self.network(x)


def test_non_differentiable_preprocessing_is_caught(networks, digits):
    found = examined(Quantised(networks["undefended"]).eval(), digits, {"undefended": networks["undefended"]})
    assert {2, 3, 5} <= failed(found)
    assert found.verdict == "not trusted"
    assert found.summary.startswith("GRADIENTS CANNOT BE TRUSTED: check 2 (")
    assert "worth less than none" in found.check(2).sentence
    black_box = found.check(2).evidence
    assert black_box["white-box"] > 0.9 > 0.5 > black_box["transfer from undefended"]
    assert found.measurement(found.lowest).accuracy <= black_box["transfer from undefended"]


# Little of what these two are not about.
OTHERWISE = dataclasses.replace(
    TINY, some=10, samples=2, unbounded_steps=5, eps_grid=(EPS,), step_curve=(2, 4), restarts=1, real_queries=400,
)  # fmt: skip


def test_values_of_one_network_with_gradients_of_another_are_caught(networks, digits):
    """Both are adversarially trained, so that the gradients are worth much, and still less than none."""
    values, shown = networks["pgd_at"], networks["twin"]

    def decoy(x: Tensor) -> Tensor:
        answer = shown(x)
        return answer + (values(x) - answer).detach()

    found = diagnose(decoy, digits, budget=OTHERWISE, eps=EPS, engine="plain", progress=False)
    check = found.check(10)
    assert "the gradients are not the function's" in check.sentence
    assert check.status in ("failed", "not shown"), check.sentence  # on 100 images six points may be chance
    assert {f"transfer from {SURROGATE}", "Square", "descent on values"} <= set(check.evidence)
    assert found.measurement(found.lowest).accuracy < found.measurement("reported").accuracy - 0.05


def test_an_honest_straight_through_network_passes(networks, digits):
    network = networks["pgd_at"]

    def straight_through(x: Tensor) -> Tensor:
        return network(x + (torch.round(x * 15) / 15 - x).detach())

    found = diagnose(straight_through, digits, budget=OTHERWISE, eps=EPS, engine="plain", progress=False)
    check = found.check(10)
    assert "a staircase, whose slope the gradients are" in check.sentence
    assert {f"transfer from {SURROGATE}", "Square", "descent on values"} <= set(check.evidence)
    assert {found.check(number).status for number in (2, 10)} == {"passed"}, check.sentence
    assert found.budget["square_queries"] == 400


def test_saturated_logits_are_caught(networks, digits):
    found = examined(Saturated(networks["undefended"]).eval(), digits, {"undefended": networks["undefended"]})
    assert {3, 8} <= failed(found)
    assert found.check(8).evidence["best"] < found.check(8).evidence["reported"] - 0.3


def noisy(networks, sharing: str) -> nn.Module:
    return perturb(
        copy.deepcopy(networks["pgd_at"]), input_shape=(1, 8, 8), sites=["conv1", "conv2"], sharing=sharing, init=0.3
    )


@pytest.fixture(scope="session")
def real_noise(networks, digits) -> Diagnosis:
    return examined(noisy(networks, "per_example"), digits, networks)


def test_real_draws_are_found_real(real_noise):
    check = real_noise.check(9)
    assert check.status == "passed"
    assert check.evidence["slope of gradient"] == pytest.approx(-1, abs=0.1)
    assert check.evidence["slope of rows of a batch"] == pytest.approx(-1, abs=0.1)
    assert {curve.axis for curve in real_noise.curves} == {"eps", "draws", "steps"}
    assert real_noise.check(6).status in ("passed", "failed")
    assert "transfer from own noise-off twin" in {one.name for one in real_noise.measurements}


FEW = dataclasses.replace(
    TINY, images=24, some=12, samples=5, unbounded_steps=10, step_curve=(4, 8), slope_repeats=24, real_queries=50,
    descent_steps=5, surrogate_queries=500,
)  # fmt: skip


def shared_weights(networks) -> nn.Module:
    return perturb_weights(copy.deepcopy(networks["pgd_at"]), sites=["conv1", "conv2"], init=0.3).eval()


def shared_by_hand(networks):
    """Nothing of this package: one draw of noise on the images for a pass."""
    return lambda x: networks["pgd_at"](x + 0.1 * torch.randn(x.shape[1:]))


def shared_and_own(networks):
    """A draw for each row, on top of one for the pass."""
    return lambda x: networks["pgd_at"](x + 0.1 * torch.randn(x.shape[1:]) + 0.05 * torch.randn(x.shape))


@pytest.mark.parametrize("kind", [lambda n: noisy(n, "per_batch"), shared_weights, shared_by_hand, shared_and_own])
def test_draws_shared_by_a_batch_are_a_note_not_a_fault(networks, digits, kind):
    found = diagnose(kind(networks), digits, budget=FEW, eps=EPS, engine="plain")
    check = found.check(9)
    assert check.status == "passed", check.sentence
    assert len(check.notes) == 1
    assert "EOT must average over fresh passes" in check.notes[0]
    assert "are not independent, which intervals and standard errors allow for" in str(found)
    assert records.from_json(records.to_json(found), Diagnosis).check(9).notes == check.notes


def seeded(network: nn.Module, kind: str):
    """A network that fakes its noise."""

    def forward(x: Tensor) -> Tensor:
        if kind == "globally":
            torch.manual_seed(0)
        if kind == "by image":
            torch.manual_seed(int(1e6 * x.sum()))
        generator = torch.Generator().manual_seed(0) if kind == "its own" else None
        return network(x + 0.1 * torch.randn(x.shape, generator=generator))

    return forward


@pytest.mark.parametrize("kind", ["globally", "by image", "its own"])
def test_a_forward_that_seeds_fails_for_the_right_reason(networks, digits, kind):
    found = diagnose(seeded(networks["undefended"], kind), digits, budget=FEW, eps=EPS, engine="plain")
    assert found.check(9).status == "failed"
    assert found.verdict == "not trusted"
    assert found.summary.startswith("THE DRAWS CANNOT BE TRUSTED")
    reason = "the row of the batch" if kind == "its own" else "forward() seeds the random generators"
    assert reason in found.check(9).sentence.replace("Forward", "forward")
    assert "replayed" in found.check(9).sentence
    assert "BatchNorm" not in str(found)


def test_a_fixed_function_that_seeds_is_no_noise_where_it_is_said(networks, digits):
    def projected(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return networks["pgd_at"](x + 0.01 * torch.randn(x.shape[1:]))

    found = diagnose(projected, digits, budget=FEW, eps=EPS, engine="plain", stochastic=False)
    assert found.check(9).status == "does not apply"


def test_noise_of_any_model_is_switched_off_by_its_twin(networks, digits):
    model, sources = shared_by_hand(networks), {"pgd_at": networks["pgd_at"]}
    without = diagnose(model, digits, budget=FEW, eps=EPS, engine="plain", sources=sources)
    assert without.check(6).status == "not shown"
    assert "--noise-off" in without.check(6).sentence
    found = diagnose(model, digits, budget=FEW, eps=EPS, engine="plain", sources=sources, noise_off=networks["pgd_at"])
    check = found.check(6)
    assert check.status == "passed"
    assert check.evidence["noise off"] == pytest.approx(check.evidence["pgd_at"], abs=0.1)
    assert "transfer from own noise-off twin" in {one.name for one in found.measurements}
    assert (without.metadata["noise_off"], found.metadata["noise_off"]) == ("none", "given")


def test_a_twin_that_is_none_is_refused(networks, digits):
    model = shared_by_hand(networks)
    for twin, error, fix in (
        (3, ConfigError, "must be callable"),
        (model, InputError, "still draws noise"),
        (lambda x: networks["pgd_at"](x)[:, :5], InputError, "5 classes and the model 10"),
        (seeded(networks["pgd_at"], "globally"), InputError, "seeds the random"),
    ):
        with pytest.raises(error, match=fix):
            diagnose(model, digits, budget=FEW, eps=EPS, engine="plain", noise_off=twin)


def test_replayed_noise_is_caught(networks, digits):
    model = noisy(networks, "per_example")
    with fixed_noise(model, 0):
        found = diagnose(model, digits, budget=FEW, eps=EPS, engine="plain")
    assert 9 in failed(found)
    assert "replayed" in found.check(9).sentence


def test_a_foreign_model_that_is_said_to_be_random_and_is_not(networks, digits):
    def replaying(x: Tensor) -> Tensor:
        with isolated_rng(torch_only=True):
            torch.manual_seed(0)
            return networks["pgd_at"](x + 0.05 * torch.randn(x.shape[1:]))

    found = diagnose(replaying, digits, budget=FEW, eps=EPS, engine="plain", stochastic=True)
    assert 9 in failed(found)


# --- slopes


def test_a_pool_of_draws_has_not_the_slope_of_independence():
    x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    weight = torch.randn(4, 3)
    passes = iter(range(10**6))

    def independent(x: Tensor) -> Tensor:
        return (x.flatten(1) + torch.randn(len(x), 4)).sigmoid() @ weight

    def rolled(x: Tensor) -> Tensor:  # every draw serves four passes
        generator = torch.Generator().manual_seed(next(passes) // 4)
        return (x.flatten(1) + torch.randn(len(x), 4, generator=generator)).sigmoid() @ weight

    assert gradient_slope(independent, x, y, 512).fits
    assert not gradient_slope(rolled, x, y, 512).fits
    assert row_slope(independent, x, 24).fits
    cycle = [torch.randn(6, 4) for _ in range(4)]  # four draws in a circle: the average of four is constant
    circling = lambda x: (x.flatten(1) + cycle[next(passes) % 4]).sigmoid() @ weight  # noqa: E731
    assert gradient_slope(circling, x, y, 512).value < -2
    assert gradient_slope(lambda x: x.flatten(1) @ weight[:, :2] + torch.randn(2), x, y, 64) is None
    assert gradient_slope(independent, x, y, 47) is None  # fewer than three averages of sixteen
    assert not row_slope(lambda x: independent(x[:1]).expand(len(x), -1), x, 24).fits


def test_one_number_for_a_whole_pass_is_no_replay_by_chance():
    """The images of a pass then err together: an error told from their spread fails a quarter of such models."""
    x, y, weight = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64), torch.randn(4, 3)
    found = [
        gradient_slope(lambda x: (x.flatten(1) + torch.randn(())).sigmoid() @ weight, x, y, 16 * 24) for _ in range(20)
    ]
    assert sum(slope.fits for slope in found) >= 19
    spread = np.std([slope.value for slope in found])
    assert np.mean([slope.standard_error for slope in found]) == pytest.approx(spread, rel=0.5)


def test_one_unlucky_draw_among_many_points_is_no_break():
    """Random search is judged by the mean margin: here single draws are wrong in a third of all passes."""

    def jittery(x: Tensor) -> Tensor:
        right = x.flatten(1)[:, :1] * 0 + 1 + 2 * torch.randn(len(x), 1)
        return torch.cat([right, x.flatten(1)[:, :1] * 0], dim=1)

    x = torch.rand(40, 1, 2, 2)
    y = torch.zeros(40, dtype=torch.int64)
    y[0] = 1
    budget = dataclasses.replace(
        OTHERWISE, images=40, some=40, samples=60, judge_draws=200, finalists=3, square_queries=5, real_queries=5,
        descent_steps=2, surrogate_queries=200, eps_grid=(0.1,),
    )  # fmt: skip
    found = diagnose(jittery, (x, y), budget=budget, eps=0.1, engine="plain")
    assert found.check(4).evidence["broken"] == 0
    assert found.check(4).evidence["left by gradients"] == 39


# --- statistics


def claim(difference: np.ndarray, *, absolute: bool = False, allowed: float = 0.0) -> Draft:
    scores = [Scores(right[None]) for right in (difference > 0, difference < 0)]
    return Draft(1, "good", (Statement("text", "broken", *scores, allowed, absolute),))


def test_a_claim_fails_beyond_two_standard_errors_only():
    values = np.array([1.0] * 60 + [0.0] * 20 + [-1.0] * 20)
    assert judge([claim(values)])[0].status == "failed"
    assert judge([claim(values, allowed=0.4)])[0].status == "passed"
    assert judge([claim(-values)])[0].status == "passed"
    assert judge([claim(-values, absolute=True)])[0].status == "failed"
    both = np.array([1.0] * 29 + [0.0] * 56 + [-1.0] * 15)  # 2.2 standard errors: enough for one side, not for two
    assert judge([claim(both)])[0].status == "failed"
    assert judge([claim(both, absolute=True)])[0].status == "passed"
    near = np.array([1.0] * 30 + [0.0] * 50 + [-1.0] * 20)
    assert judge([claim(near)])[0].status == "passed"
    strict = dataclasses.replace(claim(near).claims[0], strict=True)
    doubtful = judge([dataclasses.replace(claim(near), claims=(strict,))])[0]
    assert doubtful.status == "not shown"
    assert "may be chance" in doubtful.sentence


def test_many_claims_are_corrected():
    values = np.array([1.0] * 38 + [0.0] * 42 + [-1.0] * 20)  # 2.4 standard errors
    assert judge([claim(values)])[0].status == "failed"
    rest = [claim(np.zeros(100)) for _ in range(20)]
    checks = judge([claim(values), *rest])
    assert [check.status for check in checks] == ["passed"] * 21
    assert checks[0].claims[0].adjusted > checks[0].claims[0].p_value


def test_honest_models_seldom_fail_by_chance():
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(40):
        drafts = [claim(rng.choice([-1.0, 0.0, 1.0], 100, p=[0.1, 0.8, 0.1])) for _ in range(20)]
        failures += any(check.status == "failed" for check in judge(drafts))
    assert failures <= 5  # uncorrected it is a third of them


def test_few_images_pass_nothing():
    checks = judge([claim(np.zeros(50))])
    assert conclude(checks, lowest="x", accuracy=0.5, n=99, eps="linf 8/255")[0] == "not shown"
    assert conclude(checks, lowest="x", accuracy=0.5, n=100, eps="linf 8/255")[0] == "trusted"


def test_a_check_that_was_not_run_is_not_shown(networks, digits):
    found = examined(networks["pgd_at"], digits, {})
    assert found.check(2).status == "not shown"
    assert found.verdict == "not shown"
    assert "checks 2 were not shown" in found.summary


# --- bad input, named before the checks


def test_probabilities_are_warned_about(networks, digits):
    with pytest.warns(UserWarning, match="looks like probabilities"):
        found = examined(lambda x: networks["undefended"](x).softmax(1), digits, {}, FEW, limit=10)
    assert "looks like probabilities" in found.findings[0]
    assert "warning: the model's output" in str(found)


def test_train_mode_is_named_and_given_back(networks, digits):
    model = networks["undefended"].train()
    try:
        with pytest.warns(UserWarning, match="train mode"):
            found = examined(model, digits, {}, FEW, limit=10)
        assert model.training
        assert "train mode" in found.findings[0]
    finally:
        model.eval()


class Normed(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, **settings)
        self.out = nn.Linear(64, 10)
        self.always = False

    def forward(self, x: Tensor) -> Tensor:
        if self.always:
            self.norm.training = True
        return self.out(self.norm(x).flatten(1))


def test_statistics_that_move_are_refused_and_put_back(digits):
    model = Normed()
    model.always = True
    before = model.norm.running_mean.clone()
    with pytest.raises(InputError, match="norm.running_mean"):
        examined(model.eval(), digits, {})
    assert torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("kind", ["batch statistics", "train mode behind a function"])
def test_an_answer_that_changes_with_the_batch_is_refused(kind, digits):
    network = Normed(track_running_stats=False).eval() if kind == "batch statistics" else Normed().train()
    model = network if kind == "batch statistics" else lambda x: network(x)
    with pytest.raises(InputError, match="changes with the batch size"):
        examined(model, digits, {})


def test_what_cannot_be_said_is_refused(networks, digits):
    model = networks["undefended"]
    for settings, error, fix in (
        ({"budget": "quik"}, UnknownNameError, "did you mean 'quick'"),
        ({"budget": 3}, ConfigError, "give 'quick'"),
        ({"eps": 8}, ConfigError, "write 8/255"),
        ({"attack": FGSM()}, ConfigError, "give PGD"),
        ({"attack": PGD(), "eps": 0.5}, ConfigError, "give one of them"),
        ({"attack": PGD(targeted=True)}, ConfigError, "untargeted"),
        ({"sources": {"undefended": "runs/x"}}, ConfigError, "must be callable"),
        ({"seed": -1}, ConfigError, "whole number"),
        ({"limit": 0}, ConfigError, "whole number"),
    ):
        with pytest.raises(error, match=fix):
            diagnose(model, digits, **settings)
    with pytest.raises(ConfigError, match="must be callable"):
        diagnose(3, digits)
    with pytest.raises(DataError, match="sorted"):
        diagnose(model, (torch.rand(5, 1, 8, 8), torch.ones(5, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="divided by 4"):
        dataclasses.replace(TINY, draw_curve=(1, 6))


def test_budgets_are_sound_and_full_is_as_the_thresholds_ask():
    full = BUDGETS["full"]
    assert min(full.images, full.some) >= 1000
    assert (full.draw_curve[-1], full.step_curve[-1], full.samples, full.restarts) == (80, 200, 10_000, 5)
    assert full.unbounded_steps >= 200
    assert full.eps_grid == ()  # it follows the norm and the radius


def test_the_same_seed_gives_the_same_diagnosis(networks, digits):
    budget = dataclasses.replace(FEW, images=20, some=10, slope_repeats=8)
    model = noisy(networks, "per_example")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (
            diagnose(model, digits, budget=budget, eps=EPS, engine="plain", batch_size=7).measurements for _ in range(2)
        )
    assert [measured.correct for measured in one] == [measured.correct for measured in other]
