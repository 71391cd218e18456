"""Where everything lies: a folder that a slice begins with, adds to, and leaves behind whole, whenever it is cut.

``runs/NAME`` is the run folder of the training; ``runs/NAME/model.safetensors`` is there once it is finished, and its
checkpoints are gone then. ``cells/NAME/CELL.json`` are evaluations. ``slices.jsonl`` has a line for each slice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper_scale.rounding import rounded_model
from learn2perturb.evaluation import Evaluation
from learn2perturb.records import atomic_write
from learn2perturb.runs.checkpoint import MODEL, checkpoints
from learn2perturb.training import read_metrics

# A network too large to be carried whole beside others is kept at 24 bits from the moment that it is finished, so that
# all of its numbers are of the same weights.
LARGE_MODEL = 16 * 2**20
WEIGHT_BITS = 24


@dataclass(frozen=True)
class State:
    """The folder, and what is in it."""

    folder: Path

    def run(self, name: str) -> Path:
        """Return the run folder."""
        return self.folder / "runs" / name

    def cell(self, run: str, cell: str) -> Path:
        """Return the record of a cell."""
        return self.folder / "cells" / run / f"{cell}.json"

    def log(self, name: str) -> Path:
        """Return where the output of a task goes."""
        return self.folder / "logs" / f"{name}.txt"

    @property
    def floors(self) -> Path:
        """Return the least that a step can take on the machine."""
        return self.folder / "floors.json"

    @property
    def cache(self) -> Path:
        """Return where compiled kernels are kept between slices on one machine."""
        return self.folder / "cache"

    def weights(self, run: str) -> Path | None:
        """Return the weights of a finished run; None if it is not finished, or they were left elsewhere."""
        path = self.run(run) / MODEL
        return path if path.exists() else None

    def is_finished(self, run: str) -> bool:
        """Tell whether the training is done."""
        return (self.run(run) / "finished.json").exists()

    def position(self, run: str) -> int:
        """Return how far a training is: the step of its newest checkpoint, more than any once it is finished."""
        if self.is_finished(run):
            return 10**10
        found = checkpoints(self.run(run))
        return int(found[-1].name) if found else -1

    def epochs(self, run: str) -> int:
        """Return how many epochs have metrics."""
        return len(read_metrics(self.run(run)))

    def evaluation(self, run: str, cell: str) -> Evaluation | None:
        """Return the record of a cell; None where there is none yet."""
        path = self.cell(run, cell)
        return Evaluation.load(path) if path.exists() else None

    def finish(self, run: str) -> None:
        """Keep the last weights of a training that has come to its end, and drop what only resuming needs."""
        folder = self.run(run)
        if self.is_finished(run):  # cut in the middle of the lines below
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return
        newest = checkpoints(folder)[-1]
        content = (newest / MODEL).read_bytes()
        if len(content) > LARGE_MODEL:
            content = rounded_model(newest / MODEL, WEIGHT_BITS)
        atomic_write(folder / MODEL, content)
        facts = {"step": int(newest.name), "sha256": hashlib.sha256(content).hexdigest()}
        atomic_write(folder / "finished.json", json.dumps(facts))
        shutil.rmtree(folder / "checkpoints")

    def note(self, line: dict[str, Any]) -> None:
        """Add a line to ``slices.jsonl``."""
        path = self.folder / "slices.jsonl"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        atomic_write(path, before + json.dumps(line) + "\n")

    def slices(self) -> list[dict[str, Any]]:
        """Return the lines of ``slices.jsonl``."""
        path = self.folder / "slices.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @contextlib.contextmanager
    def held(self, run: str) -> Iterator[bool]:
        """Hold a run for the body; False if another process has it. The lock goes with the process, however it ends."""
        path = self.folder / "locks" / run
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
