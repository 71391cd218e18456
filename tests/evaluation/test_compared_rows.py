"""Comparing records made by hand: which rows are partners, what is said of the others, and the printed text."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation import Comparison, compare
from learn2perturb.evaluation.comparing import Difference
from learn2perturb.evaluation.intervals import Interval
from learn2perturb.evaluation.result import Evaluation, Row, statistics
from learn2perturb.evaluation.significance import mcnemar
from learn2perturb.records import PackedIntegers

N = 60
LABELS = np.zeros(N, dtype=np.int64)


def right(count: int, scorings: int = 1) -> np.ndarray:
    """Return predictions that are right on the first ``count`` images, in every scoring."""
    return np.repeat((np.arange(N) >= count).astype(np.int64)[None], scorings, axis=0)


def row(attack: str = "clean", count: int = 40, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "attack": attack, "attack_type": None if attack == "clean" else "PGD",
        "parameters": {} if attack == "clean" else {"norm": "linf", "steps": 7, "eot": 1, "eot_average": "loss"},
        "eps": None if attack == "clean" else 0.1, "noise": True, "stochastic": False, "predictor": "single",
        "members": 1, "linf": 0.0, "l2": 0.0, "forward_passes": 0.0, "backward_passes": 0.0, "seconds": 0.0,
    } | changes  # fmt: skip
    given = values.pop("predictions", right(count))
    found = statistics(given, LABELS, {}, stochastic=values["stochastic"], batches=(), confidence=0.95)
    return Row(**values | found)


def record(*rows: Row, **metadata: Any) -> Evaluation:
    known = {"model": "mine", "data": "digits", "images": "11", "weights": "aa"}
    return Evaluation(rows, PackedIntegers.pack(LABELS), 2, 3, metadata=known | metadata)


def attack(name: str = "pgd", **changes: Any) -> Row:
    parameters = {"norm": "linf", "steps": 7, "eot": 1, "eot_average": "loss"} | changes.pop("parameters", {})
    return row(name, 30, parameters=parameters, **changes)


def paired(one: Row, other: Row) -> bool:
    """Tell whether the two rows are compared, beside the clean ones."""
    found = compare(record(row(), one), record(row(), other, weights="bb"))
    return len(found.differences) == 2


@pytest.mark.parametrize(
    ("one", "other", "partners"),
    [
        (attack(), attack("another name"), True),
        (attack(), attack(attack_type="FGSM"), False),
        (attack(), attack(noise=False), False),
        (attack(), attack(predictor="vote"), False),
        (attack(), attack(parameters={"steps": 8}), False),
        (attack(), attack(parameters={"restarts": 1}), False),
        (attack(parameters={"restarts": 1}), attack(), False),
        (attack(parameters={"restarts": None}), attack(), False),
        (attack(eps=0.1), attack(eps=0.1 + 0.9e-9), True),
        (attack(eps=0.1), attack(eps=0.1 + 1.1e-9), False),
        (attack(eps=0.1), attack(eps=None), False),
        (attack(parameters={"steps": 7}), attack(parameters={"steps": 7.0}), True),
        # Averaging over draws changes nothing where there are none, on one side or on both.
        (attack(), attack(parameters={"eot": 5}), True),
        (attack(), attack(parameters={"eot_average": "logits"}), True),
        (attack(stochastic=True), attack(parameters={"eot": 5}), True),
        (attack(), attack(parameters={"eot": 5}, stochastic=True), True),
        (attack(stochastic=True), attack(parameters={"eot": 5}, stochastic=True), False),
        # Passes of an ensemble likewise.
        (attack(members=5), attack(members=10), True),
        (attack(members=5, stochastic=True), attack(members=10), True),
        (attack(members=5), attack(members=10, stochastic=True), True),
        (attack(members=5, stochastic=True), attack(members=10, stochastic=True), False),
        (attack(members=5, stochastic=True), attack(members=5, stochastic=True), True),
    ],
)
def test_partners_agree_in_all_that_changes_the_result(one, other, partners):
    assert paired(one, other) is partners


def test_a_row_that_no_attack_made_is_known_by_its_name():
    found = compare(record(row(), row("blur", attack_type=None)), record(row(), row("snow", attack_type=None)))
    assert [one.first for one in found.differences] == ["clean"]


def test_of_several_partners_that_with_the_same_eot_comes_first_then_that_of_the_same_name():
    one = attack("b", parameters={"eot": 5})
    others = [attack("a"), attack("b"), attack("c", parameters={"eot": 5})]
    assert compare(record(one), record(*others)).differences[0].second == "c 0.1"
    assert compare(record(attack("b")), record(*others)).differences[0].second == "b 0.1"
    assert compare(record(attack("d")), record(*others)).differences[0].second == "a 0.1"


def test_what_is_left_out_is_named_with_its_record_and_what_differs():
    vote: dict[str, Any] = {"stochastic": True, "parameters": {"steps": 9}}
    first = record(row(), attack("pgd"), attack("fgsm", attack_type="FGSM"), attack("vote", members=5, **vote))
    longer = attack("pgd", parameters={"steps": 8, "loss": "ce"})
    second = record(row(), longer, attack("vote", members=10, **vote))
    found = compare(first, second)
    assert found.left_out == (
        "pgd 0.1 of the first (differs in loss, steps)",
        "fgsm 0.1 of the first",
        "vote 0.1 of the first (differs in passes of the ensemble)",
        "pgd 0.1 of the second (differs in loss, steps)",
        "vote 0.1 of the second (differs in passes of the ensemble)",
    )
    assert compare(first, second, pairs=[("clean", "clean")]).left_out == ()


def test_a_pair_by_hand_says_what_differs():
    other = attack("fgsm", attack_type="FGSM")
    longer = attack("long", parameters={"steps": 8, "eot": 5})
    first, second = record(attack("pgd")), record(other, longer, weights="bb")
    assert compare(first, second, pairs=[("pgd", "long")]).notes == (
        "pgd 0.1 and long 0.1 are not the same attack: steps 7 and 8",
    )
    assert compare(first, second, pairs=[("pgd", "fgsm")]).notes == (
        "pgd 0.1 and fgsm 0.1 are not the same attack: another kind",
    )
    assert compare(first, record(attack("same"), weights="bb"), pairs=[("pgd", "same")]).notes == ()
    noisy = record(attack("noisy", stochastic=True, parameters={"eot": 5}), weights="bb")
    assert compare(first, noisy, pairs=[("pgd", "noisy")]).notes == ()
    both = compare(record(attack("pgd", stochastic=True)), noisy, pairs=[("pgd", "noisy")])
    assert both.notes == ("pgd 0.1 and noisy 0.1 are not the same attack: eot 1 and 5",)


def test_a_pair_by_hand_is_of_the_network_with_its_noise_if_there_are_such_rows():
    on, off = attack("pgd", stochastic=True), attack("pgd", noise=False)
    found = compare(record(on, off), record(on, off), pairs=[("pgd", "pgd")])
    assert [one.first for one in found.differences] == ["pgd 0.1"]
    found = compare(record(off), record(on, off), pairs=[("pgd", "pgd")])
    assert [(one.first, one.second) for one in found.differences] == [("pgd 0.1, noise off", "pgd 0.1")]


def test_a_record_says_what_identifies_it():
    old = record(row(), images=None, weights=None)
    first = "the first record holds no hash of its images, so that they are the same is not known"
    assert compare(old, record(row())).notes == (first,)
    assert compare(old, old).notes == (first, first.replace("first", "second"))
    assert compare(record(row()), record(row())).notes == ("both are of the same weights (aa)",)
    assert compare(record(row()), record(row(), weights="bb")).notes == ()


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (record(row(), data="cifar10"), "the first is of digits, 2 classes, the second of cifar10, 2 classes"),
        (
            dataclasses.replace(record(row()), num_classes=3),
            "the first is of digits, 2 classes, the second of digits, 3",
        ),
        (record(row(), images="22"), r"the labels agree, but the images differ \(hashes 11 and 22\)"),
        (dataclasses.replace(record(row()), labels=PackedIntegers.pack(LABELS[:9])), "60 images, the second of 9"),
        (
            dataclasses.replace(record(row()), labels=PackedIntegers.pack((np.arange(N) < 2).astype(np.int64))),
            "the labels of 2 of 60 images differ",
        ),
    ],
)
def test_other_images_are_refused(second, reason):
    with pytest.raises(InputError, match=reason + r".*evaluate both on the same images"):
        compare(record(row()), second)


def test_no_row_in_common_shows_both():
    with pytest.raises(ConfigError, match="no row in common: clean, pgd 0.1 against fgsm 0.1; name what to compare"):
        compare(record(row(), attack()), record(attack("fgsm", attack_type="FGSM")))


def test_the_numbers_of_a_difference():
    first, second = record(row(count=50), attack()), record(row(count=40), attack(), weights="bb")
    found = compare(first, second)
    (one, other) = found.differences
    assert (one.first_accuracy, one.second_accuracy, one.n) == (50 / 60, 40 / 60, 60)
    assert one.difference == pytest.approx(10 / 60)
    assert one.standard_error == pytest.approx(np.sqrt(10 / 60 * 50 / 60 / 60), rel=0.05)
    assert (one.interval.method, one.interval.resamples, one.test) == ("two-way", 0, "mcnemar")
    p = mcnemar(right(50)[0] == 0, right(40)[0] == 0)
    assert (one.mcnemar, one.mcnemar_holm) == (one.p_value, one.p_holm) == (p, 2 * p)  # Holm: the smaller of two
    assert (other.mcnemar, other.mcnemar_holm) == (1.0, 1.0)
    assert found.metadata["weights"] == ["aa", "bb"]
    assert found.metadata["steps"] == [None, None]
    assert found.confidence == 0.95


def test_mcnemar_is_of_the_first_scoring_of_each():
    one, other = right(50, 2), right(50, 2)
    one[1], other[1] = right(60)[0], right(0)[0]  # they differ in the second scoring only
    found = compare(record(row(predictions=one)), record(row(predictions=other))).differences[0]
    assert found.mcnemar == 1.0
    assert found.difference == pytest.approx(0.5)


BETTER = Difference("a", "a", 0.8, 0.7, 0.1, 0.01, Interval(0.02, 0.18, 0.95, "bootstrap", 9), 0.001, 0.002, 60)


@pytest.mark.parametrize(
    ("low", "high", "p", "says"),
    [
        (0.02, 0.18, 0.002, "the first is better: +10.00 points [+2.00, +18.00]"),
        (-0.18, -0.02, 0.002, "the second is better: +10.00 points [-18.00, -2.00]"),
        (0.02, 0.18, 0.0499, "the first is better: +10.00 points [+2.00, +18.00]"),
        (0.02, 0.18, 0.0501, "neither is shown to be better: +10.00 points [+2.00, +18.00]"),
        (-0.18, -0.02, 0.0501, "neither is shown to be better: +10.00 points [-18.00, -2.00]"),
        (0.0, 0.18, 0.002, "neither is shown to be better: +10.00 points [+0.00, +18.00]"),
        (-0.18, 0.0, 0.002, "neither is shown to be better: +10.00 points [-18.00, +0.00]"),
        (-0.02, 0.18, 0.002, "neither is shown to be better: +10.00 points [-2.00, +18.00]"),
    ],
)
def test_better_is_what_interval_and_test_agree_on(low, high, p, says):
    interval = dataclasses.replace(BETTER.interval, low=low, high=high)
    assert dataclasses.replace(BETTER, interval=interval, mcnemar_holm=p).sentence == says


def test_the_printed_comparison():
    other = dataclasses.replace(BETTER, first="pgd 0.1", second="long 0.1")
    found = Comparison("one", "two", (BETTER, other), 0.9, {"steps": [300, None]}, ("fgsm of the first",), ("a note",))
    assert str(found).splitlines() == [
        "first:  one, step 300",
        "second: two",
        "",
        "a: 80.00 % and 70.00 % of 60 images",
        "  the first is better: +10.00 points [+2.00, +18.00], McNemar p = 0.002",
        "pgd 0.1 against long 0.1: 80.00 % and 70.00 % of 60 images",
        "  the first is better: +10.00 points [+2.00, +18.00], McNemar p = 0.002",
        "",
        "Left out, for want of a row with the same settings of the attack:",
        "  fgsm of the first",
        "note: a note",
        "",
        "Difference: first less second; 90 % interval: paired, over images and draws.",
        "McNemar: exact, of networks without noise; t: over images and draws.",
        "Both with Holm's correction for 2 rows.",
        "One training seed of each: the interval says nothing about other seeds.",
    ]
    short = str(Comparison("one", "two", (BETTER,), 0.95, {"steps": [None, 5]}))
    assert short.startswith("first:  one\nsecond: two, step 5\n")
    assert "Left out" not in short
    assert "note" not in short
    assert str(Comparison("one", "two", (), 0.95)).startswith("first:  one\nsecond: two\n")


def test_a_model_without_a_name_is_a_model():
    nameless = dataclasses.replace(record(row()), metadata={"data": "digits"})
    assert (compare(nameless, record(row())).first, compare(nameless, record(row())).second) == ("a model", "mine")


def coded(code: str) -> list[dict[str, str]]:
    return [{"kind": "attack", "name": "Own", "code": code}]


def test_rows_of_other_code_are_left_out_of_what_is_compared():
    own = attack("own", attack_type="Own")
    first, second = (record(row(), attack(), own, weights=code, parts=coded(code)) for code in ("aa", "bb"))
    found = compare(first, second)
    assert [one.first for one in found.differences] == ["clean", "pgd 0.1"]
    assert found.left_out == (
        "own 0.1 of the first (differs in its code)", "own 0.1 of the second (differs in its code)",
    )  # fmt: skip
    assert "attack Own is of other code in the two" in found.notes
    alone = [record(own, weights=code, parts=coded(code)) for code in ("aa", "bb")]
    with pytest.raises(ConfigError, match="no row in common: attack Own is of other code in the two; evaluate both"):
        compare(*alone)
    with pytest.raises(ConfigError, match=r"no row in common: own 0.1 against pgd 0.1; name what to compare as pairs"):
        compare(record(own), record(attack()))


@pytest.mark.parametrize(("one", "other", "test"), [
    (False, False, "mcnemar"), (True, False, "t"), (False, True, "t"), (True, True, "t"),
])  # fmt: skip
def test_students_test_decides_where_a_draw_may_come_out_otherwise(one, other, test):
    rng = np.random.default_rng(0)
    votes = [(rng.random((6, N)) < share).astype(np.int64) for share in (0.3, 0.5)]
    rows = [
        row(predictions=given if random else given[:1], stochastic=random)
        for given, random in zip(votes, (one, other), strict=True)
    ]
    (found,) = compare(record(rows[0]), record(rows[1], weights="bb")).differences
    assert found.test == test
    assert (found.p_value == found.mcnemar) == (test == "mcnemar")
