"""Curves of plain records: which rows are the points of one, and that the page draws what the records hold."""

from __future__ import annotations

import dataclasses

import pytest

import learn2perturb as l2p
from learn2perturb.attacks import PGD
from learn2perturb.report.page import page
from learn2perturb.report.sweeps import sweeps
from tests.report.test_report import data_of, images, noisy

SIZES = (0.02, 0.05, 0.1)


def scored(attacks, n=12, **settings):
    return l2p.evaluate(noisy, images(n), attacks, draws=3, progress=False, **settings)


def sized(steps=2, eot=1):
    return {f"{steps}x{eot} at {eps}": PGD(eps, eps / 4, steps, eot=eot) for eps in SIZES}


@pytest.fixture(scope="module")
def found():
    return scored(
        sized() | {"4 steps": PGD(0.1, 0.025, 4), "8 steps": PGD(0.1, 0.025, 8), "2 draws": PGD(0.1, 0.025, 2, eot=2)}
    )


def test_rows_that_differ_in_one_thing_are_a_curve(found):
    assert [(one.axis, one.at) for one in sweeps([found])] == [("eps", (0.0, *SIZES)), ("steps", (2.0, 4.0, 8.0))]
    size, steps = sweeps([found])
    assert [row.attack for row in size.rows] == ["clean", *sized()]
    assert [row.attack for row in steps.rows] == ["2x1 at 0.1", "4 steps", "8 steps"]
    assert (size.norm, size.num_classes) == ("linf", found.num_classes)


@pytest.mark.parametrize("axis", ["steps", "eot"])
def test_draws_and_steps_are_axes(axis):
    made = scored({f"{axis} {at}": dataclasses.replace(PGD(0.1, 0.025, 2), **{axis: at}) for at in (1, 2, 3)})
    assert [(one.axis, one.at) for one in sweeps([made])] == [(axis, (1.0, 2.0, 3.0))]


def test_two_records_of_a_network_make_one_curve_and_those_of_two_none(found):
    parts = [scored(dict([pair])) for pair in sized().items()]
    (one,) = sweeps(parts)
    assert one.at == (0.0, *SIZES)
    for what in ("weights", "images"):
        others = [dataclasses.replace(part, metadata=part.metadata | {what: str(i)}) for i, part in enumerate(parts)]
        assert sweeps(others) == []
    assert sweeps([scored(sized(), n=12), scored(sized(), n=8)])[0].rows[0].n == 12


@pytest.mark.parametrize("change", [{"noise": False}, {"predictor": "vote"}, {"n": 5}, {"attack_type": "FGSM"}])
def test_rows_that_differ_in_more_are_none(found, change):
    rows = [dataclasses.replace(row, **change) if row.attack == "2x1 at 0.05" else row for row in found.rows]
    assert [one.at for one in sweeps([dataclasses.replace(found, rows=tuple(rows))]) if one.axis == "eps"] in (
        [], [(0.0, 0.02, 0.1)],
    )  # fmt: skip


def test_two_points_are_no_curve():
    made = {"a": PGD(0.1, 0.025, 2), "b": PGD(0.1, 0.025, 4)}
    assert sweeps([scored(made)]) == []


def test_the_page_draws_the_accuracies_and_intervals_of_the_rows(found, tmp_path):
    data = data_of(page(found.save(tmp_path / "found.json"), claim="40 % under pgd with 0.05"))
    drawn = data["charts"]["sweep-0"]
    values = drawn["data"]["values"]
    rows = [found.row("clean"), *(found.row(name) for name in sized())]
    assert [value["at"] for value in values] == pytest.approx([255 * eps for eps in (0.0, *SIZES)])
    assert [value["accuracy"] for value in values] == pytest.approx([100 * row.accuracy for row in rows])
    assert [value["low"] for value in values] == pytest.approx([100 * row.interval.low for row in rows])
    assert [value["high"] for value in values] == pytest.approx([100 * row.interval.high for row in rows])
    marks = [layer["data"]["values"][0] for layer in drawn["layer"][2:]]
    assert marks == [
        {"at": pytest.approx(100 / found.num_classes), "word": "chance"},
        {"at": 40.0, "word": "claimed"},
        {"at": pytest.approx(255 * 0.05), "accuracy": 40.0},
    ]
    assert "sweep-1" in data["charts"] and "sweep-2" not in data["charts"]
