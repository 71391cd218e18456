"""The page of a study: tables with seeds, differences and the paper's numbers, as the views and records have them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.experiments.facts import Published
from learn2perturb.experiments.folder import CONTENTS, StudyFolder
from learn2perturb.experiments.rendering import difference_table, table
from learn2perturb.experiments.results import Answer
from learn2perturb.experiments.view import PaperCheck, View
from learn2perturb.experiments.views import write_views
from learn2perturb.report.page import page
from tests.experiments.hand_made import evaluation, results, study
from tests.report.test_report import HOSTILE, data_of

RIGHT = {"pgd_at": (40, 41, 43), "pni": (60, 62, 64)}


def made(of, folder, *, records=True):
    """Write the views of a study whose records are made by hand; return its folder."""
    found = results(of, lambda pair: evaluation(RIGHT[pair.run.label("defense")][pair.run.label("seed") - 1]))
    answers = []
    for number, answer in enumerate(found.answers):
        path = answer.record.save(folder / "store" / "cells" / f"{number}.json") if records else None
        answers.append(Answer(answer.pair, answer.record, path))
    runs = folder / "store" / "runs"

    def run_of(run):
        place = runs / f"{run.label('defense')}-seed{run.label('seed')}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(f"defense: {run.label('defense')}\n")
        return place

    write_views(dataclasses.replace(found, answers=tuple(answers), folder=run_of), folder / "out")
    return folder / "out"


SEEDS = {"seeds": [1, 2, 3], "title": "Two defenses"}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return made(study({"baseline": {"defense": "pgd_at"}}, **SEEDS), tmp_path_factory.mktemp("three"))


def test_the_contents_of_a_folder_name_what_its_views_rest_on(three):
    contents = StudyFolder.load(three / CONTENTS)
    assert contents.views == ("table.json",) and (contents.missing, contents.wanted) == (0, 6)
    assert len(contents.records) == len(contents.runs) == 6
    assert all((three / path).exists() for path in (*contents.records, *contents.runs))
    assert not any(path.startswith("/") for path in contents.records)


def test_every_number_of_the_page_is_that_of_the_view(three):
    text = page(three)
    view = View.load(three / "table.json")
    shown = [
        [[cell.replace("+-", "±") for cell in row] for row in rows] for rows in (table(view), difference_table(view))
    ]
    assert data_of(text)["tables"] == shown
    for row in shown[0] + shown[1]:
        for cell in row:
            assert f">{cell}<" in text
    assert "41.33 ± 1.53" in text and "62.00 ± 2.00" in text, "mean and deviation over seeds"
    assert data_of(text)["verdict"] == "pni against pgd_at: better in 1 of 1."


def test_records_and_runs_of_a_study_come_along(three):
    text = page(three)
    assert "Training: pni-seed2" in text
    assert "Two defenses" in text
    moved = three.parent.with_name("moved")
    shutil.copytree(three.parent, moved)
    assert page(moved / "out") == text


def test_the_papers_numbers_stand_beside_ours(three, tmp_path):
    view = View.load(three / "table.json")
    paper = Published(0.5, 0.01)
    cells = tuple(dataclasses.replace(cell, paper=paper) for cell in view.cells)
    check = PaperCheck(cells[0].row, cells[0].column, None, 0.41, paper, -0.09, 0.02, "differs", ("fewer epochs",))
    path = dataclasses.replace(view, cells=cells, paper_checks=(check,)).save(tmp_path / "view.json")
    text = page(path)
    assert "pgd, paper" in text and f">{paper}<" in text.replace("±", "+-")
    assert "0 of 1 numbers agree, 1 differ" in text and "fewer epochs" in text


def test_a_curve_is_drawn_and_its_numbers_are_a_table(tmp_path):
    curve = {
        "cells": {"pgd": {"attack": "pgd20", "eps": [0.01, 0.02]}},
        "views": {"curve": {"kind": "curve", "x": "eps", "series": ["defense"]}},
    }
    folder = made(study(seeds=[1], **curve), tmp_path)
    data = data_of(page(folder))
    values = data["charts"]["view-0"]["data"]["values"]
    assert {(value["of"], round(value["at"], 2)) for value in values} == {
        (name, at) for name in RIGHT for at in (2.55, 5.1)
    }
    assert {value["value"] for value in values} == {40.0, 60.0}
    assert all(value["low"] < value["value"] < value["high"] for value in values)


def test_what_is_gone_is_said(three, tmp_path):
    shutil.copytree(three, tmp_path / "alone")
    text = page(tmp_path / "alone")
    assert "12 records and runs are no longer where a study says" in text
    assert "41.33 ± 1.53" in text


def test_cells_without_a_record_are_said(tmp_path):
    of = study(seeds=[1])
    found = results(of, lambda pair: evaluation(40) if pair.run.label("defense") == "pni" else None)
    write_views(found, tmp_path / "out")
    text = page(tmp_path / "out")
    assert "1 of 2 cells of study hand have no record yet" in text and ">missing<" in text


def test_names_of_a_study_stay_words(tmp_path):
    of = study({"title": HOSTILE, "notes": [HOSTILE]}, seeds=[1], title=HOSTILE, notes=[HOSTILE])
    text = page(made(of, tmp_path))
    assert 'alert("1")' not in text and "<img src=x" not in text


def test_a_damaged_view_is_refused_in_a_line(three, tmp_path):
    shutil.copytree(three, tmp_path / "out")
    (tmp_path / "out" / "table.json").write_text("{}")
    with pytest.raises(CheckpointError, match="table.json"):
        page(tmp_path / "out")


def test_a_view_may_not_take_the_name_of_the_contents(tmp_path):
    of = study(seeds=[1], views={"study": {"rows": ["defense"]}})
    with pytest.raises(ConfigError, match="another name"):
        write_views(results(of, lambda pair: None), tmp_path)


def test_more_networks_than_a_page_takes(three, monkeypatch):
    monkeypatch.setattr("learn2perturb.report.content.MOST_RUNS", 2)
    text = page(three)
    assert "of 2 networks at most" in text and text.count("<h2>Training: ") == 2


def test_the_verb_takes_the_name_of_a_study(three, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "table1"]) == 2
    assert "learn2perturb study table1" in capsys.readouterr().err
    assert main(["report", "hand"]) == 2
    assert "no run folder, no study and no record" in capsys.readouterr().err
    shutil.copytree(three, tmp_path / "runs" / "studies" / "hand-laptop")
    assert main(["report", "hand"]) == 0
    assert "Two defenses" in (tmp_path / "report.html").read_text(encoding="utf-8")
    shutil.copytree(three, tmp_path / "runs" / "studies" / "hand-smoke")
    capsys.readouterr()
    assert main(["report", "hand"]) == 2
    assert "hand-laptop" in capsys.readouterr().err


def test_the_page_of_a_study_needs_no_torch(three, tmp_path):
    code = (
        "import sys; from learn2perturb.cli.main import main; "
        f"code = main(['report', {str(three)!r}, '--out', {str(tmp_path / 'page.html')!r}]); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(json.dumps(data_of((tmp_path / "page.html").read_text())))["tables"]
