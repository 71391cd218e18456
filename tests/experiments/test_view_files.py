"""Files of views: every format, names from files of strangers escaped in each, the same bytes each time."""

from __future__ import annotations

import csv
import io
import re

import pytest

from learn2perturb.errors import ConfigError
from learn2perturb.experiments.plots import COLOURS, MARKERS, figures
from learn2perturb.experiments.rendering import latex, to_csv, to_latex
from learn2perturb.experiments.views import View, build_views, write_views
from tests.experiments.hand_made import evaluation, results, study

CURVE = {"kind": "curve", "series": ["defense"], "x": "eps"}
CELLS = {"clean": {}, "pgd": {"attack": "pgd20", "eps": ["4/255", "8/255"]}}
HOSTILE = r"=1+1 | <img src=x> \input{x} $_a & 50 % \x1b[31m `x` [a](b) *b*"


def found(**changed):
    of = study(
        views={"table": {"rows": ["defense"], "columns": ["cell", "eps"]}, "curve": CURVE}, cells=CELLS, **changed
    )
    return results(of, lambda pair: evaluation(50))


def test_every_format_is_written_and_what_is_written_twice_is_the_same(tmp_path):
    first = {path.name: path.read_bytes() for path in write_views(found(), tmp_path / "a")}
    again = {path.name: path.read_bytes() for path in write_views(found(), tmp_path / "b")}
    kinds = {"json", "md", "csv", "tex"}
    curve = {f"curve.{kind}" for kind in kinds | {"png", "svg"}}
    assert set(first) == {"README.md", "study.json", *(f"table.{kind}" for kind in kinds), *curve}
    assert first == again
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(first)
    assert first["curve.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["curve.svg"]
    page = first["README.md"].decode()
    assert "![curve](curve.png)" in page
    assert page.startswith("# By hand\n")


def test_a_view_is_loaded_as_it_was_saved(tmp_path):
    write_views(found(), tmp_path)
    for view in build_views(found()):
        assert View.load(tmp_path / f"{view.name}.json") == view


def test_a_figure_of_nothing_is_not_drawn(tmp_path):
    of = study(views={"curve": CURVE}, cells=CELLS)
    names = {path.name for path in write_views(results(of, lambda pair: None), tmp_path)}
    assert names == {"README.md", "study.json", "curve.json", "curve.md", "curve.csv", "curve.tex"}


def test_names_from_files_start_no_markup_and_no_formula(tmp_path):
    of = study(
        {"rows": ["run"], "title": HOSTILE, "notes": [HOSTILE]}, title=HOSTILE, runs={HOSTILE: {"defense": "pni"}},
        cells={HOSTILE: {"attack": "pgd20"}},
    )  # fmt: skip
    (view,) = build_views(results(of, lambda pair: evaluation(50)))
    tables = [line for line in str(view).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) == 1  # no cell more than the head has
    assert "<img" not in str(view).replace(r"\<img", "")
    assert "\n=1" not in to_csv(view)
    head, line = csv.reader(io.StringIO(to_csv(view)))
    assert len(head) == len(line)
    assert line[0].startswith("'=1+1")
    text = to_latex(view)
    assert r"\input" not in text
    assert re.search(r"(?<!\\)[$&%]", text.split(r"\footnotesize")[1].replace("% ", "%")) is None
    write_views(results(of, lambda pair: evaluation(50)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["../up", "/root", "a/b", ".hidden", "", "con:x"])
def test_a_views_name_stays_in_its_folder(name, tmp_path):
    of = study(views={name: {}})
    paths = write_views(results(of, lambda pair: evaluation(50)), tmp_path / "out")
    assert {path.parent.name for path in paths} == {"out"}
    assert not any(path.name.startswith(".") for path in paths)


def test_two_views_of_one_file_name_are_refused(tmp_path):
    of = study(views={"a/b": {}, "a b": {}})
    with pytest.raises(ConfigError, match="give it another name"):
        write_views(results(of, lambda pair: evaluation(50)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_latex_escapes_all_that_it_takes_for_a_command():
    assert latex("a_b & 5% {x} ~^ #1 \\y $z") == (
        r"a\_b \& 5\% \{x\} \textasciitilde{}\textasciicircum{} \#1 \textbackslash{}y \$z"
    )
    assert latex("50.0 +- 0.1") == r"50.0 $\pm$ 0.1"


def test_a_title_in_a_figure_is_no_formula():
    of = study(views={"curve": {**CURVE, "title": "$\\frac{ 一"}}, cells=CELLS)
    (view,) = build_views(results(of, lambda pair: evaluation(50)))
    assert set(figures(view)) == {"png", "svg"}


def test_lines_are_told_apart_without_colour():
    assert len(set(COLOURS)) == len(COLOURS)
    assert len(set(MARKERS)) >= len(COLOURS)
