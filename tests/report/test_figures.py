"""The charts of a page as files for papers: the same numbers, as wide as a column, in every format."""

from __future__ import annotations

import io

import pytest

from learn2perturb.cli.main import main
from learn2perturb.report.figures import INCH, PPI, WIDTHS
from learn2perturb.report.page import page
from learn2perturb.report.sources import gather
from tests.report.test_report import data_of, record  # noqa: F401  the fixture


def test_every_chart_is_written_in_every_format_and_width(record, tmp_path, capsys):  # noqa: F811
    from PIL import Image

    out = str(tmp_path / "page.html")
    assert main(["report", record[1], "--out", out, "--figures", str(tmp_path / "figures")]) == 0
    assert f"figures: {tmp_path / 'figures'}" in capsys.readouterr().out
    charts = data_of(page(record[1]))["charts"]
    names = {f"{chart}-{width}.{kind}" for chart in charts for width in WIDTHS for kind in ("svg", "pdf", "png")}
    assert names and {path.name for path in (tmp_path / "figures").iterdir()} == names | {"figures.md"}
    for chart in charts:
        for width, inches in WIDTHS.items():
            start = tmp_path / "figures" / f"{chart}-{width}"
            shown = Image.open(io.BytesIO(start.with_suffix(".png").read_bytes()))
            assert shown.width == pytest.approx(inches * PPI, abs=8)
            assert shown.info["dpi"] == pytest.approx((PPI, PPI), abs=1)
            assert start.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
            svg = start.with_suffix(".svg").read_text(encoding="utf-8")
            assert float(svg.split('width="')[1].split('"')[0]) == pytest.approx(INCH * inches, abs=2)


def test_a_file_in_the_place_of_the_folder_is_refused_before_work(record, tmp_path, capsys):  # noqa: F811
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "page.html"
    assert main(["report", record[1], "--out", str(out), "--figures", str(tmp_path / "taken")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert not out.exists() and gather([record[1]])
