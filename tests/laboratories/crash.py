"""Die at operation k, by a kill or a power cut; type the same command again; end as if nothing had happened."""

from __future__ import annotations

import pathlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.laboratories import runs
from tests.laboratories.cases import Case, Outcome
from tests.laboratories.disk import CUTS, Disk, Operation, after
from tests.laboratories.recorder import Recorder


@dataclass(frozen=True)
class Scenario:
    """A command that writes: ``again`` gets a folder, whole or wrecked, and returns exit code and text.

    ``state`` returns what must be equal in the end; ``kept`` tells what of the disk, which ``journal`` up to a point
    has made, the crash may not have taken: it returns the sentence of what is lost, or nothing.
    """

    name: str
    again: Callable[[pathlib.Path], tuple[int, str]]
    state: Callable[[pathlib.Path], Any]
    kept: Callable[[list[Operation], Disk, str], str]


# --- training


def _step(name: str) -> int | None:
    found = re.fullmatch(r"run/checkpoints/(\d{10})/.*", name)
    return int(found[1]) if found else None


def promised_step(made: list[Operation], cut: str) -> int:
    """Return the newest checkpoint that was renamed into place and, for a power cut, synced with its folder."""
    newest = waiting = -1
    folder = None
    for done in made:
        if done.kind == "enter" and re.fullmatch(r"\d{10}", done.name):
            waiting, folder = int(done.name), done.folder
        if cut == "kill" or (done.kind == "sync" and done.node == folder):
            newest = waiting
    return newest


def checkpoint_kept(made: list[Operation], disk: Disk, cut: str) -> str:
    """Tell whether a checkpoint that was safe has gone."""
    steps = [step for name, content in disk.contents.items() if content and (step := _step(name)) is not None]
    promised = promised_step(made, cut)
    return "" if max(steps, default=-1) >= promised else f"checkpoint {promised} was synced and is not there: {steps}"


TRAINING = Scenario(
    "training", lambda folder: runs.train(folder / "run"), lambda folder: runs.trained_state(folder / "run"),
    checkpoint_kept,
)  # fmt: skip


# --- evaluation


def records_of(folder: pathlib.Path) -> Any:
    """Return the records of the run, which must all be the same one."""
    states = [runs.record_state(path) for path in sorted((folder / "run" / "evaluation").glob("*.json"))]
    assert all(state == states[0] for state in states), "two records of one evaluation differ"
    return states[0]


def nothing_promised(made: list[Operation], disk: Disk, cut: str) -> str:
    """Ask for nothing: only the end counts."""
    return ""


EVALUATION = Scenario(
    "evaluation", lambda folder: runs.command("evaluate", folder / "run", *runs.EVALUATE), records_of, nothing_promised
)


def old_record_kept(made: list[Operation], disk: Disk, cut: str) -> str:
    """Tell whether the record that was there before, or the new one, is there whole."""
    content = disk.contents.get("run/record.json") or b""
    return "" if content.rstrip().endswith(b"}") else "the record that was there before is gone"


REPLACEMENT = Scenario(
    "evaluation over an older record",
    lambda folder: runs.command("evaluate", folder / "run", *runs.EVALUATE, "--out", folder / "run" / "record.json"),
    lambda folder: runs.record_state(folder / "run" / "record.json"),
    old_record_kept,
)


# --- the points of a recording


@dataclass(frozen=True)
class Recording:
    """What a scenario did to the disk, from ``start`` on, and what it left."""

    scenario: Scenario
    name: str
    journal: list[Operation]
    start: int
    end: Any

    def cases(self) -> list[Case]:
        """Return a case for every place to die at, and every way of dying there."""
        found = []
        for count in range(self.start, len(self.journal) + 1):
            writes = count < len(self.journal) and self.journal[count].kind == "write"
            found += [self._case(count, half, cut) for half in ((False, True) if writes else (False,)) for cut in CUTS]
        return found

    def _case(self, count: int, half: bool, cut: str) -> Case:
        return Case(
            f"{self.name}, {cut} after {count - self.start}{' and a half' if half else ''}",
            f"crash: {self.name}, {'killed' if cut == 'kill' else 'power cut'}",
            lambda folder: self.judge(folder, count, half, cut),
        )

    def judge(self, folder: pathlib.Path, count: int, half: bool, cut: str) -> Outcome:
        """Rebuild the disk in ``folder``, run the command again, compare."""
        disk = after(self.journal, count, half=half, cut=cut)
        if missing := self.scenario.kept(self.journal[:count], disk, cut):
            return Outcome("lost", missing)
        disk.write(folder)
        code, text = self.scenario.again(folder)
        if "error: unexpected" in text:
            return Outcome("traceback", text[-300:])
        if code != 0:
            return Outcome("refused for good", text[-300:])
        if self.scenario.state(folder) != self.end:
            return Outcome("silent other result", text[-300:])
        return Outcome("same result")


def record(scenario: Scenario, folder: pathlib.Path, name: str | None = None) -> Recording:
    """Run a scenario in ``folder``, which may hold something already, and record it."""
    recorder = Recorder(folder)
    with recorder.recording():
        code, text = scenario.again(folder)
    assert code == 0, text
    return Recording(scenario, name or scenario.name, recorder.journal, recorder.start, scenario.state(folder))


def recordings(folder: pathlib.Path) -> list[Recording]:
    """Record every scenario: a training, its resumption from the middle, an evaluation of what it left."""
    for name in ("training", "resumed", "evaluated", "replaced"):
        (folder / name).mkdir(parents=True)
    training = record(TRAINING, folder / "training")
    middle = (training.start + len(training.journal)) // 2
    after(training.journal, middle, cut="torn").write(folder / "resumed")
    found = [training, record(TRAINING, folder / "resumed", "resumed training")]
    Disk.read(folder / "training").write(folder / "evaluated")
    found.append(record(EVALUATION, folder / "evaluated"))
    Disk.read(folder / "evaluated").write(folder / "replaced")
    older = next((folder / "replaced" / "run" / "evaluation").glob("*.json"))
    older.rename(folder / "replaced" / "run" / "record.json")
    found.append(record(REPLACEMENT, folder / "replaced"))
    return found


def cases(folder: pathlib.Path, *, most: int, seed: int) -> list[Case]:
    """Return a seeded choice of ``most`` places to die at."""
    every = [case for recording in recordings(folder) for case in recording.cases()]
    return every if len(every) <= most else random.Random(seed).sample(every, most)
