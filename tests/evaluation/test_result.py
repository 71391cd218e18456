"""The record of an evaluation: its rows, what follows from their bits, and the table that is printed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.evaluation import Evaluation, wilson
from learn2perturb.evaluation.result import POOLED_NOTE, PooledScore, Row, format_eps, statistics
from learn2perturb.records import PackedIntegers

# Three scorings of four images: right are 3, 2 and 3 of them; the last image is right in the second scoring only.
LABELS = np.array([0, 1, 2, 0])
PREDICTIONS = np.array([[0, 1, 2, 1], [0, 0, 0, 0], [0, 1, 2, 1]])
VOTE = np.array([0, 1, 2, 1])


def row(attack: str = "clean", predictions: np.ndarray = PREDICTIONS, **changes: Any) -> Row:
    stochastic = changes.get("stochastic", len(predictions) > 1)
    pooled = {"vote": VOTE, "mean_probability": LABELS} if changes.pop("pooled", False) else {}
    found = statistics(predictions, LABELS, pooled, stochastic=stochastic, batches=(), confidence=0.95)
    values: dict[str, Any] = {
        "attack": attack, "attack_type": None if attack == "clean" else "PGD", "parameters": {},
        "eps": None if attack == "clean" else 8 / 255, "noise": True, "stochastic": stochastic, "predictor": "single",
        "members": 1, "linf": 0.0, "l2": 0.0, "forward_passes": 0.0, "backward_passes": 0.0, "seconds": 0.0,
    }  # fmt: skip
    return Row(**values | found | changes)


def record(*rows: Row, **metadata: Any) -> Evaluation:
    return Evaluation(rows, PackedIntegers.pack(LABELS), 3, 0, metadata=metadata)


# --- what follows from the bits


def test_statistics_are_their_definitions():
    found = row(pooled=True)
    assert (found.n, found.draws) == (4, 3)
    assert found.accuracy == pytest.approx((3 + 2 + 3) / 12)
    assert found.std == pytest.approx(np.std([0.75, 0.5, 0.75], ddof=1))
    assert found.worst_of == {1: pytest.approx((3 + 2 + 2 + 1) / 12)}  # ten of three draws cannot be told
    assert [(score.predictor, score.members, score.accuracy) for score in found.pooled] == [
        ("vote", 3, 0.75), ("mean_probability", 3, 1.0),
    ]  # fmt: skip
    assert (found.pooled[0].interval.low, found.pooled[0].interval.high) == (wilson(3, 4).low, wilson(3, 4).high)
    assert found.pooled[0].note == POOLED_NOTE


@pytest.mark.parametrize(("scorings", "known"), [(9, {1}), (10, {1, 10}), (99, {1, 10}), (100, {1, 10, 100})])
def test_worst_of_n_is_known_from_n_scorings_on(scorings, known):
    assert set(row(predictions=np.repeat(PREDICTIONS[:1], scorings, axis=0)).worst_of) == known


def test_without_noise_every_draw_is_the_worst():
    assert row(predictions=PREDICTIONS[:1], stochastic=False).worst_of == {1: 0.75, 10: 0.75, 100: 0.75}


def test_the_raw_bits_give_every_number_again():
    found = record(row(pooled=True), row("pgd", PREDICTIONS[:1]))
    spoiled = dataclasses.replace(
        found, rows=tuple(dataclasses.replace(one, accuracy=0.0, std=1.0, worst_of={}) for one in found.rows)
    )
    assert spoiled.recomputed() == found
    # The vote is one of these draws, so it is counted again; means of probabilities are not in the record.
    vote, mean = found.rows[0].pooled
    others = PackedIntegers.pack(np.zeros(4, dtype=np.int64))
    forged = dataclasses.replace(found.rows[0], pooled=tuple(
        dataclasses.replace(score, predictions=others) for score in (vote, mean)))  # fmt: skip
    again = dataclasses.replace(found, rows=(forged,)).recomputed().rows[0]
    assert again.pooled[0] == vote
    assert again.pooled[1].predictions == others
    assert again.pooled[1].accuracy == 0.5


def forged(tmp_path, **changes: Any) -> Evaluation:
    found = record(dataclasses.replace(row(pooled=True), **changes))
    return Evaluation.load(found.save(tmp_path / "forged.json"))


@pytest.mark.parametrize("error", [0.9e-9, -0.9e-9])
def test_the_last_digits_may_differ(error, tmp_path):
    true = row(pooled=True)
    pooled = tuple(dataclasses.replace(score, accuracy=score.accuracy + error) for score in true.pooled)
    assert forged(tmp_path, accuracy=true.accuracy + error, worst_of={1: true.worst_of[1] + error}, pooled=pooled)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("accuracy", 2 / 3 + 1.5e-9, "has accuracy 0.666667, but its bits give 0.666667"),
        ("accuracy", 0.5, "has accuracy 0.5, but its bits give 0.666667"),
        ("std", None, "has std None, but its bits give 0.144338"),
        ("worst_of", {1: 2 / 3 - 1.5e-9}, "has worst_of"),
        ("worst_of", {}, "has worst_of {}"),
        ("worst_of", {1: 2 / 3, 10: 0.0}, "has worst_of"),
        ("worst_of", {10: 2 / 3}, "has worst_of"),
        ("interval", wilson(3, 4), r"has interval \[0.300642, 0.954413\], but its bits give \["),
        ("pooled", (), "has pooled , but its bits give|of another size|has pooled"),
        ("n", 5, "has n 5, but its bits give 4"),
    ],
)
def test_what_the_bits_do_not_give_is_refused_with_both_values(name, value, shown, tmp_path):
    if name == "pooled":  # an ensemble that its own predictions contradict
        true = row(pooled=True).pooled
        value = (true[0], dataclasses.replace(true[1], accuracy=0.5))
        shown = "has pooled vote 0.75, mean_probability 0.5, but its bits give vote 0.75, mean_probability 1;"
    with pytest.raises(CheckpointError, match=shown):
        forged(tmp_path, **{name: value})


def test_bits_that_are_not_those_of_the_predictions_are_refused(tmp_path):
    true = row()
    for changes in (
        {"correct": row(predictions=PREDICTIONS[::-1][:1].repeat(3, axis=0)).correct},
        {"predictions": PackedIntegers.pack(PREDICTIONS[:, :3])},
        {"predictions": PackedIntegers.pack(PREDICTIONS[:2])},
        {"draws": 2},
    ):
        with pytest.raises(CheckpointError, match="row 'clean' does not fit its predictions and labels"):
            Evaluation.load(record(dataclasses.replace(true, **changes)).save(tmp_path / "forged.json"))
    (vote, _) = row(pooled=True).pooled
    short = dataclasses.replace(vote, predictions=PackedIntegers.pack(VOTE[:3]))
    with pytest.raises(CheckpointError, match="row 'clean' has a vote of another size"):
        Evaluation.load(record(dataclasses.replace(true, pooled=(short,))).save(tmp_path / "forged.json"))


def test_what_a_record_is_by_default():
    found = Evaluation((), PackedIntegers.pack(LABELS), 3, 0)
    assert (found.confidence, found.resamples, found.metadata) == (0.95, 0, {})
    assert (Evaluation.FORMAT, Evaluation.VERSION) == ("learn2perturb.evaluation", 2)
    assert row().zero_gradients is None
    assert row().pooled == ()
    assert PooledScore("vote", 3, 1.0, wilson(1, 1), PackedIntegers.pack(VOTE)).note == POOLED_NOTE


# --- finding a row


def test_one_row_is_found_by_all_that_tells_it_from_others():
    rows = (
        row(), row("pgd", eps=4 / 255), row("pgd"), row("pgd", noise=False), row("pgd", predictor="vote"),
        row("pgd", eps=16 / 255, noise=False),
    )  # fmt: skip
    found = record(*rows)
    assert found.row("clean") is rows[0]
    assert found.row("pgd", 8 / 255) is rows[2]
    assert found.row("pgd", 8 / 255 + 0.9e-9) is rows[2]
    assert found.row("pgd", 8 / 255, noise=False) is rows[3]
    assert found.row("pgd", predictor="vote") is rows[4]
    assert found.row("pgd", 16 / 255, noise=False) is rows[5]
    with pytest.raises(ConfigError, match="2 rows match row 'pgd' with eps=None, noise=True, predictor='single'"):
        found.row("pgd")
    with pytest.raises(ConfigError, match=r"^0 rows match .*; choose one of: eps=0.0156.*; eps=0.0313.*"):
        found.row("pgd", 8 / 255 + 1.5e-9)
    with pytest.raises(ConfigError, match="0 rows match row 'clean' with eps=0.1"):
        found.row("clean", 0.1)
    with pytest.raises(UnknownNameError, match="did you mean 'pgd'"):
        found.row("pdg")


# --- words


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "pgd 8/255"),
        ({"eps": None}, "pgd"),
        ({"noise": False}, "pgd 8/255, noise off"),
        ({"predictor": "vote"}, "pgd 8/255, vote"),
        ({"noise": False, "predictor": "vote"}, "pgd 8/255, noise off, vote"),
        ({"parameters": {"norm": "l2"}, "eps": 0.5}, "pgd 0.5 l2"),
        ({"parameters": {"norm": "l2"}, "eps": None}, "pgd"),
        ({"parameters": {"norm": "linf"}}, "pgd 8/255"),
    ],
)
def test_a_row_is_called_by_what_tells_it_from_others(changes, label):
    assert row("pgd", **changes).label == label


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (1 / 255, "1/255"), (254 / 255, "254/255"), (1.0, "1"), (2.0, "2"), (0.0, "0"), (0.4 / 255, "0.00156863"),
        (math.nan, "nan"), (math.inf, "least"), (8.0000005 / 255, "8/255"), (8.0000019 / 255, "0.0313726"),
        (7.9999995 / 255, "8/255"), (-8 / 255, "-0.0313725"), (1234.5678, "1234.57"),
    ],
)  # fmt: skip
def test_sizes_are_shown_as_the_literature_writes_them(eps, text):
    assert format_eps(eps) == text


def test_the_table():
    rows = (
        row(pooled=True),
        row("pgd", pooled=True),
        row("pgd", np.repeat(PREDICTIONS[:1], 10, axis=0), noise=False, predictor="mean_logits", members=4),
        row("much longer", PREDICTIONS[:1], eps=0.5, parameters={"norm": "l2"}),
    )
    lines = str(record(*rows, findings=["its answers depend on the batch"])).splitlines()

    def interval(one: Row) -> str:
        return f"[{100 * one.interval.low:.2f}, {100 * one.interval.high:.2f}]"

    assert [line.split("  ")[0] for line in lines[2:6]] == ["clean", "pgd", "pgd", "much longer"]
    widths = [len(dashes) for dashes in lines[1].split("  ")]
    starts = [sum(width + 2 for width in widths[:column]) for column in range(8)]
    cells = [[line[s : s + w].strip() for s, w in zip(starts, widths, strict=True)] for line in [lines[0], *lines[2:6]]]
    assert set(lines[1]) == {"-", " "}
    assert cells == [
        ["attack", "eps", "noise", "predictor", "accuracy %", "interval", "worst of 10", "n"],
        ["clean", "", "on", "single", "66.67 +- 14.43", interval(rows[0]), "", "4"],
        ["pgd", "8/255", "on", "single", "66.67 +- 14.43", interval(rows[1]), "", "4"],
        ["pgd", "8/255", "off", "mean_logits of 4", "75.00 +- 0.00", interval(rows[2]), "75.00", "4"],
        ["much longer", "0.5 l2", "none", "single", "75.00", interval(rows[3]), "75.00", "4"],
    ]
    numbers = {1, 6, 7}  # these end where their column ends, texts begin where it begins
    for line, texts in zip(lines[2:6], cells[1:], strict=True):
        for column, (start, width) in enumerate(zip(starts, widths, strict=True)):
            text = f" {texts[column]}" if column == 4 else texts[column]  # so that 100.00 is flush
            placed = text.rjust(width) if column in numbers else text.ljust(width)
            assert line[start : start + width] == placed
    assert lines[6:] == [
        "",
        "Accuracy: mean +- std over 3/10 fresh draws; interval: 95 %, over images and draws.",
        f"Ensembles of the draws above, {POOLED_NOTE}:",
        "  pgd 8/255: vote of 3 draws 75.00 %",
        "  pgd 8/255: mean probability of 3 draws 100.00 %",
        "NOTE: its answers depend on the batch.",
    ]


def test_the_table_of_a_network_without_noise_says_nothing_of_draws_and_ensembles():
    lines = str(record(row(predictions=PREDICTIONS[:1]))).splitlines()
    assert lines[3:] == ["", "Accuracy: interval: 95 %, over images and draws."]
    assert "over 2 fresh draws" in str(record(row(predictions=PREDICTIONS[:2])))
    assert str(dataclasses.replace(record(row(pooled=True)), confidence=0.9)).splitlines()[-1].startswith(
        "Accuracy: mean +- std over 3 fresh draws; interval: 90 %"
    )  # fmt: skip


def test_numbers_of_images_end_where_their_column_ends():
    lines = str(record(row(predictions=PREDICTIONS[:1], n=12))).splitlines()
    assert lines[0].endswith(" n") and lines[2].endswith("12") and len(lines[0]) == len(lines[2])
