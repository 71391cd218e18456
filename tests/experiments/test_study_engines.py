"""Studies elsewhere and under fire: Ray, submitit on this machine, twenty kills. Minutes: ``make test-slow``."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from learn2perturb.experiments.store import Store
from learn2perturb.experiments.studying import Placing
from learn2perturb.records import is_alive
from tests.experiments.working import ended, run, start, table, training_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The study over three seeds, unhindered in one process: what every other way must give."""
    from tests.experiments.conftest import TINY

    source = {**TINY, "train": {**TINY["train"], "epochs": 12}, "seeds": [1, 2, 3]}
    return source, table(run(source, tmp_path_factory.mktemp("whole")).results)


def test_twenty_kills_at_random_give_the_same_table_and_nothing_twice(whole, tmp_path):
    source, expected = whole
    store, moments = tmp_path / "store", random.Random(0)
    kills = 0
    while kills < 20:
        with start(source, store, '{"jobs": 2}') as process:
            before = len(Store(store).events())
            # Not while Python starts: a kill counts when something was at work.
            while len(Store(store).events()) == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 1.5))
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
    found = run(source, store)
    print(f"{kills} kills, {found.computed} tasks were left, {sum(ended(store).values())} were computed")
    assert kills >= 15, "the study was done before it could be killed often enough"
    assert found.complete and table(found.results) == expected
    assert set(ended(store).values()) == {1}


def test_workers_end_with_their_parent(whole, tmp_path):
    """Killed alone, it leaves workers behind, which save what they are at and end, idle ones too."""
    source, expected = whole
    store = tmp_path / "store"
    with start(source, store, '{"jobs": 2}') as process:
        training_worker(store, process)
        while len({event["process"] for event in Store(store).events()}) < 2:
            time.sleep(0.05)
        workers = {event["process"] for event in Store(store).events()}
        process.kill()
    for _ in range(600):
        left = {worker for worker in workers if is_alive(worker)}
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert table(run(source, store).results) == expected and set(ended(store).values()) == {1}


def test_ray_gives_the_same_table_though_a_worker_is_killed(whole, tmp_path):
    pytest.importorskip("ray")
    source, expected = whole
    store = tmp_path / "store"
    with start(source, store, json.dumps({"engine": "ray", "jobs": 2})) as process:
        os.kill(training_worker(store, process, seconds=300), signal.SIGKILL)
        assert process.wait() == 0
    found = run(source, store)
    assert found.computed == 0 and table(found.results) == expected
    assert set(ended(store).values()) == {1}


def test_ray_ends_on_time_at_a_checkpoint(whole, tmp_path):
    pytest.importorskip("ray")
    source, _ = whole
    source = {**source, "train": {**source["train"], "epochs": 4000}, "seeds": [1]}
    found = run(source, tmp_path, placing=Placing("ray", jobs=2), minutes=1.0)
    assert not found.complete and not found.failures
    assert list(tmp_path.glob("runs/*/checkpoints/*"))


def test_submitit_gives_the_same_table(whole, tmp_path):
    pytest.importorskip("submitit")
    source, expected = whole
    placing = Placing("slurm", jobs=2, slurm={"cluster": "local", "timeout_min": 20})
    found = run(source, tmp_path / "store", placing=placing)
    assert found.complete and table(found.results) == expected
    assert set(ended(tmp_path / "store").values()) == {1}
