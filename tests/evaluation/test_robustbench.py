"""RobustBench's fields from records made by hand: what counts, what does not, and the words that say why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from learn2perturb.attacks import AutoAttack
from learn2perturb.evaluation.intervals import wilson
from learn2perturb.evaluation.result import Evaluation, Row
from learn2perturb.evaluation.robustbench import FIELDS, RobustBenchEntry, model_info
from learn2perturb.records import PackedBits, PackedIntegers, plain
from learn2perturb.registry import MODELS

EPS = 8 / 255
WEIGHTS = "00aa"
HEADER: dict[str, Any] = {
    "dataset": "cifar10", "config": {"eps": EPS}, "noise": [{}, {}], "predictor": "single", "defense": "learn2perturb",
    "registered_name": "digits_cnn",
}  # fmt: skip


def row(attack: str = "clean", accuracy: float = 0.5, **changes: Any) -> Row:
    auto = attack == "autoattack"
    values: dict[str, Any] = {
        "attack": attack, "attack_type": "AutoAttack" if auto else None, "eps": EPS if auto else None,
        "parameters": plain(AutoAttack()) if auto else {}, "noise": True, "stochastic": True, "predictor": "single",
        "members": 1, "n": 10_000, "draws": 10, "accuracy": accuracy, "std": None, "interval": wilson(1, 2),
        "worst_of": {}, "linf": 0.0, "l2": 0.0, "forward_passes": 0.0, "backward_passes": 0.0, "seconds": 0.0,
        "correct": PackedBits.pack(np.ones((1, 1), dtype=bool)), "predictions": PackedIntegers.pack(np.zeros((1, 1))),
    }  # fmt: skip
    return Row(**values | changes)


def record(*rows: Row, **metadata: Any) -> Evaluation:
    known = {"model": "mine", "weights": WEIGHTS, "data": "cifar10", "split": "test", "images": "11", "engine": "plain"}
    return Evaluation(rows, PackedIntegers.pack(np.zeros(1)), 10, 0, metadata=known | metadata)


def entry(*records: Evaluation, header: dict[str, Any] | None = None, **settings: Any) -> RobustBenchEntry:
    settings = {"weights": {WEIGHTS: True}} | settings
    return model_info(HEADER | (header or {}), records, **settings)


def why(found: RobustBenchEntry, key: str) -> str:
    (note,) = [note for note in found.notes if note.startswith(f"{key} is null: ")]
    return note.removeprefix(f"{key} is null: ")


def test_a_record_in_full_fills_all_but_what_is_filled_by_hand():
    found = entry(record(row(accuracy=0.91234), row("autoattack", 0.45678)))
    assert tuple(found.info) == FIELDS
    assert found.info["clean_acc"] == "91.23"
    assert found.info["autoattack_acc"] == "45.68"
    assert found.info["eps"] == "8/255"
    assert found.info["dataset"] == "cifar10"
    assert found.info["additional_data"] is False
    assert found.info["number_forward_passes"] == 1
    assert found.info["footnote"] == (
        "Randomised: noise at 2 sites, on at test time. Clean accuracy on 10000 images, mean of 10 draws. "
        "AutoAttack standard, linf 8/255, on 10000 images, mean of 10 draws."
    )
    by_hand = ["link", "venue", "reported", "external", "unreliable"]
    assert [key for key in FIELDS if found.info[key] is None] == by_hand
    assert [why(found, key) for key in by_hand] == ["no record says it; fill it in by hand"] * 5
    assert found.notes[-1].startswith("RobustBench wants deterministic networks, and this one draws noise at 2 sites")


def test_without_noise_the_rows_of_the_plain_network_count_and_nothing_is_randomised():
    noisy = record(row(accuracy=0.9), row(accuracy=0.8, noise=False, stochastic=False, draws=1))
    found = entry(noisy, weights={WEIGHTS: False}, noise=False, header={"predictor": "vote", "members": 10})
    assert found.info["clean_acc"] == "80.00"
    assert found.info["footnote"] == "Clean accuracy on 10000 images."
    assert found.info["number_forward_passes"] == 1
    assert not any("deterministic" in note for note in found.notes)
    ensemble = {"predictor": "vote", "members": 10}
    assert entry(noise=False, header=ensemble).info["number_forward_passes"] == 1  # of the plain network
    assert entry(header=ensemble).info["number_forward_passes"] == 10


def test_of_several_rows_the_lowest_counts():
    records = [record(row(accuracy=share), row("autoattack", share / 2)) for share in (0.9, 0.8, 0.85)]
    found = entry(*records)
    assert (found.info["clean_acc"], found.info["autoattack_acc"]) == ("80.00", "40.00")


def test_the_clean_accuracy_is_that_of_the_attacked_images():
    attacked = record(row("autoattack", 0.4))
    other = record(row(accuracy=0.9), images="22")
    assert entry(other).info["clean_acc"] == "90.00"
    found = entry(attacked, other)
    assert found.info["clean_acc"] is None
    assert why(found, "clean_acc") == "clean of mine: it is of other images than the attacked ones"
    assert entry(attacked, record(row(accuracy=0.7))).info["clean_acc"] == "70.00"


@pytest.mark.parametrize(
    ("changes", "metadata", "reason"),
    [
        ({}, {"weights": None}, "its record holds no hash of the weights (of an older version): evaluate again"),
        ({}, {"weights": "ff"}, "it is of other weights (ff, exported are 00aa)"),
        ({"noise": False}, {}, "its noise was off"),
        ({"predictor": "vote"}, {}, "it is of predictor vote, not single"),
        ({}, {"data": "digits"}, "it is of digits, not of cifar10"),
        ({}, {"split": "validation"}, "it is of 10,000 images, not known to be the 10,000 test images of cifar10"),
        ({}, {"split": None}, "it is of 10,000 images, not known to be the 10,000 test images of cifar10"),
        ({"n": 9_999}, {}, "it is of 9,999 images, not known to be the 10,000 test images of cifar10"),
    ],
)
def test_a_row_of_anything_else_fills_nothing(changes, metadata, reason):
    found = entry(record(row(**changes), **metadata))
    assert found.info["clean_acc"] is None
    label = "clean, noise off" if "noise" in changes else "clean, vote" if "predictor" in changes else "clean"
    assert why(found, "clean_acc") == f"{label} of mine: {reason}"


def test_rows_with_noise_are_not_those_of_the_plain_network():
    found = entry(record(row()), weights={WEIGHTS: False})
    assert why(found, "clean_acc") == "clean of mine: its noise was on"
    assert "exported are unknown" in why(entry(record(row()), weights=None), "clean_acc")
    assert "exported are a or b" in why(entry(record(row()), weights={"a": True, "b": False}), "clean_acc")


def test_a_data_set_that_is_not_published_counts_in_whole():
    header = {"dataset": "digits"}
    assert entry(record(row(n=17), data="digits"), header=header).info["clean_acc"] == "50.00"
    found = entry(record(row(n=17), data="digits", split=None), header=header)
    assert "it is of 17 images, not known to be all test images of digits" in why(found, "clean_acc")
    nameless = entry(record(row(), data=None), header={"dataset": None})
    assert "it is of None, not of a data set with a name" in why(nameless, "clean_acc")
    assert nameless.info["additional_data"] is None


def test_the_data_set_of_a_header_without_one_is_that_of_its_config():
    header = {key: value for key, value in HEADER.items() if key not in ("dataset", "defense")}
    header["config"] = {"eps": EPS, "dataset": "cifar10", "defense": "trades"}
    found = model_info(header, [record(row())], weights={WEIGHTS: True})
    assert found.info["dataset"] == "cifar10"
    assert found.info["clean_acc"] == "50.00"
    assert found.info["authors"] == "Zhang et al."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"predictor": "vote", "members": 10}, None),
        ({"predictor": "vote", "members": 5}, "it is of 5 passes an answer, not 10"),
        ({"predictor": "single", "members": 10}, "it is of predictor single, not vote"),
        ({"predictor": "single", "members": 1, "stochastic": False}, None),  # all predictors are one
    ],
)
def test_the_answer_is_made_as_the_run_says(changes, reason):
    found = entry(record(row(**changes)), header={"predictor": "vote", "members": 10})
    if reason is None:
        assert found.info["clean_acc"] == "50.00"
        assert found.info["number_forward_passes"] == changes["members"]
    else:
        assert reason in why(found, "clean_acc")
        assert found.info["number_forward_passes"] == 10


def test_one_draw_has_no_members():
    assert entry(record(row()), header={"predictor": "single", "members": 10}).info["clean_acc"] == "50.00"


def test_a_vote_of_a_number_that_is_not_known_takes_the_records():
    header = {"predictor": "vote", "members": None}
    assert entry(record(row(predictor="vote", members=7)), header=header).info["number_forward_passes"] == 7
    found = entry(header=header)
    assert found.info["number_forward_passes"] is None
    assert why(found, "number_forward_passes") == "the run does not say"
    assert entry(header={"predictor": None}).info["number_forward_passes"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eps": 4 / 255}, "its eps is 4/255, not 8/255"),
        ({"eps": EPS + 2e-9}, "its eps is 8/255, not 8/255"),
        ({"eps": None}, "its eps is not known, not 8/255"),
        ({"norm": "l2"}, "its norm is l2, not linf"),
        ({"version": "rand"}, "its version is 'rand', not 'standard' as published"),
        ({"steps": 99}, "its steps is 99, not 100 as published"),
        ({"steps": 101}, "its steps is 101, not 100 as published"),
        ({"targets": 8}, "its targets is 8, not 9 as published"),
        ({"queries": 4999}, "its queries is 4999, not 5000 as published"),
        ({"draws": 19}, "its draws is 19, not 20 as published"),
        ({"loss": "ce"}, "its loss is 'ce', not 'margin' as published"),
    ],
)
def test_another_budget_than_the_published_one_fills_nothing(changes, reason):
    attacked = row("autoattack", parameters=plain(AutoAttack()) | {k: v for k, v in changes.items() if k != "eps"},
                   **{k: v for k, v in changes.items() if k == "eps"})  # fmt: skip
    found = entry(record(row(), attacked))
    assert found.info["autoattack_acc"] is None
    assert why(found, "autoattack_acc").endswith(f"of mine: {reason}")
    assert found.info["clean_acc"] == "50.00"
    assert "AutoAttack" not in found.info["footnote"]


@pytest.mark.parametrize("free", [{"eot": 20}, {"eot_average": "probability"}, {"seed": 5}, {"eps": 0.5}])
def test_settings_that_weaken_nothing_are_free(free):
    found = entry(record(row(), row("autoattack", 0.4, parameters=plain(AutoAttack()) | free)))
    assert found.info["autoattack_acc"] == "40.00"


def test_a_size_that_the_run_does_not_know_fills_nothing():
    found = entry(record(row(), row("autoattack")), header={"config": {}})
    assert "its eps is 8/255, not known of the run" in why(found, "autoattack_acc")
    assert found.info["eps"] is None
    close = record(row(), row("autoattack", 0.4, eps=EPS + 0.5e-9))
    assert entry(close).info["autoattack_acc"] == "40.00"


def test_an_attack_that_was_not_crafted_in_float32_fills_nothing():
    found = entry(record(row(), row("autoattack"), engine="fast"))
    assert "it was crafted in execution mode 'fast', not in float32 ('plain')" in why(found, "autoattack_acc")


def test_what_is_missing_is_said():
    found = entry()
    assert why(found, "clean_acc") == "no record has a row of clean"
    assert why(found, "autoattack_acc") == "no record has a row of AutoAttack"
    named = entry(record(row("mine", attack_type=None)))
    assert why(named, "clean_acc") == "no record has a row of clean"
    twice = entry(record(row(noise=False), row(noise=False)))
    assert why(twice, "clean_acc") == "clean, noise off of mine: its noise was off"  # said once


def test_an_empty_header_says_nothing():
    found = model_info({}, [])
    assert {key: value for key, value in found.info.items() if value is not None} == {"number_forward_passes": 1}
    assert len(found.notes) == len(FIELDS) - 1
    assert model_info({"noise": None, "config": None}, []).info == found.info


def test_single_scorings_are_no_mean_and_noise_without_records_is_still_said():
    found = entry(record(row(draws=1), row("autoattack", draws=1)))
    assert found.info["footnote"].endswith(
        "Clean accuracy on 10000 images. AutoAttack standard, linf 8/255, on 10000 images."
    )
    assert entry().info["footnote"] == "Randomised: noise at 2 sites, on at test time."
    found = entry(record(row(draws=2), row("autoattack", draws=2)))
    assert found.info["footnote"].count("on 10000 images, mean of 2 draws.") == 2


@pytest.mark.parametrize(
    ("defense", "name", "authors"),
    [
        ("learn2perturb", "Learn2Perturb", "Jeddi et al."),
        ("none", "plain training on clean images", None),  # no paper, so what it is
        ("mine", "mine", None),
        (None, None, None),
    ],
)
def test_the_paper_is_that_of_the_defense(defense, name, authors):
    info = entry(header={"defense": defense}).info
    assert info["authors"] == authors
    assert (info["name"] or "").startswith(name or "")
    assert (info["name"] is None) == (name is None)


@pytest.mark.parametrize(("name", "shown"), [("mine", "mine"), (None, None)])
def test_an_architecture_that_is_not_registered_is_shown_as_it_is_called(name, shown):
    assert entry(header={"registered_name": name}).info["architecture"] == shown
    assert entry().info["architecture"] == MODELS.entry("digits_cnn").summary != "digits_cnn"
