"""The site: every page has its place, every public name its entry and an example, tables are readable."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest
import yaml

import learn2perturb as l2p
from learn2perturb import attacks
from tests.test_docs import PAGES, ROOT, blocks

DOCS = ROOT / "docs"
MOST_IN_A_CELL, MOST_IN_THE_README = 120, 150
REFERENCE = {"reference.md": (l2p, "l2p"), "reference-attacks.md": (attacks, "attacks")}
NAMES = [(page, name) for page, (module, _) in REFERENCE.items() for name in module.__all__]


def in_navigation(entry: object) -> list[str]:
    """Return the pages of a navigation."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in in_navigation(value)]


@pytest.fixture(scope="module")
def site() -> dict[str, object]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_has_its_place_in_the_navigation(site):
    pages = in_navigation(site["nav"])
    assert len(pages) == len(set(pages)) >= 30
    assert {path.name for path in DOCS.glob("*.md")} <= set(pages)
    made = {"contributing.md", "changelog.md", "examples.md", "first-steps.md"}  # by docs/theme/hooks.py
    assert set(pages) - {path.name for path in DOCS.glob("*.md")} == made


def test_the_site_is_strict_and_fetches_nothing(site):
    assert site["strict"] is True
    assert site["theme"]["font"] is False
    assert set(site["validation"].values()) <= {"warn", "info"}
    assert site["validation"]["anchors"] == "warn"


@pytest.mark.parametrize(("page", "name"), NAMES, ids=[f"{page}-{name}" for page, name in NAMES])
def test_every_public_name_has_an_entry_and_an_example(page, name):
    module, short = REFERENCE[page]
    text = "".join((DOCS / one).read_text(encoding="utf-8") for one in REFERENCE)
    code = "\n".join(block for one in REFERENCE for block in blocks(DOCS / one, "python"))  # tests/test_docs.py runs it
    assert re.search(rf"\b({short}|l2p)\.{name}\b", code), f"no example uses {short}.{name}"
    value = getattr(module, name)
    if name not in ("__version__", "attacks", "errors", "report"):
        assert f"::: {value.__module__}.{name}" in text
    elif name in ("errors", "report"):
        assert re.search(rf"^::: learn2perturb\.{name}", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_cell_of_a_table_is_longer_than_a_glance(page):
    long = [
        (number, cell.strip())
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
        if line.startswith("|")
        for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])
        if len(cell.strip()) > MOST_IN_A_CELL
    ]
    assert long == []


def test_the_readme_is_short_and_names_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < MOST_IN_THE_README
    assert re.search(r"^make demo\nmake test$", text, re.MULTILINE)
    assert "pip install learn2perturb" in text
    assert "![" in text


def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "theme" / "hooks.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_out_of_the_pages_lead_to_pages_made_of_the_files():
    pytest.importorskip("mkdocs", reason="needs the extra docs: make setup")
    turned = hooks()

    class Page:
        file = type("File", (), {"src_uri": "harden.md"})

    text = (
        "[a](../examples/own_attack.py), [b](../CONTRIBUTING.md#style), [c](defenses.md#pni), [d](https://x.org/a.md)"
    )
    assert turned.on_page_markdown(text, page=Page, config=None, files=None) == (
        "[a](code/examples/own_attack.py.md), [b](contributing.md#style), [c](defenses.md#pni), [d](https://x.org/a.md)"
    )


def test_commands_wrap_and_what_is_read_as_one_stays_on_one_line():
    pytest.importorskip("mkdocs", reason="needs the extra docs: make setup")
    made = hooks()

    class Page:
        file = type("File", (), {"src_uri": "cli.md"})

    about = {"page": Page, "config": None, "files": None}
    text = "```\nmake labs\n```\n\n```\nresult: 5\n```\n"
    assert made.on_page_markdown(text, **about) == "```console\nmake labs\n```\n\n```\nresult: 5\n```\n"
    html = "<p><code>train --device auto a-b</code> -1.0 [2, 3]</p><td>5.0 [4.5, 5.5]</td>"
    assert made.on_page_content(html, **about) == (
        '<p><code>train <span class="one">--device</span> auto a-b</code> -1.0 [2, 3]</p>'
        '<td><span class="one">5.0 [4.5, 5.5]</span></td>'
    )


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "learn2perturb.training.loop.train" in (tmp_path / "reference.html").read_text(encoding="utf-8")
    assert pathlib.Path(tmp_path / "search" / "search_index.json").is_file()
