"""``report --watch`` in a real browser: the page changes while a study runs, and says so when the server ends."""

from __future__ import annotations

import shutil
import threading

import pytest

from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import build_study
from learn2perturb.report.watching import address, server
from tests.report.test_in_a_browser import CHROMIUM, REQUIRED, allowed, browser  # noqa: F401  the fixture
from tests.report.test_watching import SMALL, done  # noqa: F401  the fixture

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="needs Chromium: apt-get install chromium"),
]
SOON = 30_000  # milliseconds: the page asks every three seconds


def test_a_cell_that_comes_in_is_shown_where_one_was_reading(done, browser, tmp_path):  # noqa: F811
    """Progress, the estimate, the table and the charts follow the store; no word is said in the console."""
    store = tmp_path / "store"
    shutil.copytree(done, store)
    record = next((store / "cells").rglob("*.json"))
    content = record.read_bytes()
    record.unlink()
    said: list[str] = []
    with server(Ledger(build_study("tiny", SMALL), Store(store)), 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page, own = context.new_page(), {address(found), f"{address(found)}state"}
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if allowed(request.url, own) else said.append(request.url[:60]))
        try:
            page.goto(address(found))
            page.wait_for_selector("body[data-drawn=true]", timeout=SOON)
            cells = page.locator("#runs tr td").all_inner_texts()
            assert (cells[0], cells[1]) == ("2 of 2", "1 of 2") and cells[2].startswith("about ")
            before = page.locator("#accuracies tbody tr").count()
            record.write_bytes(content)
            page.wait_for_selector("#runs td:last-child:text-is('done')", timeout=SOON)
            page.wait_for_selector("body[data-drawn=true]", timeout=SOON)
            assert page.locator("#runs tr td").all_inner_texts() == ["2 of 2", "2 of 2", "done"]
            assert page.locator("#accuracies tbody tr").count() > before
            assert page.locator("[data-chart] svg").count() == page.locator("[data-chart]").count() > 0
            assert page.inner_text("#trouble") == "" and said == []
        finally:
            found.shutdown()
            thread.join()
            found.server_close()
        page.wait_for_selector("#trouble:has-text('has ended')", timeout=SOON)
        assert page.locator("#accuracies tbody tr").count() > before, "what was last known stays"
        context.close()
