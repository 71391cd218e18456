"""Every default and every number of the evaluations, by value: a change of one is a change of results."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest

from learn2perturb.certification import Certification, certify
from learn2perturb.certification.gap import RiskGap
from learn2perturb.certification.record import ABSTAINED
from learn2perturb.diagnosis import FULL, QUICK, Diagnosis, blackbox, diagnose, draws, truth, verdict, whitebox
from learn2perturb.diagnosis.budget import (
    BUDGETS,
    Budget,
    budget_of,
    resized,
    with_grid,
)
from learn2perturb.diagnosis.checks import gradient_passes
from learn2perturb.diagnosis.comparing import DiagnosisComparison
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation import (
    AttackedImages,
    EvaluateConfig,
    Evaluation,
    Predictor,
    Row,
    attacked,
    compare,
    deploying,
    evaluate,
    evaluating,
    inputs,
    pace,
    pictures,
    replays,
    rows,
    significance,
    target,
    values,
)
from learn2perturb.evaluation import intervals as of_images
from learn2perturb.evaluation.arrays import black_box
from learn2perturb.evaluation.comparing import Comparison
from learn2perturb.evaluation.keeping import PartialEvaluation
from learn2perturb.evaluation.result import WORST_OF
from learn2perturb.evaluation.robustbench import model_info
from learn2perturb.evaluation.significance import TWO_SIGMA
from learn2perturb.experiments.facts import PAPER_EOT
from learn2perturb.experiments.folder import StudyFolder
from learn2perturb.experiments.sweeping import Trials
from learn2perturb.experiments.view import View
from learn2perturb.runs.noise_maps import NoiseMaps

ARGUMENTS: dict[Callable[..., Any], dict[str, Any]] = {
    evaluate: {
        "attacks": None, "draws": 10, "predictor": "single", "members": 10, "eps": None, "noise_off": True, "seed": 0,
        "batch_size": 256, "limit": None, "device": None, "engine": "plain", "name": None, "progress": True,
        "keep": None,
    },
    certify: {
        "n0": 100, "n": 100_000, "alpha": 0.001, "method": "auto", "sigma": None, "eps": 8 / 255, "limit": None,
        "batch_size": 1000, "seed": 0, "device": None, "name": None, "progress": True,
    },
    diagnose: {
        "budget": "quick", "eps": None, "attack": None, "sources": None, "noise_off": None, "seed": 0, "limit": None,
        "batch_size": 100, "device": None, "engine": None, "name": None, "progress": True,
    },
    compare: {"pairs": (), "confidence": 0.95},
    Predictor.__init__: {"rule": "mean_probability", "members": 10},
    of_images.wilson: {"confidence": 0.95},
    of_images.bootstrap_mean: {"resamples": 2000, "seed": 0, "confidence": 0.95},
    of_images.paired_bootstrap: {"resamples": 2000, "seed": 0, "confidence": 0.95},
    of_images.accuracy_interval: {"confidence": 0.95},
    of_images.paired_difference: {"confidence": 0.95},
    of_images.Interval: {"resamples": 0, "note": "", "freedom": math.inf},
    of_images.Estimate: {"freedom": math.inf},
    of_images.Scores: {"batches": (), "random": False},
    black_box: {"channels_last": False},
    model_info: {"weights": None, "noise": True},
    pace.guessed_passes: {"images": 1},
    replays.draws_afresh: {"seed": 0},
    target.Target.check_alike: {"images": True},
    Evaluation.row: {"noise": True},
    Row: {"pooled": (), "zero_gradients": None, "c_rising": None, "loss_falling": None},
    Evaluation: {"confidence": 0.95, "resamples": 0, "batches": None},
    EvaluateConfig: {
        "draws": 10, "predictor": "single", "members": 10, "eps": None, "noise_off": True, "clean": True, "seed": 0,
        "batch_size": 256, "limit": None, "engine": "plain",
    },
}  # fmt: skip


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__qualname__)
def test_arguments_that_are_left_out(function):
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert {name: found[name] for name in ARGUMENTS[function]} == ARGUMENTS[function]


NUMBERS = {
    "kept images of a kind": (attacked.EACH, 8),
    "a program beside its network": (
        (deploying._CLOSE, deploying._FAR, deploying._IMAGES, deploying._DRAWS), (1e-3, 6.0, 4, 32),
    ),
    "zero gradients that are worth a warning": (evaluating._ZERO_GRADIENTS, 0.05),
    "an answer that depends on its batch": ((inputs._IMAGES, inputs._TOLERANCE, inputs._LARGEST), (8, 1e-3, 1e6)),
    "a model that replays": ((replays._TOLERANCE, replays._PASSES), (1e-3, 64)),
    "intervals": (
        (of_images._ROUNDING, of_images._SCATTER, of_images._FEW, of_images._FEWEST, of_images._USUAL),
        (1e-9, 5.0, 4.0, 2.7, 0.95),
    ),
    "rounding of accuracies": (significance._ROUNDING, 1e-9),
    "reports": ((pace._LONG, pace._ALMOST, pace._FAR_LESS), (60.0, 0.99, 2.0)),
    "sheets": ((pictures._GAP, pictures._SIDE), (2, 64)),
    "answers of a black box": ((values._SMALLEST, values._ROWS), (1e-12, 4)),
    "a seed gives one number only with these": (
        (EvaluateConfig.seed, EvaluateConfig.draws, EvaluateConfig.members, EvaluateConfig.batch_size, PAPER_EOT),
        (0, 10, 10, 256, 1),
    ),
    "intervals of evaluate": (rows.CONFIDENCE, 0.95),
    "an adversary's draws": (WORST_OF, (1, 10, 100)),
    "two standard errors, one-sided": (TWO_SIGMA, 0.022750131948179195),
    "no class": (ABSTAINED, -1),
    # Thresholds of the verdicts: tests/diagnosis/test_verdicts.py tries what they decide.
    "check 3: left unbroken by the whole box": (whitebox.UNBOUNDED_LEFT, 0.01),
    "check 7: more draws or steps change less": (whitebox.CONVERGED, 0.005),
    "check 8: another loss is ahead by no more": (whitebox.BEST_AHEAD, 0.02),
    "checks 2 and 4: images that only they break": (blackbox.NEW_BREAKS, 0.01),
    "check 6: noise off is lower by no more": (blackbox.NOISE_OFF_BELOW, 0.05),
    "check 9": ((draws.COUNTS, draws.TOLERANCE), ((1, 4, 16), 0.1)),
    "check 10": ((truth.STEP, truth.DRAWS, truth.MEDIAN_OFF, truth.SPREAD_OFF), (0.25 / 255, 4, 0.1, 0.25)),
    "check 10: points of a neighbourhood": (truth.NEIGHBOURS, 32),
    "fewer images show nothing": (verdict.FEWEST_IMAGES, 100),
    "images that say whether a model is random": (evaluating._PROBED, 8),
    "share of zero gradients that is said aloud": (evaluating._ZERO_GRADIENTS, 0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    found, expected = NUMBERS[name]
    assert found == expected


VERSIONS = {
    AttackedImages: 1, Certification: 1, Comparison: 2, Diagnosis: 2, DiagnosisComparison: 1, Evaluation: 2,
    NoiseMaps: 1, PartialEvaluation: 1, RiskGap: 1, StudyFolder: 1, Trials: 1, View: 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", VERSIONS, ids=lambda kind: kind.__name__)
def test_versions_of_the_records_change_on_purpose_only(kind):
    assert VERSIONS[kind] == kind.VERSION
    assert kind.FORMAT.startswith("learn2perturb.")


# --- budgets of a diagnosis

PRESETS = {
    "quick": {
        "images": 200, "some": 100, "scorings": 10, "eot": 8, "steps": 20, "sweep_eot": 4, "unbounded_steps": 200,
        "unbounded_eot": 1, "samples": 200, "sample_draws": 1, "finalists": 3, "judge_draws": 20, "eps_grid": (),
        "draw_curve": (1, 8, 32), "step_curve": (5, 20, 50, 100), "restarts": 5, "targets": 1, "square_queries": 300,
        "square_draws": 4, "slope_images": 8, "slope_repeats": 24, "real_queries": 1000, "descent_steps": 40,
        "descent_directions": 16, "surrogate_queries": 10_000,
    },
    "full": {
        "images": 1000, "some": 1000, "scorings": 10, "eot": 20, "steps": 20, "sweep_eot": 20, "unbounded_steps": 200,
        "unbounded_eot": 5, "samples": 10_000, "sample_draws": 2, "finalists": 5, "judge_draws": 100, "eps_grid": (),
        "draw_curve": (1, 5, 20, 80), "step_curve": (5, 20, 50, 100, 200), "restarts": 5, "targets": 9,
        "square_queries": 5000, "square_draws": 20, "slope_images": 16, "slope_repeats": 48, "real_queries": 5000,
        "descent_steps": 100, "descent_directions": 32, "surrogate_queries": 50_000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_the_numbers_of_a_budget(name):
    found = dataclasses.asdict(BUDGETS[name])
    assert {key: found[key] for key in ("name", *PRESETS[name])} == {"name": name} | PRESETS[name]
    assert {"quick": QUICK, "full": FULL} == BUDGETS


INTEGERS = [name for name, value in PRESETS["quick"].items() if isinstance(value, int)]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_a_number_of_a_budget_is_whole_and_at_least_one(name, value):
    with pytest.raises(ConfigError, match=f"^{name} of the budget is {value!r}, must be a whole number >= 1$"):
        budget_of("quick", **{name: value})


@pytest.mark.parametrize("name", [name for name in INTEGERS if name != "images"])
def test_one_is_a_number_of_a_budget(name):
    assert getattr(budget_of("quick", **{name: 1}), name) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"some": 201}, "some is 201 and images 200; allowed: some <= images"),
        ({"draw_curve": ()}, r"draw_curve is \(\); it must rise, and hold its last number divided by 4"),
        ({"draw_curve": (1, 8, 8, 32)}, "draw_curve is"),
        ({"draw_curve": (8, 1, 32)}, "draw_curve is"),
        ({"draw_curve": (1, 16, 32)}, "draw_curve is"),
        ({"draw_curve": (7, 30)}, "draw_curve is"),
        ({"step_curve": (1, 4)}, "step_curve is .*; it must rise, and hold its last number divided by 2"),
        ({"step_curve": (2, 5)}, "step_curve is"),
        ({"eps_grid": (0.1, 0.1)}, "eps_grid is .* it must rise from above 0"),
        ({"eps_grid": (0.2, 0.1)}, "eps_grid is"),
        ({"eps_grid": (0.0, 0.1)}, "eps_grid is"),
        ({"eps_grid": (-0.1, 0.1)}, "eps_grid is"),
    ],
)
def test_what_a_budget_cannot_be(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        budget_of("quick", **changes)


@pytest.mark.parametrize(
    "changes", [{"some": 200}, {"draw_curve": (1, 4)}, {"step_curve": (1, 2)}, {"eps_grid": (1e-9,)}, {"eps_grid": ()}]
)
def test_what_a_budget_can_be(changes):
    found = budget_of("quick", **changes)
    assert found == dataclasses.replace(QUICK, **changes)
    assert budget_of(found) is found


def test_a_budget_is_a_name_or_a_budget():
    assert budget_of("full") is FULL
    with pytest.raises(UnknownNameError, match="did you mean 'quick'"):
        budget_of("quik")
    with pytest.raises(ConfigError, match="budget is a int; give 'quick', 'full' or a Budget"):
        budget_of(3)


def test_fewer_images_are_fewer_in_the_costly_checks_too():
    assert [(one.images, one.some) for one in (resized(QUICK, 300), resized(QUICK, 100), resized(QUICK, 40))] == [
        (300, 100), (100, 100), (40, 40),
    ]  # fmt: skip


def test_the_radii_of_check_5_go_to_where_accuracy_is_chance():
    grid = [2**k / 255 for k in range(1, 8)]
    assert with_grid(QUICK, "linf", 8 / 255, 3072).eps_grid == pytest.approx([*grid[:-1], 128 / 255])
    own = dataclasses.replace(QUICK, eps_grid=(0.1, 0.5))
    assert with_grid(own, "linf", 8 / 255, 3072).eps_grid == (0.1, 0.5)
    assert with_grid(dataclasses.replace(QUICK, eps_grid=(0.1, 0.49)), "linf", 0.1, 16).eps_grid == (0.1, 0.49, 0.5)
    for last, reached in ((0.5 * (1 - 0.5e-9), True), (0.5 * (1 - 2e-9), False)):
        found = with_grid(dataclasses.replace(QUICK, eps_grid=(last,)), "linf", 0.1, 16).eps_grid
        assert found == ((last,) if reached else (last, 0.5))


def test_the_passes_of_a_diagnosis_are_those_of_its_checks():
    budget = Budget(
        name="primes", images=101, some=97, scorings=2, eot=3, steps=5, sweep_eot=7, unbounded_steps=11,
        unbounded_eot=13, samples=17, sample_draws=19, finalists=1, judge_draws=1, eps_grid=(0.1, 0.2, 0.5),
        draw_curve=(1, 4), step_curve=(1, 2), restarts=23, targets=29, square_queries=31, square_draws=37,
        slope_images=1, slope_repeats=1,
    )  # fmt: skip
    # One gradient a step: the reported attack and two transfers; sizes, four losses, restarts; curve; of the whole box
    # an eighth.
    plain = 101 * 5 * 3 + 97 * (5 * (3 + 4 + 23) + 3 + 1)
    assert gradient_passes(budget, stochastic=False, sources=2) == plain
    reported = 5 * (3 + 2) + 2 * 5
    # Two losses, two averages that cost a third more, held draws; each as six with the sizes.
    compared = 7 * 5 * (3 + 6 + 29 + 23)
    curves = 5 * (1 + 4) + 7 * (1 + 2)
    forward = (31 * 37 + 17 * 19) // 3  # a pass without a gradient is a third of one with
    noisy = 101 * reported + 97 * (compared + curves + forward + 1 * 13)
    assert gradient_passes(budget, stochastic=True, sources=2) == noisy
