"""Two diagnoses side by side: what is compared, and what cannot be."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from learn2perturb.cli.main import main
from learn2perturb.diagnosis import CHECKS, Check, Claim, Diagnosis, DiagnosisComparison, Measurement, compare_diagnoses
from learn2perturb.diagnosis.trial import put_on_trial
from learn2perturb.diagnosis.verdict import conclude
from learn2perturb.errors import InputError
from learn2perturb.evaluation.intervals import accuracy_interval
from learn2perturb.records import PackedBits, PackedIntegers

N = 200


def measured(name: str, right: int, n: int = N) -> Measurement:
    bits = (np.arange(n) < right)[None]
    return Measurement(name, "PGD", {}, n, right / n, accuracy_interval(bits), PackedBits.pack(bits), 1.0, 1.0, 0.0)


def diagnosis(right: int = 100, failed: int | None = None, claimed: Claim | None = None, n: int = N) -> Diagnosis:
    """Of a network that keeps ``right`` of ``n`` images under its strongest attack."""
    checks = tuple(
        Check(number, one.name, "failed" if number == failed else "passed", "Text.") for number, one in CHECKS.items()
    )
    few = measured("square", right // 2, N // 2)
    everything = (measured("clean", n - 5, n), measured("reported", right + 10, n), measured("best", right, n), few)
    claim = None if claimed is None else claimed.settled(norm="linf", eps=0.1, n=n)
    trial = None if claim is None else put_on_trial([everything[2]], claim.accuracy, tried=["best"])
    known = {one.name: one for one in everything}
    verdict, summary = conclude(
        checks, lowest="best", accuracy=right / n, n=n, eps="linf 0.1", claim=claim, trial=trial, measured=known
    )
    return Diagnosis(
        verdict=verdict, summary=summary, checks=checks, curves=(), measurements=everything, findings=(),
        lowest="best", labels=PackedIntegers.pack(np.arange(n) % 10), num_classes=10, stochastic=False, eps=0.1,
        norm="linf", seed=0, budget={"name": "quick", "images": n},
        metadata={"model": "net", "data": "digits", "images": "h", "weights": f"w{right}"}, claim=claim, trial=trial,
    )  # fmt: skip


def changed(one: Diagnosis, **metadata: object) -> Diagnosis:
    return dataclasses.replace(one, metadata=one.metadata | metadata)


def test_verdicts_checks_and_lowest_accuracies_stand_side_by_side(tmp_path):
    first, second = diagnosis(100, claimed=Claim(0.9)), diagnosis(60, failed=2)
    found = compare_diagnoses(first, second)
    assert found.verdicts == ("refuted", "not trusted")
    assert [(one.number, one.first, one.second) for one in found.checks][:2] == [
        (1, "passed", "passed"), (2, "passed", "failed")
    ]  # fmt: skip
    lowest = found.accuracies[-1]
    assert (lowest.first_accuracy, lowest.second_accuracy, lowest.n) == (0.5, 0.3, N)
    assert lowest.difference == pytest.approx(0.2)
    # Paired: all 40 images that differ differ one way, which is far narrower than two intervals apart.
    assert 0.14 < lowest.interval.low < 0.2 < lowest.interval.high < 0.26
    assert lowest.sentence.startswith("more of the first is left: +20.0 points")
    assert "no difference is shown: +0.0" in found.accuracies[0].sentence
    text = str(found)
    assert "first : net: REFUTED (claimed 90 % under any attack l_inf with 0.1 of 200 images)" in text
    assert "2   white-box beats black-box        passed  failed" in text
    assert DiagnosisComparison.load(found.save(tmp_path / "c.json")) == found


def test_measurements_of_fewer_images_are_paired_on_those_of_both():
    first = dataclasses.replace(diagnosis(100), lowest="square")
    lowest = compare_diagnoses(first, diagnosis(60)).accuracies[-1]
    assert (lowest.first, lowest.second, lowest.n) == ("square", "best", N // 2)
    assert (lowest.first_accuracy, lowest.second_accuracy) == (0.5, 0.6)  # the first 100 of the second


def test_the_same_diagnosis_twice_differs_in_nothing():
    one = diagnosis()
    found = compare_diagnoses(one, one)
    assert {row.difference for row in found.accuracies} == {0.0}
    assert found.notes == ("both are of the same weights (w100)",)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (dataclasses.replace(diagnosis(), eps=0.3), "of linf 0.1, the second of linf 0.3; diagnose both in one ball"),
        (dataclasses.replace(diagnosis(), norm="l2"), "of linf 0.1, the second of l2 0.1"),
        (diagnosis(n=150), "of 200 images, the second of 150; diagnose both on the same images"),
        (changed(diagnosis(), data="cifar10"), "of digits, 10 classes, the second of cifar10"),
        (dataclasses.replace(diagnosis(), num_classes=11), "the second of digits, 11 classes"),
        (changed(diagnosis(), images="other"), "the images of the two are not the same"),
        (
            dataclasses.replace(diagnosis(), labels=PackedIntegers.pack((np.arange(N) + 1) % 10)),
            "the images of the two are not the same",
        ),
        ("runs/a", "a str is no diagnosis; give what diagnose returned"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, reason):
    for pair in ((diagnosis(), other), (other, diagnosis())):
        with pytest.raises(InputError) as caught:
            compare_diagnoses(*pair)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=reason):
        compare_diagnoses(diagnosis(), other)


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (
            dataclasses.replace(diagnosis(60), budget={"name": "full", "images": N}),
            "the budgets differ (name quick and",
        ),
        (dataclasses.replace(diagnosis(60), seed=3), "the seeds differ: 0 and 3"),
        (changed(diagnosis(60), parameters={"steps": 3}, attack="PGD-3"), "the reported attacks differ"),
        (changed(diagnosis(60), sources=["twin"]), "the sources differ: none; twin"),
        (changed(diagnosis(60), images=None), "the second record holds no hash of its images"),
        (diagnosis(60, claimed=Claim(0.9, predictor="vote")), "of other predictors: single draws and vote of 10"),
    ],
)
def test_settings_that_differ_are_named(other, note):
    assert any(text.startswith(note) or note in text for text in compare_diagnoses(diagnosis(), other).notes)
    assert compare_diagnoses(diagnosis(), diagnosis(60)).notes == ()
    newer = dataclasses.replace(diagnosis(60), budget=diagnosis().budget | {"near": 0.2})  # which holds one number more
    assert compare_diagnoses(diagnosis(), newer).notes == ()


def test_code_of_ones_own_that_was_changed_between_the_two_is_noted():
    first, second = (
        changed(diagnosis(right), parts=[{"kind": "check", "name": "own", "code": code}])
        for right, code in ((100, "aa"), (60, "bb"))
    )
    assert compare_diagnoses(first, second).notes == ("check own is of other code in the two",)
    assert compare_diagnoses(first, changed(diagnosis(60), parts=first.metadata["parts"])).notes == ()


def test_at_the_command_line(tmp_path, capsys):
    paths = [str(one.save(tmp_path / f"{right}.json")) for right in (100, 60) for one in (diagnosis(right),)]
    assert main(["compare", *paths, "--out", str(tmp_path / "c.json")]) == 0
    assert "lowest: 50.0 % and 30.0 % of 200 images; more of the first is left" in capsys.readouterr().out
    assert DiagnosisComparison.load(tmp_path / "c.json").verdicts == ("trusted", "trusted")
    assert main(["compare", *paths, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["accuracies"][2]["sentence"].startswith("more of the first is left")
    for words, fix in (
        ([*paths, "--out", str(tmp_path / "c.json")], "so that nothing is lost"),
        ([paths[0], str(tmp_path / "c.json")], "give two of diagnose or two of evaluate"),
        ([str(tmp_path), paths[1]], "give two of diagnose or two of evaluate"),
        ([*paths, "--pair", "a=b"], "leave it out"),
        ([paths[0], "nowhere.json"], "give two of diagnose"),
    ):
        assert main(["compare", *words]) == 2
        error = capsys.readouterr().err
        assert fix in error
        assert error.count("\n") == 1
