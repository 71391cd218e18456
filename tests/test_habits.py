"""What the repository promises outside of the code: versions that are tried, a citation, dated releases."""

from __future__ import annotations

import datetime
import pathlib
import re
import tomllib

import yaml

import learn2perturb

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def matrix() -> list[dict[str, str]]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    return workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]


def test_every_python_that_is_claimed_is_tried():
    prefix = "Programming Language :: Python :: 3."
    claimed = {one.removeprefix(prefix) for one in PROJECT["classifiers"] if one.startswith(prefix)}
    assert {one["python"].removeprefix("3.") for one in matrix()} == claimed == {"11", "12", "13", "14"}
    assert PROJECT["requires-python"] == f">=3.{min(claimed)}"


def test_the_oldest_torch_that_is_claimed_is_tried_and_the_newest():
    (bound,) = [one for one in PROJECT["dependencies"] if re.match(r"torch\b", one)]
    oldest = bound.removeprefix("torch>=")
    assert {one["torch"] for one in matrix()} == {f"=={oldest}.*", f">={oldest}"}


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == learn2perturb.__version__
    assert "Learn2Perturb" in citation["preferred-citation"]["title"]
    released = datetime.date.fromisoformat(citation["date-released"])
    assert f"## [{citation['version']}] - {released}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_release_has_a_date():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])


def test_forms_and_policies_are_there_and_can_be_read():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert {path.stem for path in forms} >= {"bug", "claim", "wish"}
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stem == "config" or {"name", "description", "body"} <= set(form)
    assert "DeprecationWarning" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "private" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
