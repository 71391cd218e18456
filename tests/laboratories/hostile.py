"""Hostile files and arguments at the command line: one clean line or a right answer; nothing runs, nothing hangs."""

from __future__ import annotations

import os
import pathlib
import random
import re
import resource
from collections.abc import Callable

from tests.laboratories import hostile_arguments, hostile_files, runs
from tests.laboratories.cases import Case, Outcome
from tests.laboratories.disk import Disk

CANARY = "canary"
_MEMORY = 6 << 30  # a bomb is to fail here, not to take the machine with it
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")

Build = Callable[[pathlib.Path], list[str]]


def cases(folder: pathlib.Path, *, most: int, seed: int) -> list[Case]:
    """Return all cases, or a seeded choice of ``most``."""
    (folder / "made").mkdir(parents=True)
    code, text = runs.train(folder / "made" / "run", "--epochs=1")
    assert code == 0, text
    code, text = runs.command("evaluate", folder / "made" / "run", *runs.EVALUATE)
    assert code == 0, text
    trained = Disk.read(folder / "made")
    found = [
        Case(f"hostile {name}", "hostile: files", _judge(build, trained)) for name, build in hostile_files.every()
    ] + [
        Case(f"hostile {number} {' '.join(words)!r:.150}", "hostile: arguments", _judge(_spoken(words), trained))
        for number, words in enumerate(hostile_arguments.every(runs.TRAIN, runs.EVALUATE))
    ]
    return found if len(found) <= most else random.Random(seed).sample(found, most)


def _spoken(words: list[str]) -> Build:
    return lambda folder: words


def _judge(build: Build, trained: Disk) -> Callable[[pathlib.Path], Outcome]:
    def judge(folder: pathlib.Path) -> Outcome:
        trained.write(folder)
        os.chdir(folder)
        os.environ["LEARN2PERTURB_DATA_DIR"] = str(folder / "nowhere")  # what is not refused must not train for hours
        _bait(folder)
        words = build(folder)
        mine = {path: path.read_bytes() for path in sorted((folder / "mine").iterdir())}
        resource.setrlimit(resource.RLIMIT_AS, (_used() + _MEMORY,) * 2)
        code, text = runs.command(*words)
        return _seen(folder, code, text, mine)

    return judge


def _seen(folder: pathlib.Path, code: int, text: str, mine: dict[pathlib.Path, bytes]) -> Outcome:
    if (folder / CANARY).exists():
        return Outcome("executed", text[-300:])
    if any(not path.exists() or path.read_bytes() != content for path, content in mine.items()):
        return Outcome("lost", f"a file of the user's was changed: {text[-300:]}")
    if "error: unexpected" in text or "Traceback (most" in text:
        return Outcome("traceback", text[-300:])
    if _UNSEEN.search(text):
        return Outcome("escape sequence", repr(text[-300:]))
    if code == 0:
        return Outcome("same result", text[-100:])
    lines = [line for line in text.splitlines() if "learn2perturb: " in line]
    return Outcome("clean line" if lines else "traceback", text[-300:])


def _bait(folder: pathlib.Path) -> None:
    """Lay out what must not be touched, and programs that must not be started."""
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "mine" / "numbers.json").write_text('{"a": 1}')
    (folder / "bin").mkdir()
    for name in ("gs", "gswin64c", "touch2"):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n: > {folder / CANARY}\n")
        (folder / "bin" / name).chmod(0o755)
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"


def _used() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()
