"""What a reviewer does: a network of somebody else's, a claim, two verbs, a page that says what came of it."""

from __future__ import annotations

import html
import re

import pytest

from learn2perturb.certification import Certification
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import Diagnosis, budget
from learn2perturb.evaluation import Evaluation
from learn2perturb.report.page import page
from tests.cli.test_diagnose import TINY  # a budget of a second
from tests.foreign import write_network
from tests.report.test_report import data_of

CLAIM = "90 % under pgd20 with 0.1"


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """Type what a reviewer types, in an empty folder; return the folder and the text of the page."""
    folder = tmp_path_factory.mktemp("review")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(budget.BUDGETS, "quick", TINY)
        network = write_network(folder, patch, "reviewed")
        data = ["--dataset", "digits", "--limit", "16", "--eps", "0.1"]
        assert main(["evaluate", network, *data, "--attacks", "fgsm,pgd7", "--draws", "3", "--keep-images", "2"]) == 0
        assert main(["diagnose", network, *data, "--claim", CLAIM]) == 0
        assert main(["report", "evaluation", "--claim", "90 %", "--out", "page.html"]) == 0
    return folder, (folder / "page.html").read_text(encoding="utf-8")


def test_claim_verdict_and_commands_stand_first(reviewed):
    folder, text = reviewed
    (path,) = (folder / "evaluation").glob("*diagnosis*.json")
    diagnosis = Diagnosis.load(path)
    first = html.unescape(text[text.index("<header>") : text.index("</header>")])
    assert str(diagnosis.claim) in first
    verdict = re.search(r'id="verdict">(.*?)</p>', first)[1]
    assert verdict == diagnosis.summary.splitlines()[0] == data_of(text)["verdict"]
    commands = re.findall(r"<code>(.*?)</code>", first)
    assert [command.split()[:3] for command in commands] == [
        ["learn2perturb", verb, "reviewed:make"] for verb in ("evaluate", "diagnose")
    ]
    assert "--claim" in commands[1]
    assert "<details open><summary>Run it again" in first


def test_the_command_on_the_page_gives_the_numbers_of_the_page(reviewed, monkeypatch):
    import shlex

    folder, text = reviewed
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    command = html.unescape(re.search(r"<code>(learn2perturb evaluate .*?)</code>", text)[1])
    assert main([*shlex.split(command)[1:], "--out", "again.json"]) == 0
    again = data_of(page("again.json"))
    for one, other in zip(data_of(text)["rows"], again["rows"], strict=True):
        assert {**one, "told": ""} == {**other, "told": ""}
    assert again["galleries"] == data_of(text)["galleries"] != []


def test_every_kind_of_figure_is_that_of_a_record(reviewed):
    """The page's JSON against the records, value by value."""
    folder, text = reviewed
    data = data_of(text)
    (of_evaluation,) = (path for path in (folder / "evaluation").glob("*.json") if "diagnosis" not in path.name)
    (of_diagnosis,) = (folder / "evaluation").glob("*diagnosis*.json")
    found, diagnosis = Evaluation.load(of_evaluation), Diagnosis.load(of_diagnosis)
    assert [(row["name"], row["accuracy"]) for row in data["rows"]] == [
        (row.attack, pytest.approx(100 * row.accuracy)) for row in found.rows
    ]
    assert [(check["number"], check["status"]) for check in data["checks"]] == [
        (check.number, check.status) for check in diagnosis.checks
    ]
    drawn = [curve for curve in diagnosis.curves if curve.points]
    assert drawn
    for curve in drawn:
        band, *_ = (value for name, value in data["charts"].items() if name == f"{curve.axis}-0")
        scale = 255 if curve.axis == "eps" else 1
        for point, value in zip(curve.points, band["data"]["values"], strict=True):
            assert value == {
                "at": pytest.approx(scale * point.at), "accuracy": pytest.approx(100 * point.accuracy),
                "low": pytest.approx(100 * point.interval.low), "high": pytest.approx(100 * point.interval.high),
            }  # fmt: skip
    assert not list(folder.glob("**/*certification*")) and Certification.FORMAT not in text
