"""The page of a study while it runs: what is served, to whom, how far each run is, what is said where reading fails."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import pytest

from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import build_study
from learn2perturb.experiments.views import write_views
from learn2perturb.report import watching
from learn2perturb.report.page import page
from learn2perturb.report.watching import Watch, address, progress, server
from tests.experiments.conftest import TINY
from tests.experiments.working import run
from tests.report.test_report import data_of

SMALL = {**TINY, "seeds": [1], "runs": {"all": {"defense": "learn2perturb"}}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A store in which a tiny study is finished."""
    store = tmp_path_factory.mktemp("watched")
    run(SMALL, store)
    return store


def ledger(store):
    return Ledger(build_study("tiny", SMALL), Store(store))


@pytest.fixture
def served(done):
    """The address of a server that watches the finished study."""
    with server(ledger(done), 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield address(found)
        found.shutdown()
        thread.join()


def asked(place, host=None):
    request = urllib.request.Request(place, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_the_page_and_its_state_are_served_on_this_machine_alone(served):
    assert served.startswith("http://127.0.0.1:")
    text, state = asked(served), json.loads(asked(f"{served}state"))
    assert "connect-src data: 'self'" in text and data_of(text)["version"] == state["version"]
    assert all(one["records"] == one["records_in_all"] and one["left"] == "done" for one in state["runs"])
    assert state["trouble"] == "" and len(data_of(text)["rows"]) > 0


def test_the_page_of_a_study_has_images(done, tmp_path):
    results = ledger(done).results()
    write_views(results, tmp_path / "out")
    (gallery,) = data_of(page(tmp_path / "out"))["galleries"]
    assert gallery["row"] == "PGD-2 0.15" and gallery["shots"]


@pytest.mark.parametrize(
    ("path", "host", "code"), [("", "evil.example:80", 403), ("state", "evil.example", 403), ("etc/passwd", None, 404)]
)
def test_nothing_else_is_answered(path, host, code, served):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        asked(served + path, host)
    with refusal.value:
        assert refusal.value.code == code


def test_a_new_record_is_a_new_version_and_what_is_left_is_told(done, tmp_path):
    import shutil

    shutil.copytree(done, tmp_path / "store")
    record = next((tmp_path / "store" / "cells").rglob("*.json"))
    content = record.read_bytes()
    record.unlink()
    watch = Watch(ledger(tmp_path / "store"))
    before = watch.look()
    (unfinished,) = (one for one in before.runs if one.records < one.records_in_all)
    assert unfinished.left.startswith("about "), "by the seconds that other records took"
    assert watch.look().page is before.page, "nothing is new"
    record.write_bytes(content)
    after = watch.look()
    assert after.version != before.version
    assert all(one.left == "done" for one in after.runs)
    assert len(data_of(after.page)["rows"]) > len(data_of(before.page)["rows"])


def test_before_anything_is_there_the_plan_is_told(tmp_path):
    look = Watch(ledger(tmp_path / "none")).look()
    assert {one.left for one in look.runs} == {"not known yet"}
    assert all((one.epochs, one.records) == (0, 0) and one.epochs_in_all > 0 for one in look.runs)
    assert data_of(look.page)["rows"] == []
    assert [one.run for one in progress(ledger(tmp_path / "none"))] == [one.run for one in look.runs]


def test_what_cannot_be_read_is_said_beside_what_was_last_known(done, monkeypatch):
    watch = Watch(ledger(done))
    first = watch.look()

    def broken(ledger):
        raise CheckpointError("a line\nand another")
        yield

    monkeypatch.setattr(watching, "progress", broken)
    second = watch.look()
    assert (second.page, second.runs) == (first.page, first.runs)
    assert second.trouble and "\n" not in second.trouble
    with pytest.raises(CheckpointError):
        Watch(ledger(done)).look()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table1", "table2", "--watch"], "one study"),
        (["table1", "--watch", "--claim", "5 %"], "one study"),
        (["table1", "--watch", "--port", "99999"], "no port"),
        (["no-such-study", "--watch"], "no-such-study"),
    ],
)
def test_what_cannot_be_watched_is_refused_in_a_line(words, said, capsys):
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(done, served):
    with pytest.raises(ConfigError, match="another --port"):
        server(ledger(done), int(served.rpartition(":")[2].strip("/")))
