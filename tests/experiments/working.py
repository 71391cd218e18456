"""A study at work in other processes, which a test can kill; and what it has found."""

from __future__ import annotations

import collections
import subprocess
import sys
import time

import yaml

from learn2perturb.evaluation import Evaluation
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import build_study
from learn2perturb.experiments.studying import study

SCRIPT = """
import json, sys, yaml
from learn2perturb.experiments.studying import Placing, study
from learn2perturb.experiments.study_file import build_study
source, store, placing = sys.argv[1:]
if __name__ == "__main__":
    tiny = build_study("tiny", yaml.safe_load(open(source)))
    sys.exit(not study(tiny, store=store, placing=Placing(**json.loads(placing)), progress=False).complete)
"""


def run(source, store, **settings):
    """Run a study here."""
    return study(build_study("tiny", source), store=store, progress=False, **settings)


def start(source, store, placing="{}"):
    """Begin a study in a process group of its own."""
    store.parent.mkdir(parents=True, exist_ok=True)
    (store.parent / "tiny.yaml").write_text(yaml.safe_dump(source))
    (store.parent / "work.py").write_text(SCRIPT)
    words = [sys.executable, str(store.parent / "work.py"), str(store.parent / "tiny.yaml"), str(store), placing]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def table(results):
    """Return what a view is made of: per pair which images were right in which draw."""
    return {
        answer.pair.title: [row.correct.data for row in answer.record.rows]
        for answer in results.answers
        if isinstance(answer.record, Evaluation)
    }


def ended(store):
    """Return how often each address was computed to its end."""
    return collections.Counter(event["address"] for event in Store(store).events() if event["what"] == "ended")


def training_worker(store, process, seconds=150):
    """Return the process that trains, once its training has a checkpoint."""
    for _ in range(20 * seconds):
        begun = [event["process"] for event in Store(store).events() if event["what"] == "begun"]
        if begun and list(store.glob("runs/*/checkpoints/*")):
            return begun[0]
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    raise AssertionError("nothing has begun")
