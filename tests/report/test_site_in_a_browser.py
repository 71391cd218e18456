"""The site in a real browser, from a server and from disk: its search finds what is there, and nothing is fetched."""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.report.test_in_a_browser import browser, pytestmark  # noqa: F401 - a fixture, and what marks the tests

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Build the site; give its address on a server of this machine, and on disk."""
    pytest.importorskip("mkdocs", reason="needs the extra docs: make setup")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {"server": f"http://127.0.0.1:{server.server_port}", "disk": folder.as_uri()}
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["server", "disk"])
@pytest.mark.parametrize("start", ["index.html", "code/examples/own_attack.py.html"])
def test_a_word_that_is_typed_is_found(places, kind, start, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{places[kind]}/{start}")
    for word, wanted in (
        ("perturb", "reference.html"),
        ("label_smoothing", "training.html"),
        ("TRADES", "defenses.html"),
    ):
        page.click(".md-search__input")
        page.fill(".md-search__input", "")
        page.type(".md-search__input", word, delay=20)
        links = page.locator(".md-search-result__link")
        page.wait_for_function("document.querySelector('.md-search-result__meta').innerText.includes('matching')")
        links.first.wait_for()
        found = [link.get_attribute("href") or "" for link in links.all()]
        assert any(wanted in link for link in found), (word, found)
    links.first.click()
    page.wait_for_url("**/*.html?h=*")
    assert "trades" in page.inner_text("article").lower()
    assert [url for url in asked if not url.startswith((places[kind], "data:", "blob:", "about:"))] == []
    page.close()
