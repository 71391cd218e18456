"""The store: copied, merged, cleaned, damaged."""

from __future__ import annotations

import json
import shutil

import pytest

from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import AttackedImages, Evaluation
from learn2perturb.evaluation.attacked import beside
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.store import FINISHED, Store
from learn2perturb.experiments.study_file import build_study
from learn2perturb.experiments.studying import study


def run(source, store):
    return study(build_study("tiny", source), store=store, progress=False)


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory):
    """Seed 1 in one store, seed 2 in another, and the study of both."""
    from tests.experiments.conftest import TINY

    source = {**TINY, "runs": {"all": {"defense": "pgd_at"}}}
    folder = tmp_path_factory.mktemp("stores")
    for seed in (1, 2):
        run({**source, "seeds": [seed]}, folder / str(seed))
    return source, folder


@pytest.fixture
def stores(two_stores, tmp_path):
    source, folder = two_stores
    shutil.copytree(folder, tmp_path / "stores")
    return source, tmp_path / "stores"


def test_what_was_done_in_two_places_is_one(stores):
    source, folder = stores
    added, left = Store(folder / "1").merge(Store(folder / "2"))
    assert added and not left
    assert run(source, folder / "1").computed == 0
    again, _ = Store(folder / "1").merge(Store(folder / "2"))
    assert again == 0
    dates = [event["date"] for event in Store(folder / "1").events()]
    assert dates == sorted(dates) and len(dates) == 12


def test_images_lie_beside_the_records_of_attacks_and_go_where_they_go(stores):
    source, folder = stores
    wanted = Ledger(build_study("x", {**source, "seeds": [1]}), Store(folder / "1")).wanted()
    attacked = [path for path in wanted if path.name.startswith("PGD")]
    assert len(attacked) == 1
    record = Evaluation.load(attacked[0])
    assert AttackedImages.load(beside(attacked[0])).misfit(record) is None
    Store(folder / "2").merge(Store(folder / "1"))
    there = folder / "2" / attacked[0].relative_to(folder / "1")
    assert AttackedImages.load(beside(there)).misfit(record) is None
    Store(folder / "1").collect([])
    assert not list((folder / "1" / "cells").rglob("*.*"))


def test_a_copy_is_a_store(stores):
    source, folder = stores
    shutil.copytree(folder / "1", folder / "copy")
    assert run({**source, "seeds": [1]}, folder / "copy").computed == 0


def test_a_network_that_both_trained_to_other_weights_stays(stores):
    source, folder = stores
    mine, theirs = folder / "1", folder / "theirs"
    shutil.copytree(mine, theirs)
    (trained,) = (theirs / "runs").glob("*")
    facts = json.loads((trained / FINISHED).read_text())
    (trained / FINISHED).write_text(json.dumps(facts | {"weights": "0" * 16}))
    _, left = Store(mine).merge(Store(theirs))
    assert len(left) == 1 and "other weights" in left[0]
    assert run({**source, "seeds": [1]}, mine).computed == 0


def test_an_unfinished_training_gives_way_to_a_finished_one(stores):
    source, folder = stores
    (trained,) = (folder / "1" / "runs").glob("*")
    shutil.copytree(folder / "1", folder / "other")
    (trained / FINISHED).unlink()
    Store(folder / "1").merge(Store(folder / "other"))
    assert run({**source, "seeds": [1]}, folder / "1").computed == 0


def test_clean_removes_what_no_study_needs(stores):
    source, folder = stores
    Store(folder / "1").merge(Store(folder / "2"))
    wanted = Ledger(build_study("x", {**source, "seeds": [2]}), Store(folder / "1")).wanted()
    would = Store(folder / "1").collect(wanted, dry=True)
    assert len(would) == 3 and all(path.exists() for path in would)
    assert Store(folder / "1").collect(wanted) == would and not any(path.exists() for path in would)
    assert run({**source, "seeds": [2]}, folder / "1").computed == 0
    assert run({**source, "seeds": [1]}, folder / "1").computed == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weights": 3, "step": 1, "seconds": 0, "where": {}}', "\0\0"])
def test_a_damaged_word_of_a_training_is_one_line(stores, text):
    source, folder = stores
    (trained,) = (folder / "1" / "runs").glob("*")
    (trained / FINISHED).write_text(text)
    with pytest.raises(CheckpointError, match="remove .*, and it is trained again"):
        run({**source, "seeds": [1]}, folder / "1")


def test_a_torn_line_of_events_is_left_out(tmp_path):
    store = Store(tmp_path)
    store.note("begun", "a", "one")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"date": "2026')
    assert [event["title"] for event in store.events()] == ["one"]


def test_an_address_is_held_by_one(tmp_path):
    store = Store(tmp_path)
    with store.held("a") as first, store.held("a") as second, store.held("b") as third:
        assert (first, second, third) == (True, False, True)
    with store.held("a") as again:
        assert again


def test_merge_at_the_command_line(stores, capsys):
    _, folder = stores
    assert main(["study", "merge", str(folder / "1"), str(folder / "2")]) == 0
    assert "files of" in capsys.readouterr().out
    assert main(["study", "merge", str(folder / "1"), str(folder / "nowhere")]) == 2
    assert main(["study", "merge", str(folder / "1")]) == 2


def test_a_name_that_is_no_file_name_is_made_one(tmp_path):
    path = Store(tmp_path).cell("a/../b", "pgd: eps 8/255\n", "0123")
    assert path.parent.parent == tmp_path / "cells" and path.name == "pgd-eps-8-255-0123.json"
