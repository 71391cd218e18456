"""A page says what the records say, asks nothing of any network, and takes nothing from them for markup."""

from __future__ import annotations

import json
import re

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.attacks import PGD
from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.report import report
from learn2perturb.report.page import page

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(1)>'


def noisy(x):
    score = x.flatten(1).mean(1, keepdim=True) + 0.1 * torch.randn(len(x), 1)
    return torch.cat([score, 0.5 + 0 * score], dim=1)


def images(n=40):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, (x.flatten(1).mean(1) < 0.5).long()


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    found = l2p.evaluate(noisy, images(), {"pgd": PGD(0.1, 0.05, 2)}, draws=10, name="mine", progress=False)
    return found, str(found.save(tmp_path_factory.mktemp("records") / "a.json"))


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_every_number_of_the_page_is_that_of_the_record(record):
    found, path = record
    rows = data_of(page(path))["rows"]
    assert len(rows) == len(found.rows)
    for row, true in zip(rows, found.rows, strict=True):
        assert (row["attack"], row["n"], row["draws"]) == (true.attack, true.n, true.draws)
        assert row["accuracy"] == pytest.approx(100 * true.accuracy, abs=1e-12)
        assert row["std"] == (None if true.std is None else pytest.approx(100 * true.std))
        assert (row["low"], row["high"]) == pytest.approx((100 * true.interval.low, 100 * true.interval.high))
        assert row["worst"] == pytest.approx(100 * true.worst_of[10])


def test_what_stands_in_the_table_is_what_its_script_has(record):
    text = page(record[1])
    for row in data_of(text)["rows"]:
        assert f"{row['accuracy']:.2f} ± {row['std']:.2f}" in text
        assert f"[{row['low']:.2f}, {row['high']:.2f}]" in text


def test_the_classes_are_counted(record):
    found, path = record
    charts = data_of(page(path))["charts"]
    least = min(found.rows, key=lambda row: row.accuracy if row.noise else 2)
    labels, correct = found.labels.unpack(), least.correct.unpack()
    for value in charts["classes-0"]["data"]["values"]:
        own = labels == int(value["class"])
        assert (value["accuracy"], value["n"]) == (pytest.approx(100 * correct[:, own].mean()), own.sum())
    shares = charts["confusion-0"]["data"]["values"]
    assert sum(value["share"] for value in shares if value["true"] == "0") == pytest.approx(100)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("99 %", "Less than is claimed"),
        ("1 %", "strong enough"),
        (None, "Lowest"),
    ],
)
def test_the_verdict_goes_no_further_than_the_records(claim, said, record):
    text = page(record[1], claim=claim)
    assert said in data_of(text)["verdict"]
    assert "No diagnosis is among the records" in text


def test_one_file_that_asks_nothing_of_a_network(record, tmp_path):
    path = report(record[1], out=tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 4 << 20
    own = text.replace(text[text.index("<script>") : text.rindex("<script>")], "")  # without the library
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", own)
    assert "default-src 'none'" in text


def test_nothing_of_a_record_becomes_markup(tmp_path):
    found = l2p.evaluate(noisy, images(), {HOSTILE: PGD(0.1, 0.05, 1)}, draws=2, name=HOSTILE, progress=False)
    text = page(found.save(tmp_path / "hostile.json"))
    assert 'alert("1")' not in text
    assert "<img src=x" not in text
    assert data_of(text)["rows"][1]["attack"] == HOSTILE  # whole, where the script reads it


def test_a_run_folder_brings_its_training_and_its_records(record, tmp_path):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    record[0].save(run / "evaluation" / "test.json")
    (run / "config.yaml").write_text("defense: learn2perturb\nepochs: 2\n")
    lines = [
        {
            "kind": "epoch", "epoch": epoch, "loss": 1.0, "clean_accuracy": 0.5 + epoch / 10,
            "theta": {"bn1": {"mean": 0.3}},
            "theta_mean": 0.3, "theta_schedule": 0.25,
        }
        for epoch in range(2)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "epo')  # torn by a kill
    data = data_of(page(run))
    drawn = data["charts"]["noise-0"]["data"]["values"]
    assert {(value["of"], value["value"]) for value in drawn} == {("mean theta", 0.3), ("regulariser alone", 0.25)}
    assert [value["value"] for value in data["charts"]["training-0"]["data"]["values"]] == [50.0, 60.0]
    assert len(data["rows"]) == 2


def test_a_row_that_several_records_share_is_shown_once(record, tmp_path):
    copy = record[0].save(tmp_path / "again.json")
    assert len(data_of(page(record[1], copy))["rows"]) == len(record[0].rows)


def test_what_cannot_be_shown_is_refused_in_a_line(tmp_path, record):
    with pytest.raises(ConfigError, match="no run folder, no study and no record"):
        page(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="nothing to show"):
        page(tmp_path)
    (tmp_path / "other.json").write_text('{"format": "elsewhere"}')
    with pytest.raises(CheckpointError, match="record of evaluate"):
        page(tmp_path / "other.json")
    torn = tmp_path / "torn.json"
    torn.write_text(record[0].save(tmp_path / "whole.json").read_text()[:-100])
    with pytest.raises(CheckpointError):
        page(torn)
    with pytest.raises(ConfigError, match="claim"):
        page(record[1], claim="robust")


def test_the_verb_writes_the_page_and_says_where(record, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", record[1], "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"page: {out}\n"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "no"), "--out", str(out)]) == 2


@pytest.mark.parametrize(
    "line",
    [
        {"epoch": 0, "clean_accuracy": float("nan"), "alpha": {}, "alpha_mean": float("inf")},
        {"epoch": 0, "alpha": {}, "alpha_mean": "much"},
        {"clean_accuracy": 0.5},
        {"epoch": "first", "clean_accuracy": 0.5},
    ],
)
def test_metrics_that_are_no_numbers_draw_nothing(line, tmp_path):
    (tmp_path / "config.yaml").write_text("defense: pni\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "epoch", **line}))
    assert data_of(page(tmp_path))["charts"] == {}
