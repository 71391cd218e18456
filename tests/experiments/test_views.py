"""Views by closed forms on records made by hand: means, intervals, differences, the paper, what is missing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from learn2perturb.certification.record import Certification
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation import compare
from learn2perturb.evaluation.intervals import wilson
from learn2perturb.experiments.study_file import build_study, read_study
from learn2perturb.experiments.views import View, build_views
from learn2perturb.records import PackedIntegers
from tests.experiments.hand_made import evaluation, results, study

SEEDS = {"seeds": [1, 2, 3]}
PGD_AT, PNI, PGD = ("pgd_at",), ("pni",), ("pgd",)


def one(of, answer, **more) -> View:
    """Return the only view."""
    (view,) = build_views(results(of, answer, **more))
    return view


def seed(pair) -> int:
    return pair.run.label("seed")


def test_the_deviation_over_seeds_stands_apart_from_the_interval_over_images():
    view = one(study(**SEEDS), lambda pair: evaluation({1: 50, 2: 60, 3: 70}[seed(pair)]))
    cell = view.cell(PNI, PGD)
    assert (cell.value, cell.seeds, cell.wanted, cell.n) == (pytest.approx(0.6), 3, 3, 100)
    assert cell.std == pytest.approx(0.1)
    half = 4.302652729911275 * 0.1 / 3**0.5  # Student's 97.5 % quantile of two degrees of freedom
    assert (cell.over_seeds.low, cell.over_seeds.high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))
    ends = [wilson(k, 100) for k in (50, 60, 70)]
    assert cell.interval.low == pytest.approx(sum(end.low for end in ends) / 3)
    assert cell.interval.high == pytest.approx(sum(end.high for end in ends) / 3)


def test_one_seed_says_nothing_of_others():
    cell = one(study(), lambda pair: evaluation(50)).cell(PNI, PGD)
    assert (cell.std, cell.over_seeds) == (None, None)


def test_what_has_no_record_is_missing_and_never_filled():
    view = one(
        study(**SEEDS), lambda pair: evaluation(60) if pair.run.label("defense") == "pni" and seed(pair) < 3 else None
    )
    assert view.missing == 4
    none, some = view.cell(PGD_AT, PGD), view.cell(PNI, PGD)
    assert (none.value, none.interval, none.seeds, none.wanted) == (None, None, 0, 3)
    assert (some.value, some.seeds, some.wanted) == (pytest.approx(0.6), 2, 3)
    text = str(view)
    assert "| pgd_at | missing |" in text
    assert "(2 of 3 seeds)" in text
    assert "4 are missing" in text


def test_a_difference_is_paired_as_compare_pairs_it_and_corrected():
    cells = {"pgd": {"attack": "pgd20"}, "fgsm": {"attack": "fgsm"}}
    right = {"pgd_at": 50, "pni": 58}
    view = one(
        study({"baseline": {"defense": "pgd_at"}}, cells=cells),
        lambda pair: evaluation(right[pair.run.label("defense")]),
    )
    found = compare(evaluation(58), evaluation(50), pairs=[("attacked", "attacked")]).differences[0]
    assert len(view.differences) == 2
    for difference in view.differences:
        assert difference.row == PNI
        assert difference.difference == pytest.approx(0.08)
        assert (difference.interval.low, difference.interval.high) == (found.interval.low, found.interval.high)
        assert difference.p_value == found.mcnemar == pytest.approx(2 * 0.5**8)
        assert difference.p_holm == pytest.approx(2 * difference.p_value)
        assert difference.over_seeds is None
        assert difference.sentence == "better, of one seed"


def test_a_difference_over_seeds_pairs_each_seed_with_its_own():
    right = {"pgd_at": {1: 30, 2: 50, 3: 70}, "pni": {1: 39, 2: 60, 3: 81}}
    view = one(
        study({"baseline": {"defense": "pgd_at"}}, **SEEDS),
        lambda pair: evaluation(right[pair.run.label("defense")][seed(pair)]),
    )
    (difference,) = view.differences
    assert difference.difference == pytest.approx(0.1)
    # Of 0.09, 0.10, 0.11: far from nothing, though each defense scatters by 0.2 over seeds.
    assert difference.over_seeds.low == pytest.approx(0.1 - 4.302652729911275 * 0.01 / 3**0.5)
    assert (difference.seeds, difference.sentence) == (3, "better")


def test_a_difference_that_its_seeds_do_not_bear_out_is_of_these_seeds_only():
    right = {"pgd_at": {1: 30, 2: 30, 3: 30}, "pni": {1: 30, 2: 30, 3: 90}}
    view = one(
        study({"baseline": {"defense": "pgd_at"}}, **SEEDS),
        lambda pair: evaluation(right[pair.run.label("defense")][seed(pair)]),
    )
    assert view.differences[0].sentence == "better for these seeds, not shown for others"


def test_the_baseline_of_a_variant_is_the_run_that_is_most_like_it():
    runs = {
        "plain": {"defense": "pgd_at"},
        "noisy": {"defense": "learn2perturb", "options.gamma": [1e-4, 1e-3]},
    }
    of = study({"rows": ["run"], "baseline": {"name": "plain"}}, runs=runs)
    view = one(of, lambda pair: evaluation(50 if pair.run.name == "plain" else 60))
    assert [difference.difference for difference in view.differences] == [pytest.approx(0.1)] * 2


def test_a_seed_is_never_compared_with_another_seed_of_the_baseline():
    runs = {"plain": {"defense": "pgd_at", "seed": 1}, "noisy": {"defense": "pni", "seed": [1, 2]}}
    of = study({"rows": ["run"], "baseline": {"defense": "pgd_at"}}, runs=runs)
    (difference,) = one(of, lambda pair: evaluation(60 if pair.run.name == "noisy" else 50)).differences
    assert difference.seeds == 1


def test_a_baseline_is_of_the_same_network_unless_it_is_named():
    runs = {
        "small": {"defense": "pgd_at", "model": "resnet20"},
        "large": {"defense": "pni", "model": "resnet18"},
    }
    right = {"small": 50, "large": 60}
    by_name = study({"rows": ["run"], "baseline": {"name": "small"}}, runs=runs)
    view = one(by_name, lambda pair: evaluation(right[pair.run.name]))
    assert [difference.difference for difference in view.differences] == [pytest.approx(0.1)]
    view = one(
        study({"rows": ["run"], "baseline": {"defense": "pgd_at"}}, runs=runs),
        lambda pair: evaluation(right[pair.run.name]),
    )
    assert view.differences == ()
    assert any(note.startswith("Not compared, for want of a baseline") for note in view.notes)


def test_images_that_differ_are_neither_averaged_nor_compared():
    right = {1: evaluation(50), 2: evaluation(60, images="b" * 16)}
    view = one(study(seeds=[1, 2]), lambda pair: right[seed(pair)])
    assert (view.cell(PNI, PGD).value, view.cell(PNI, PGD).text) == (None, "unlike")
    (said,) = [note for note in view.notes if "unlike images" in note]
    assert said.startswith("No mean of pgd_at, pgd and 1 more: ")


def test_what_each_seed_holds_out_is_averaged():
    right = {1: evaluation(50), 2: evaluation(60, images="b" * 16), 3: evaluation(30, n=50, images="c" * 16)}
    held_out = {"evaluate": {"split": "validation"}, "train": {"validation": 0.1}}
    view = one(study(seeds=[1, 2], **held_out), lambda pair: right[seed(pair)])
    assert view.cell(PNI, PGD).value == pytest.approx(0.55)
    assert any("100 images of cifar10, held out by each seed" in note for note in view.notes)
    view = one(study(seeds=[1, 3], **held_out), lambda pair: right[seed(pair)])
    assert view.cell(PNI, PGD).text == "unlike", "of another number of images"

    by_defense = {"pgd_at": evaluation(50), "pni": evaluation(60, images="b" * 16)}
    view = one(study({"baseline": {"defense": "pgd_at"}}), lambda pair: by_defense[pair.run.label("defense")])
    assert view.differences == ()
    assert any("is not compared with" in note for note in view.notes)
    assert "NOT ALL OF THE SAME IMAGES: compare only what is." in view.notes


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (lambda defense, cell: {"pgd": "a", "more": "b"}[cell] * 16, "Each column is of the same images"),
        (lambda defense, cell: {"pgd_at": "a", "pni": "b"}[defense] * 16, "Each row is of the same images"),
        (lambda defense, cell: ("b" if (defense, cell) == ("pni", "more") else "a") * 16, "NOT ALL OF THE SAME IMAGES"),
        (lambda defense, cell: "a" * 16, "Measured on 100 images"),
    ],
)
def test_what_may_be_compared_where_images_differ_is_said(images, said):
    cells = {"pgd": {"attack": "pgd20"}, "more": {"attack": "pgd20", "eot": 2}}
    view = one(
        study(cells=cells),
        lambda pair: evaluation(50, images=images(pair.run.label("defense"), pair.cell.name)),
    )
    (note,) = [note for note in view.notes if "same images" in note.lower() or note.startswith(said)]
    assert note.startswith(said)


def test_scorings_that_differ_are_told_apart():
    by_defense = {"pgd_at": evaluation(50), "pni": evaluation(60, 62, 58)}
    notes = one(study(), lambda pair: by_defense[pair.run.label("defense")]).notes
    assert "Measured on 100 images of cifar10 test (aaaaaaaa), no noise: pgd_at." in notes
    assert "Measured on 100 images of cifar10 test (aaaaaaaa), 3 draws, single: pni." in notes
    assert not any("NOT ALL" in note for note in notes)


# --- beside the paper


def paper_study(**changed):
    cells = {"pixel": {"attack": {"name": "few_pixel", "eps": [1]}, "attack.eps": [1, 2]}}
    views = {"table": {"rows": ["defense"], "columns": ["attack.eps"], "paper": {"facts": "table5"}}}
    reasons = [{"where": {"defense": "pni"}, "why": "known"}, {"where": {"defense": "pgd_at"}, "why": "of another"}]
    runs = {"runs": {"defense": ["pgd_at", "pni"], "model": "resnet20"}}
    source = {"runs": runs, "cells": cells, "views": views, "reasons": reasons} | changed
    return build_study("hand", source)


def test_numbers_of_the_paper_agree_within_our_interval_or_differ_for_a_known_reason():
    view = one(paper_study(), lambda pair: evaluation(65 if pair.run.label("defense") == "pgd_at" else 40))
    checks = {(check.row, check.column): check for check in view.paper_checks}
    agrees, differs = checks[PGD_AT, ("1",)], checks[PNI, ("1",)]
    assert (agrees.paper.mean, agrees.verdict, agrees.reasons) == (pytest.approx(0.652), "agrees", ())
    assert agrees.allowed == pytest.approx(wilson(65, 100).high - 0.65)
    assert (differs.verdict, differs.reasons) == ("differs", ("known",))
    assert differs.difference == pytest.approx(0.40 - 0.674)
    assert checks[PGD_AT, ("2",)].verdict == "differs"
    text = str(view)
    assert "1 of 4 numbers agree, 3 differ" in text
    assert "-27.40 points" in text


def test_what_a_level_changes_is_the_first_reason_why_a_number_differs():
    short = read_study("table5", "laptop")
    (view,) = build_views(results(short, lambda pair: evaluation(5)))
    reasons = [check.reasons[0] for check in view.paper_checks if check.verdict == "differs"]
    assert len(reasons) > 5
    assert set(reasons) == {"level laptop is not the paper's training (the note on the level)"}
    (view,) = build_views(results(read_study("table5", "paper"), lambda pair: evaluation(5)))
    assert not any("level" in reason for check in view.paper_checks for reason in check.reasons)


def test_our_interval_over_seeds_counts_beside_the_paper():
    view = one(paper_study(seeds=[1, 2]), lambda pair: evaluation({1: 50, 2: 60}[seed(pair)]))
    check = next(check for check in view.paper_checks if (check.row, check.column) == (PNI, ("1",)))
    cell = view.cell(PNI, ("1",))
    assert check.allowed == pytest.approx(np.hypot(cell.interval.high - 0.55, cell.over_seeds.high - 0.55))


def test_a_suspect_number_is_shown_and_not_judged():
    cells = {"cw": {"attack": "cw", "attack.confidence": [0.0, 1.0]}}
    views = {"table": {"rows": ["defense"], "columns": ["attack.confidence"], "paper": {"facts": "table3"}}}
    of = build_study("hand", {"runs": {"r": {"defense": "learn2perturb"}}, "cells": cells, "views": views})
    view = one(of, lambda pair: evaluation(10))
    row = ("learn2perturb",)
    verdicts = {check.column: check.verdict for check in view.paper_checks}
    assert set(verdicts.values()) == {"suspect", "differs"}
    text = str(view)
    assert "83.60 (suspect)" in text
    assert any(note.startswith("Suspect: the paper's 83.60") for note in view.notes)
    assert view.cells[0].row in (row, ("",))


def test_numbers_of_other_data_than_the_papers_do_not_stand_beside_ours():
    view = one(paper_study(train={"dataset": "digits", "model": "resnet20"}), lambda pair: evaluation(40))
    assert view.paper_checks == ()
    assert all(cell.paper is None for cell in view.cells)
    assert any("they are not set side by side" in note for note in view.notes)


@pytest.mark.parametrize(("dataset", "points"), [("cifar10", 2), ("digits", 0)])
def test_what_the_paper_says_of_a_curve_is_held_against_ours_of_its_data(dataset, points):
    cells = {"clean": {}, "pgd": {"attack": "pgd20", "eps": ["4/255", "8/255"]}}
    views = {"curve": {"kind": "curve", "series": ["defense"], "x": "eps", "paper": {"facts": "figure3"}}}
    runs = {"runs": {"defense": ["pgd_at", "learn2perturb"], "dataset": dataset, "model": "resnet20"}}
    right = {
        ("pgd_at", 4 / 255): 50,
        ("pgd_at", 8 / 255): 40,
        ("learn2perturb", 4 / 255): 60,
        ("learn2perturb", 8 / 255): 30,
    }

    def answer(pair):
        return evaluation(right.get((pair.run.label("defense"), pair.cell.eps), 90), eps=pair.cell.eps)

    (said,) = one(study(cells=cells, views=views, runs=runs), answer).statements
    assert (said.holds, said.points) == (points // 2, points)


# --- curves, histories, other values


def test_clean_images_are_attacked_by_nothing_and_lie_at_zero():
    cells = {"clean": {}, "pgd": {"attack": "pgd20", "eps": ["4/255", "8/255"]}}
    views = {"curve": {"kind": "curve", "series": ["defense"], "x": "eps"}}
    view = one(study(cells=cells, views=views), lambda pair: evaluation(50, eps=pair.cell.eps))
    assert [cell.x for cell in view.cells if cell.row == PNI] == [0.0, 4 / 255, 8 / 255]
    assert [cell.value for cell in view.cells if cell.row == PNI] == [1.0, 0.5, 0.5]


def test_what_has_no_number_on_the_axis_is_named():
    cells = {"clean": {}, "pgd": {"attack": "pgd20", "eot": [1, 10]}}
    views = {"curve": {"kind": "curve", "series": ["defense"], "x": "eot"}}
    view = one(study(cells=cells, views=views), lambda pair: evaluation(50))
    assert [cell.x for cell in view.cells if cell.row == PNI] == [1.0, 10.0]
    assert "Not on the axis, for want of eot: clean." in view.notes


def test_a_history_shows_noise_beside_its_schedule_and_skips_what_is_no_number():
    def history(run):
        if run.label("defense") == "pgd_at":
            return [{"epoch": 0, "loss": 1.0}]
        shift = 0.1 * run.label("seed")
        values = [0.2 + shift, float("nan"), 0.4 + shift]
        return [
            {"epoch": epoch, "alpha": {"a": {}}, "alpha_mean": value, "alpha_schedule": 0.25}
            for epoch, value in enumerate(values)
        ]

    views = {"history": {"kind": "history", "series": ["defense"], "value": "noise"}}
    view = one(study(views=views, seeds=[1, 2]), lambda pair: None, history=history)
    learned = [(cell.x, cell.value) for cell in view.cells if cell.column == ("alpha_mean",)]
    assert learned == [(1.0, pytest.approx(0.35)), (3.0, pytest.approx(0.55))]
    assert [cell.value for cell in view.cells if cell.column == ("schedule",)] == [0.25] * 3
    assert all(cell.std == pytest.approx(0.1 / 2**0.5) for cell in view.cells if cell.column == ("alpha_mean",))
    assert "The metrics of pgd_at hold no noise." in view.notes


def test_a_history_without_metrics_is_missing():
    views = {"history": {"kind": "history", "series": ["defense"], "value": "noise"}}
    view = one(study(views=views), lambda pair: None)
    assert view.missing == 2
    assert [cell.value for cell in view.cells] == [None, None]


def test_the_worst_of_draws_and_sizes_are_shown_as_they_are():
    draws = {"evaluate": {"draws": 2}}
    worst = one(study({"value": "worst_of.1"}, **draws), lambda pair: evaluation(50, 60)).cell(PNI, PGD)
    assert (worst.value, worst.interval) == (pytest.approx(0.55), None)
    view = one(study({"value": "l2"}), lambda pair: evaluation(50))
    assert (view.unit, view.scale, view.cell(PNI, PGD).value) == ("l2, [0, 1] pixel scale", 1.0, 1.5)
    with pytest.raises(ConfigError, match="score with more draws"):
        one(study({"value": "worst_of.7"}, **draws), lambda pair: evaluation(50, 60))


def certification(radii) -> Certification:
    """Return a certificate of four images, the last of a wrong class."""
    labels, votes = PackedIntegers.pack(np.zeros(4, dtype=np.int64)), PackedIntegers.pack(np.full(4, 10))
    predictions = PackedIntegers.pack(np.array([0, 0, 0, 1]))
    return Certification(
        "smoothing", "l2", 4.0, True, None, 0.25, 10, 100, 0.001, 8 / 255, 4, 1.0, labels, predictions, votes, radii,
        10, 0, {"data": "cifar10"},
    )  # fmt: skip


def test_certificates_show_certified_accuracy_and_the_mean_radius():
    made = certification((0.1, 0.2, 0.5, 0.9))
    for value, expected in (("certified.0.2", 0.5), ("certified", 0.75), ("radius", 0.2), ("abstained", 0.0)):
        of = study({"value": value, "columns": ["cell"]}, cells={"certified": {"certify": {}}, "clean": {}})
        assert one(of, lambda pair: made).cell(PNI, ("certified",)).value == pytest.approx(expected), value
    # Without a value, that of the only kind that there is.
    of = study({}, cells={"certified": {"certify": {}}})
    assert one(of, lambda pair: made).value == "certified"


def test_noise_off_shows_the_rows_of_the_network_without_its_noise():
    of = study({"noise": False}, evaluate={"noise_off": True})
    on, off = evaluation(50, 60), evaluation(30, noise=False)
    joined = type(on)((*on.rows, *off.rows), on.labels, 10, 0, metadata=on.metadata)
    assert one(of, lambda pair: joined).cell(PNI, PGD).value == pytest.approx(0.3)


def test_a_network_whose_noise_never_started_is_what_it_is():
    of = study()
    assert one(of, lambda pair: evaluation(30, noise=False)).cell(PNI, PGD).value == pytest.approx(0.3)


# --- refused before any work


@pytest.mark.parametrize(
    ("view", "parts", "told"),
    [
        ({"rows": ["cell"], "columns": []}, {}, "unlike runs, which differ in defense"),
        ({"where": {"defense": "rse"}}, {}, "no accuracy has the labels"),
        ({"value": "speed"}, {}, "unknown value of a view 'speed'"),
        ({"value": "worst_of"}, {}, "say of how many draws"),
        ({"value": "accuracy.3"}, {}, "takes no number"),
        ({"value": "certified.big", "where": {}}, {}, "give a radius"),
        ({"baseline": {"defense": "rse"}}, {}, "its baseline is a run of defense rse"),
        ({"value": "l2", "baseline": {"defense": "pgd_at"}}, {}, "only accuracy is compared"),
        ({"noise": False}, {}, "set noise_off: true"),
        ({"paper": {"facts": "table9"}}, {}, "unknown table 'table9'"),
        ({"paper": {"network": "model"}}, {}, "names no facts"),
        ({"paper": {"facts": "table5", "pixel": "eps"}}, {}, "unknown key of paper 'pixel'"),
        ({"paper": {"facts": "table5"}, "value": "l2"}, {}, "accuracies with the noise on"),
        ({"paper": {"facts": "table5"}, "noise": False}, {}, "accuracies with the noise on"),
        ({"kind": "curve", "x": "defense", "series": ["run"]}, {}, "no pair has a number there"),
        ({"kind": "history", "where": {"defense": "rse"}}, {}, "the history of no run"),
        ({}, {"reasons": [{"why": 3}]}, "write - {where"),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_is_refused_when_the_study_is_read(view, parts, told):
    with pytest.raises((ConfigError, UnknownNameError), match=told) as caught:
        study(view, **parts)
    assert "\n" not in str(caught.value)


def test_views_are_built_without_torch():
    code = "import sys, learn2perturb.experiments.views; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
