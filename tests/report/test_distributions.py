"""Maps of the noise, margins and classes on a page: every figure is that of a record, and what is missing is said."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from torch.utils.data import DataLoader, TensorDataset

import learn2perturb as l2p
from learn2perturb.attacks import FGSM
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation
from learn2perturb.records import PackedIntegers
from learn2perturb.report.class_charts import MOST_CLASSES, MOST_CONFUSED
from learn2perturb.report.page import page
from learn2perturb.runs.noise_maps import FILE, NoiseMaps
from tests.report.test_report import HOSTILE, data_of, images, noisy, record  # noqa: F401  the fixture

EPOCH = {"kind": "epoch", "epoch": 0, "theta": {"bn1": {"mean": 0.2}}, "theta_mean": 0.2, "theta_schedule": 0.1}


def run_folder(folder, maps):
    folder.mkdir()
    (folder / "config.yaml").write_text("defense: learn2perturb\n")
    (folder / "metrics.jsonl").write_text(json.dumps(EPOCH))
    if maps is not None:
        NoiseMaps.of(maps).save(folder / FILE)
    return folder


def named(names, n=12):
    """Return an evaluation of a set that names its classes, by a loader."""
    x, y = images(n)
    data = TensorDataset(x, y)
    data.classes = names
    return l2p.evaluate(noisy, DataLoader(data, batch_size=5), {"fgsm": FGSM(0.1)}, draws=3, progress=False)


def many(classes, n):
    """Return a record by hand, of so many classes, in which every second image is taken for the class after its own."""
    from learn2perturb.evaluation.result import statistics

    labels = np.arange(n) % classes
    predictions = (labels + np.arange(n) % 2) % classes
    row = l2p.evaluate(noisy, images(4), {}, progress=False, draws=1).rows[0]
    told = statistics(predictions[None], labels, {}, stochastic=False, batches=(), confidence=0.95)
    row = dataclasses.replace(row, stochastic=False, margins=None, **told)
    return Evaluation((row,), PackedIntegers.pack(labels), classes, 0)


def test_the_noise_is_shown_site_by_site(tmp_path):
    scale = np.arange(24.0).reshape(2, 3, 4)
    data = data_of(page(run_folder(tmp_path / "run", {"theta/bn1": scale, "theta/<b>": np.ones((5, 1, 1))})))
    values = data["charts"]["noise-0-0"]["data"]["values"]
    assert [value["value"] for value in values] == pytest.approx(scale.mean(axis=0).reshape(-1).tolist())
    told = data["charts"]["noise-0-0"]["description"]
    assert "shape 2 x 3 x 4" in told and "mean 11.5" in told and "from 0 to 23" in told and "over channels" in told
    assert len(data["charts"]["noise-0-1"]["data"]["values"]) == 5


def test_more_sites_than_a_page_has_room_for_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("learn2perturb.report.content.MOST_MAPS", 3)
    folders = [run_folder(tmp_path / name, {f"theta/{site}": np.ones(2) for site in "ab"}) for name in "xy"]
    text = page(*folders)
    assert sorted(name for name in data_of(text)["charts"] if name.startswith("noise-")) == [
        "noise-0", "noise-0-0", "noise-0-1", "noise-1", "noise-1-0",
    ]  # fmt: skip
    assert text.count("The noise is shown at 1 of 2 sites") == 1


def test_a_run_without_maps_says_how_they_come_about(tmp_path):
    assert "this run has no noise.json" in page(run_folder(tmp_path / "run", None))


def test_damaged_maps_are_refused_in_a_line(tmp_path):
    folder = run_folder(tmp_path / "run", None)
    (folder / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"noise\.json"):
        page(folder)


@pytest.mark.parametrize(
    "odd",
    [
        {"theta_mean": {}}, {"theta_schedule": {"a": 1}}, {"test_pgd": {}}, {"epoch": -1}, {"epoch": True},
        {"test_pgd": 10**400}, {"epoch": 10**400}, {"theta_mean": None}, {"test_clean": 1}, {HOSTILE + "_pgd": 0.5},
    ],
)  # fmt: skip
def test_metrics_of_an_odd_shape_are_left_out(odd, tmp_path):
    folder = run_folder(tmp_path / "run", None)
    (folder / "metrics.jsonl").write_text(f"{json.dumps(EPOCH)}\n{json.dumps({**EPOCH, 'epoch': 1, **odd})}\n[1]\n7")
    text = page(folder)
    assert 'alert("1")' not in text
    for chart in data_of(text)["charts"].values():
        assert all(isinstance(value["value"], int | float) for value in chart["data"]["values"])


@pytest.mark.parametrize("content", ["", "[1, 2]", "7", "a: {b: [1, 2]}", "<b>: <i>"])
def test_settings_of_an_odd_shape_are_a_page(content, tmp_path):
    folder = run_folder(tmp_path / "run", {"theta/bn1": np.ones(3)})
    (folder / "config.yaml").write_text(content)
    assert "<i>" not in page(folder)


def test_margins_count_every_answer(record, tmp_path):  # noqa: F811
    found, path = record
    charts = data_of(page(path))["charts"]
    for which, row in (("clean", found.row("clean")), ("least", found.row("pgd"))):
        values = charts[f"margins-{which}-0"]["data"]["values"]
        correct = row.correct.unpack()
        for answers, side, count in (("right", 1, correct.sum()), ("wrong", -1, (~correct).sum())):
            own = [value for value in values if value["answers"] == answers]
            assert sum(value["share"] for value in own) == pytest.approx(100 * count / correct.size)
            assert all(side * value["from"] >= 0 and side * value["to"] >= 0 for value in own)
    old = tuple(dataclasses.replace(row, margins=None) for row in found.rows)
    text = page(dataclasses.replace(found, rows=old).save(tmp_path / "old.json"))
    assert "Margins are missing" in text and "margins-least-0" not in data_of(text)["charts"]


def test_margins_of_other_answers_are_refused(record, tmp_path):  # noqa: F811
    found, _ = record
    moved = dataclasses.replace(found.rows[0].margins, right=found.rows[0].margins.wrong)
    rows = (dataclasses.replace(found.rows[0], margins=moved), *found.rows[1:])
    path = dataclasses.replace(found, rows=rows).save(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match="margins"):
        page(path)


@pytest.mark.parametrize("names", [["cat", HOSTILE], ["same", "same"]])
def test_classes_have_their_names(names, tmp_path):
    found = named(names)
    text = page(found.save(tmp_path / "a.json"))
    charts = data_of(text)["charts"]
    assert 'alert("1")' not in text and found.metadata["classes"] == names
    labels = found.labels.unpack()
    shown = charts["classes-0"]["data"]["values"]
    assert len({value["class"] for value in shown}) == len(shown) == len(set(labels.tolist()))
    assert all(value["class"].startswith(tuple(names)) for value in shown)
    assert len(charts["confusion-0"]["data"]["values"]) == 2 * len(shown)


def test_names_that_are_not_those_of_the_classes_are_left_out():
    assert named(["one"]).metadata["classes"] is None


def test_a_thousand_classes_fit_a_page(tmp_path):
    found = many(1000, 3000)
    text = page(found.save(tmp_path / "a.json"))
    charts = data_of(text)["charts"]
    assert len(text) < 4 << 20
    assert len(charts["classes-0"]["data"]["values"]) == MOST_CLASSES
    assert f"lowest {MOST_CLASSES} of 1000 classes" in charts["classes-0"]["title"]
    assert len(charts["confusion-0"]["data"]["values"]) == MOST_CONFUSED**2
    assert "1000" in charts["confusion-0"]["title"]


@pytest.mark.parametrize("classes", [1, 2])
def test_one_image_or_one_class_is_a_page(classes, tmp_path):
    assert data_of(page(many(classes, 1).save(tmp_path / "a.json")))["rows"][0]["n"] == 1


def test_a_record_without_rows_shows_that_nothing_was_measured(record, tmp_path):  # noqa: F811
    path = dataclasses.replace(record[0], rows=()).save(tmp_path / "none.json")
    assert data_of(page(path))["verdict"] == "No accuracy was measured here."
    assert len(data_of(page(path, record[1]))["rows"]) == len(record[0].rows)


def test_an_answer_beyond_the_classes_is_refused(tmp_path):
    found = dataclasses.replace(many(3, 30), num_classes=2)
    with pytest.raises(CheckpointError, match="classes"):
        page(found.save(tmp_path / "a.json"))
