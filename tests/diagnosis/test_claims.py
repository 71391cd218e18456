"""A claim is a number: how it is read, what refutes it, and what is said where nothing does."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from learn2perturb import records
from learn2perturb.attacks import PGD
from learn2perturb.diagnosis import QUICK, Claim, Diagnosis, diagnose
from learn2perturb.diagnosis.advice import repeated, settled
from learn2perturb.diagnosis.checks import CHECKS
from learn2perturb.diagnosis.record import Check, Measurement
from learn2perturb.diagnosis.trial import Trial, p_value, put_on_trial
from learn2perturb.diagnosis.verdict import conclude
from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.evaluation.intervals import accuracy_interval
from learn2perturb.records import PackedBits

# --- how a claim is read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("51 % under pgd20", Claim(0.51, "pgd20")),
        ("0.51 under pgd:steps=20", Claim(0.51, "pgd:steps=20")),
        ("51% under l_inf 8/255", Claim(0.51, norm="linf", eps=8 / 255)),
        ("51 % under pgd20 with 4/255", Claim(0.51, "pgd20", eps=4 / 255)),
        ("51.2 per cent under AutoAttack, l2 0.5", Claim(0.512, "autoattack", "l2", 0.5)),
        ("51 % under EOT-PGD-20 (8/255) by vote of 10", Claim(0.51, "eot-pgd-20", None, 8 / 255, "vote", 10)),
        ("51 % by mean probability of 8 of 1,000 images", Claim(0.51, predictor="mean_probability", members=8, n=1000)),
        ("51 % of 500 images by a majority vote", Claim(0.51, predictor="vote", n=500)),
        ("51 % under pgd:steps=50,eps=4/255,norm=l2", Claim(0.51, "pgd:steps=50", "l2", 4 / 255)),
        ("100 % accuracy against any attack at eps = .1", Claim(1.0, eps=0.1)),
        (0.51, Claim(0.51)),
        (1, Claim(1.0)),
    ],
)
def test_a_claim_is_read(text, expected):
    assert Claim.of(text) == expected
    assert Claim.of(str(expected)) == expected  # as it is printed it is read


@pytest.mark.parametrize(
    ("text", "error", "fix"),
    [
        ("51 % under pdg20", UnknownNameError, "did you mean 'pgd20'"),
        ("51", ConfigError, "write '51 %' or 0.51"),
        ("1 under pgd20", ConfigError, "write '1 %'"),
        ("150 %", ConfigError, "at most 100 %"),
        ("0 %", ConfigError, "more than 0 %"),
        ("51,5 % under pgd20", ConfigError, "write the accuracy with a point"),
        ("under pgd20", ConfigError, "does not begin with an accuracy; write ACCURACY .*such as '51 % under pgd20"),
        ("51 % by magic", ConfigError, "'by magic' is not understood; write ACCURACY"),
        ("51 % under pgd20 pgd7", ConfigError, "says two things of its attack"),
        ("51 % under pgd:eps=.1 with .2", ConfigError, "two things of its eps, 0.1 and 0.2"),
        ("51 % under transfer", ConfigError, "needs attack and source; name one of fgsm"),
        ("51 % under pgd:steps", ConfigError, "no KEY=VALUE"),
        ("51 % under l2", ConfigError, "write 'l2 0.5'"),
        ("51 % with 8", ConfigError, "write 8/255, not 8"),
        ("51 % with 8/0", ConfigError, "finite"),
        ("51 % by single of 5", ConfigError, "write 'by vote of 10'"),
        ("51 % by vote of 0", ConfigError, "whole number of at least 1"),
        ("51 % of " + "1" * 30 + " images", ConfigError, "not understood"),
        (51, ConfigError, "write 0.51"),
        (math.nan, ConfigError, "write 0.51"),
        (True, ConfigError, "give a text"),
        (None, ConfigError, "give a text"),
    ],
)
def test_what_is_no_claim_is_refused_with_the_fix(text, error, fix):
    with pytest.raises(error, match=fix) as caught:
        Claim.of(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (Claim(0.5), "single draws"),
        (Claim(0.5, predictor="single"), "single draws"),
        (Claim(0.5, predictor="mean_probability", members=8), "mean probability of 8"),
    ],
)
def test_what_is_claimed_to_answer_is_said(claim, said):
    assert claim.predicted == said


# --- what refutes it


def measured(name: str, right: int, n: int, scorings: int = 1) -> Measurement:
    """``right`` of ``n`` images are right in each scoring."""
    correct = np.tile(np.arange(n) < right, (scorings, 1))
    return Measurement(
        name, "PGD", {}, n, right / n, accuracy_interval(correct), PackedBits.pack(correct), 1.0, 1.0, 0.0
    )


def checks(**statuses: str) -> list[Check]:
    """All passed, but for those named, as ``_2="failed"``."""
    return [Check(n, one.name, statuses.get(f"_{n}", "passed"), "Text.") for n, one in CHECKS.items()]


def verdict(claim: float | Claim, right: int, n: int = 200, tried: int = 1, **statuses: str) -> tuple[str, str]:
    one = measured("reported", right, n)
    stated = Claim.of(claim).settled(norm="linf", eps=0.1, n=n)
    trial = put_on_trial([one], stated.accuracy, tried=["reported"] * tried)
    return conclude(
        checks(**statuses), lowest="reported", accuracy=one.accuracy, n=n, eps="linf 0.1", claim=stated, trial=trial,
        measured={"reported": one},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("claimed", "expected"),
    [(0.45, "refuted"), (0.44, "not refuted"), (0.38, "not refuted"), (0.2, "not refuted")],
)
def test_only_an_interval_below_the_claim_refutes(claimed, expected):
    """38 % of 200 images have the 95 % interval [31.6, 44.9]."""
    said, text = verdict(claimed, 76)
    assert said == expected
    assert text.startswith(f"{expected.upper()}: claimed {100 * claimed:g} % under any attack l_inf with 0.1")
    assert "38.0 % [31.6, 44.9] of 200 images (reported)" in text.splitlines()[0]
    assert ("may be chance" in text) == (claimed == 0.44)


def test_the_choice_among_many_attacks_is_corrected_for():
    assert verdict(0.46, 76)[0] == "refuted"
    assert verdict(0.46, 76, tried=3)[0] == "not refuted"
    assert verdict(0.5, 76, tried=10)[0] == "refuted"


@pytest.mark.parametrize("status", ["failed", "not shown"])
@pytest.mark.parametrize("number", list(CHECKS))
def test_a_check_that_is_not_passed_forbids_not_refuted_but_not_refuted_by_an_attack(number, status):
    said, text = verdict(0.3, 76, **{f"_{number}": status})
    assert said == "not shown"
    assert text.startswith("NOT SHOWN: claimed 30 %")
    assert f"{number} ({CHECKS[number].name})" in text.splitlines()[0]
    assert verdict(0.6, 76, **{f"_{number}": status})[0] == "refuted"
    assert verdict(0.3, 76, **{f"_{number}": "does not apply"})[0] == "not refuted"


def test_few_images_confirm_nothing_but_may_refute():
    assert verdict(0.3, 38, n=99)[0] == "not shown"
    assert verdict(0.3, 38, n=100)[0] == "not refuted"
    assert verdict(0.9, 38, n=99)[0] == "refuted"


@pytest.mark.parametrize(("claimed", "n", "said"), [(0.3, 200, "points less than claimed is seen in 80 %"),
                                                    (0.02, 100, "no attack is sure to be seen")])  # fmt: skip
def test_what_would_be_seen_of_so_many_images_is_said(claimed, n, said):
    text = verdict(claimed, 76 if n == 200 else 5, n=n)[1]
    assert f"Power: on {n} images" in text and said in text


def test_a_claim_of_an_accuracy_that_is_hit_exactly():
    assert verdict(1.0, 200)[0] == "not refuted"
    assert verdict(0.02, 0)[0] == "refuted"  # nothing is left of 200: up to 1.9 %
    assert verdict(0.018, 0)[0] == "not refuted"


def test_an_honest_claim_is_seldom_refuted_and_the_drop_that_is_named_is_seen_in_80_per_cent():
    rng, n, tried = np.random.default_rng(0), 150, 12

    def refuted(true: float) -> float:
        found = []
        for _ in range(400):
            attacks = [measured("x", int(rng.binomial(n, true)), n)]
            found.append(put_on_trial(attacks, 0.5, tried=["x"] * tried).refuted)
        return float(np.mean(found))

    drop = put_on_trial([measured("x", 75, n)], 0.5, tried=["x"] * tried).drop
    assert 0.1 < drop < 0.2
    assert refuted(0.5) <= 0.02
    assert refuted(0.5 - drop) == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize("tried", [1, 12])
@pytest.mark.parametrize(
    ("right", "n", "claimed"), [(40, 200, 0.5), (75, 150, 0.9), (30, 40, 1.0), (0, 50, 0.3), (1, 1, 0.5)]
)
def test_the_drop_is_a_sum_of_quantiles_of_the_error_at_what_is_claimed(right, n, claimed, tried):
    one = measured("x", right, n)
    share = right / n

    def error(p: float) -> float:
        p = min(max(p, 1 / n), 1 - 1 / n) if n > 1 else 0.5
        return math.sqrt(p * (1 - p) / n)

    wider = (one.interval.high - one.interval.low) / (2 * 1.959964) / error(share) if 0 < share < 1 else 1.0
    expected = (norm.isf(0.025 / tried) + norm.ppf(0.8)) * wider * error(claimed)
    assert put_on_trial([one], claimed, tried=["x"] * tried).drop == pytest.approx(expected, rel=1e-6)


def test_the_power_knows_scorings_that_agree_and_scorings_that_do_not():
    n, rng = 100, np.random.default_rng(0)
    alike = measured("alike", 50, n, scorings=10)
    bits = rng.random((10, n)) < 0.5
    fresh = dataclasses.replace(
        alike, accuracy=float(bits.mean()), interval=accuracy_interval(bits), correct=PackedBits.pack(bits)
    )
    one, other = (put_on_trial([m], 0.5, tried=["x"]).drop for m in (alike, fresh))
    assert other < one / 2


def test_without_a_claim_nothing_stands():
    for statuses, expected, head in (
        ({}, "trusted", "GRADIENTS CAN BE TRUSTED: every check that applies passed."),
        ({"_2": "failed", "_8": "failed"}, "not trusted", "GRADIENTS CANNOT BE TRUSTED: check 2 ("),
        ({"_9": "failed"}, "not trusted", "THE DRAWS CANNOT BE TRUSTED"),
        ({"_6": "failed"}, "not trusted", "THE NOISE HIDES GRADIENTS"),
        ({"_8": "failed"}, "not trusted", "THE REPORTED ATTACK IS TOO WEAK"),
        ({"_2": "not shown"}, "not shown", "NOT SHOWN whether attacks can be trusted here"),
        ({"_10": "does not apply"}, "trusted", "NO GRADIENTS, so attacks from values decide: every check"),
    ):
        said, text = conclude(
            checks(**statuses), lowest="loss margin", accuracy=0.015, n=200, eps="linf 8/255"
        )  # fmt: skip
        assert said == expected
        assert text.startswith(head)
        assert "1.5 % (loss margin)" in text.splitlines()[0]
        assert "stand" not in text.lower()
        assert "cannot be seen" not in text  # no check compared accuracies, so nothing was too small to be seen
        assert "claim" not in text.lower()


# --- a whole diagnosis


FEW = dataclasses.replace(
    QUICK, name="few", images=120, some=100, scorings=4, eot=2, sweep_eot=1, steps=8, unbounded_steps=20, samples=3,
    judge_draws=4, eps_grid=(0.05, 0.4, 0.5), draw_curve=(1, 4), step_curve=(8, 16), restarts=2, square_queries=5,
    square_draws=1, slope_images=2, slope_repeats=4, real_queries=20, descent_steps=2, descent_directions=2,
    surrogate_queries=48,
)  # fmt: skip
EPS = 0.1


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Images of four pixels whose class is where the brightest is."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.rand(200, 1, 2, 2, generator=generator) + 0.1
    y = torch.arange(200) % 4
    x.flatten(1)[torch.arange(200), y] += 0.1 + 0.25 * torch.rand(200, generator=generator)
    return x.clamp(0, 1), x.flatten(1).argmax(dim=1)


def plain(x: Tensor) -> Tensor:
    return 20 * x.flatten(1)


def noisy(x: Tensor) -> Tensor:
    return 20 * (x.flatten(1) + 0.15 * torch.randn(len(x), 4))


def examined(model, images, claim=None, **settings) -> Diagnosis:
    settings = {"budget": FEW, "eps": EPS, "engine": "plain", "sources": {"undefended": plain}} | settings
    return diagnose(model, images, claim=claim, progress=False, **settings)


@pytest.fixture(scope="module")
def of_plain(images) -> Diagnosis:
    return examined(plain, images, "90 % under pgd8")


def test_a_false_claim_is_refuted_and_says_how_to_repeat_it(of_plain, images, tmp_path):
    text = str(of_plain)
    assert of_plain.verdict == "refuted"
    assert text.splitlines()[0].startswith("REFUTED: claimed 90 % under pgd8 l_inf with 0.1 of 120 images; found ")
    assert "To repeat it: the same call with seed=0" in text
    assert "pgd8 itself leaves" in text
    by = of_plain.measurement(of_plain.trial.found)
    assert f"{{'found': PGD(eps=0.1, step_size=0.025, steps=8)}}, limit={by.n}" in text
    assert Diagnosis.load(of_plain.save(tmp_path / "d.json")) == of_plain


def test_the_same_figures_do_not_refute_a_claim_below_them(of_plain, images):
    lowest = of_plain.measurement(of_plain.lowest).accuracy
    below = examined(plain, images, lowest - 0.05)
    assert below.verdict in ("not refuted", "not shown")
    assert not below.trial.refuted
    assert below.measurement(below.lowest).accuracy == lowest
    none = examined(plain, images)
    assert (none.claim, none.trial) == (None, None)
    assert none.measurement(none.lowest).accuracy == lowest


def test_a_claim_is_forged_in_vain(of_plain, tmp_path):
    trial = of_plain.trial
    for what, reason in (
        ({"verdict": "not refuted"}, "its checks give 'refuted'"),
        ({"claim": dataclasses.replace(of_plain.claim, accuracy=0.01)}, "is not that of its accuracy and the claim"),
        ({"claim": dataclasses.replace(of_plain.claim, eps=0.2)}, "another ball"),
        ({"claim": None}, "without its claim"),
        ({"trial": dataclasses.replace(trial, found="magic")}, "lacks 'magic'"),
        ({"trial": dataclasses.replace(trial, p_values=dict.fromkeys(trial.p_values, 0.5))}, "is not that of its"),
    ):
        path = dataclasses.replace(of_plain, **what).save(tmp_path / "forged.json")
        with pytest.raises(CheckpointError, match=reason):
            Diagnosis.load(path)


def test_the_strongest_attacks_are_scored_by_draws_that_did_not_choose_them(images):
    found = examined(noisy, images, noise_off=plain)
    assert found.lowest.endswith(", fresh draws")
    chosen = found.lowest.removesuffix(", fresh draws")
    first, second = (found.measurement(name).correct.unpack() for name in (chosen, found.lowest))
    assert first.shape == second.shape
    assert (first != second).any()
    afresh = [one for one in found.measurements if one.name.endswith(", fresh draws")]
    assert len(afresh) == 4


def test_the_predictor_that_is_claimed_is_the_one_that_is_scored(images):
    single, vote = (
        examined(noisy, images, claim, eps=0.02, noise_off=plain)
        for claim in ("60 %", "99.9 % under pgd8 by vote of 25")
    )
    by = vote.measurement(vote.lowest)
    assert by.name.endswith(", vote of 25")
    assert {"through the mean, loss ce, vote of 25", "through the mean, loss margin, vote of 25"} <= {
        one.name for one in vote.measurements
    }
    # A vote over 25 draws is nearly the network without noise, far above one draw of it.
    assert by.accuracy > single.measurement(single.lowest).accuracy + 0.1
    assert vote.claim == Claim(0.999, "pgd8", "linf", 0.02, "vote", 25, 120)
    assert vote.verdict == "refuted"
    through = dataclasses.replace(vote.trial, found="through the mean, loss ce, vote of 25")
    assert "predictor='vote', members=25, limit=120" in repeated(dataclasses.replace(vote, trial=through))[1]
    own = vote.measurement("reported, vote of 25")
    assert f"pgd8 itself leaves {100 * own.accuracy:.1f} %" in vote.summary


def test_the_attack_of_the_claim_is_the_one_that_is_run(images):
    found = examined(plain, images, "51 % under pgd:steps=5,step_size=0.02")
    reported = found.measurement("reported")
    assert (reported.parameters["steps"], reported.parameters["step_size"]) == (5, 0.02)
    other = examined(plain, images, "51 % under fgsm")
    assert other.measurement("fgsm").attack == "FGSM"
    assert other.measurement("reported").parameters["steps"] == FEW.steps
    given = examined(plain, images, "51 % under pgd5", eps=None, attack=PGD(EPS, 0.025, 8))
    assert given.measurement("pgd5").parameters["steps"] == 5
    with pytest.raises(ConfigError, match="the attack pgd:step=3 of the claim: attack 'pgd' has no setting 'step'"):
        examined(plain, images, "51 % under pgd:step=3")


@pytest.mark.parametrize(
    ("settings", "claim", "ball", "n"),
    [
        ({"eps": None}, "51 % with 0.05", ("linf", 0.05), 120),
        ({"eps": None}, "51 % under l2 0.3", ("l2", 0.3), 120),
        ({"eps": 0.3}, "51 % under l2 0.3", ("l2", 0.3), 120),
        ({"eps": 0.3, "norm": "l2"}, "51 % under pgd8", ("l2", 0.3), 120),
        ({"eps": 0.07}, "51 %", ("linf", 0.07), 120),
        ({}, "51 % of 30 images", ("linf", EPS), 30),
        ({"limit": 30}, "51 % of 30 images", ("linf", EPS), 30),
    ],
)
def test_what_the_claim_says_is_taken_where_nothing_else_is_given(settings, claim, ball, n, images):
    small = dataclasses.replace(FEW, images=30, some=20) if n == 30 else dataclasses.replace(FEW, some=20)
    found = examined(plain, images, claim, budget=small, **settings)
    assert (found.norm, found.eps) == ball
    assert found.measurement("clean").n == n
    assert (found.claim.norm, found.claim.eps, found.claim.n) == (*ball, n)


@pytest.mark.parametrize(
    ("settings", "claim", "fix"),
    [
        ({}, "51 % with 0.05", "of eps 0.05 and 0.1 is to be diagnosed; give one"),
        ({"attack": PGD(EPS, steps=3)}, "51 % with 0.05", "of eps 0.05 and 0.1 is"),
        ({"attack": PGD(EPS, steps=3)}, "51 % under l2 0.1", "of l2 and linf is to be diagnosed"),
        ({"norm": "linf"}, "51 % under l2 0.1", "of l2 and linf is to be diagnosed"),
        ({"eps": 0.3, "norm": "l2"}, "51 % with 0.1", "of eps 0.1 and 0.3"),
        ({"limit": 20}, "51 % of 30 images", "of 30 images and limit is 20"),
        ({}, "51 % of 500 images", "of 500 images and the data hold 200"),
    ],
)
def test_what_contradicts_the_claim_is_refused(settings, claim, fix, images):
    with pytest.raises(ConfigError, match=fix):
        examined(plain, images, claim, **settings)


# --- what would settle it


def test_what_is_not_shown_names_what_would_settle_it(images):
    found = examined(plain, images, 0.3, sources={})
    assert found.verdict == "not shown"
    assert any('sources={"undefended": network' in text for text in settled(found))
    run = dataclasses.replace(
        found, metadata=found.metadata | {"command": ["learn2perturb", "diagnose", "a run", "--quick"], "run": True}
    )
    assert "learn2perturb diagnose 'a run' --quick --train-sources" in str(run)
    factory = dataclasses.replace(run, metadata=run.metadata | {"run": False})
    assert "--quick --train-sources" in str(factory)
    random = examined(noisy, images, 0.3)
    assert random.check(6).status == "not shown"
    assert any("noise_off=network" in text for text in settled(random))


def test_a_run_that_is_refuted_names_commands(of_plain):
    command = ["learn2perturb", "diagnose", "runs/x", "--quick", "--claim", "90 % under pgd8", "--seed", "0"]
    run = dataclasses.replace(
        of_plain, metadata=of_plain.metadata | {"command": command, "run": True, "model": "runs/x"}
    )
    again, alone = repeated(run)
    assert again == "learn2perturb diagnose runs/x --quick --claim '90 % under pgd8' --seed 0"
    assert alone.startswith("learn2perturb evaluate runs/x --attack pgd:eps=0.1,step_size=0.025,steps=8")
    assert alone.endswith("--seed 0")


# --- records from before there were claims


@pytest.mark.parametrize(("then", "now"), [("stands", "trusted"), ("does not stand", "not trusted")])
def test_a_record_from_before_claims_loads_and_stands_no_more(then, now, images, tmp_path):
    found = examined(plain, images)
    first = found.check(1)
    if now == "not trusted":
        found = dataclasses.replace(found, checks=(dataclasses.replace(first, status="failed"), *found.checks[1:]))
    fields = json.loads(records.to_json(dataclasses.replace(found, verdict=now)))
    for key in ("checksum", "claim", "trial"):
        del fields[key]
    for one in fields["measurements"]:
        del one["by_itself"]
    for check in fields["checks"]:
        check["status"] = check["status"].replace("not shown", "passed")
        check["status"] = "passed" if now == "trusted" else check["status"]
        check["claims"] = []
    fields["version"], fields["verdict"] = 1, then
    fields["summary"] = {"stands": "THE CLAIM STANDS: a.", "does not stand": "THE CLAIM DOES NOT STAND as it is: a."}[
        then
    ]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(fields))
    old = Diagnosis.load(path)
    assert old.verdict == now
    assert "stand" not in str(old).splitlines()[0].lower()
    assert (old.claim, old.trial) == (None, None)


def test_p_values_come_from_the_upper_half_of_the_interval():
    one = measured("x", 76, 200)
    assert p_value(one, one.interval.high) == pytest.approx(0.025)
    assert p_value(one, one.accuracy) == pytest.approx(0.5)
    assert Trial("x", ("x",), {"x": 0.024}, 0.1).refuted
    assert not Trial("x", ("x", "y"), {"x": 0.024}, 0.1).refuted
