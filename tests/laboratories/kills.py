"""SIGKILL at random moments, in processes of their own, until the command gets through; the end must be the same."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.laboratories import crash, runs
from tests.laboratories.cases import Case, Outcome
from tests.laboratories.disk import Disk

MOST_KILLS = 4  # of one training: the fifth try is left alone


def cases(folder: pathlib.Path, *, most: int, seed: int) -> list[Case]:
    """Return ``most`` cases: three trainings to one evaluation, each killed up to ``MOST_KILLS`` times."""
    (folder / "whole").mkdir(parents=True)
    start = time.monotonic()
    assert runs.train(folder / "whole" / "run")[0] == 0
    seconds = {"training": time.monotonic() - start}
    trained = Disk.read(folder / "whole")
    start = time.monotonic()
    assert crash.EVALUATION.again(folder / "whole")[0] == 0
    seconds["evaluation"] = time.monotonic() - start
    ends = {"training": crash.TRAINING.state(folder / "whole"), "evaluation": crash.EVALUATION.state(folder / "whole")}
    return [
        _case(number, seed, "evaluation" if number % 4 == 3 else "training", seconds, ends, trained)
        for number in range(most)
    ]


def _case(number: int, seed: int, kind: str, seconds: dict[str, float], ends: dict[str, Any], trained: Disk) -> Case:
    scenario = crash.TRAINING if kind == "training" else crash.EVALUATION

    def judge(folder: pathlib.Path) -> Outcome:
        if kind == "evaluation":
            trained.write(folder)
        draw, text = random.Random(f"{seed} {number}"), ""
        for attempt in range(MOST_KILLS + 1):
            # Twice the time: two processes share a core, and the last moments are to be met as well.
            patience = None if attempt == MOST_KILLS else draw.uniform(0, 2 * seconds[kind])
            code, text = _attempt(lambda: scenario.again(folder), folder / "said.txt", patience)
            if code is not None:
                break
        if "error: unexpected" in text:
            return Outcome("traceback", text[-300:])
        if code != 0:
            return Outcome("refused for good", text[-300:])
        return Outcome("same result" if scenario.state(folder) == ends[kind] else "silent other result")

    return Case(f"kill {kind} {number} of seed {seed}", f"kills: {kind}", judge)


def _attempt(call: Callable[[], tuple[int, str]], said: pathlib.Path, patience: float | None) -> tuple[int | None, str]:
    """Call in a forked process, killed after ``patience`` seconds; return its code, None if killed, and its text."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            code, text = call()
            said.write_text(text, encoding="utf-8")
            os._exit(code)
        os._exit(99)
    until = None if patience is None else time.monotonic() + patience
    while until is None or time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8") if said.exists() else ""
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""
