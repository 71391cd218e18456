"""Cases in processes of their own: what each comes to, counted; what was done already is not done again."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import pathlib
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from learn2perturb.errors import Learn2PerturbError

# What may come out of a case, and what may not.
GOOD = ("clean line", "same result", "correct fallback", "said aloud", "seen in the record")
BAD = ("silent other result", "lost", "traceback", "hang", "executed", "escape sequence", "refused for good")


@dataclass(frozen=True)
class Outcome:
    """One of ``GOOD`` or ``BAD``, and what was seen."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """Something to be tried: ``judge`` runs in a process of its own, with an empty folder."""

    name: str
    group: str
    judge: Callable[[pathlib.Path], Outcome] = field(repr=False)


def refused(call: Callable[[], object]) -> Outcome | None:
    """Call; return what the error makes of it, None where there is none."""
    try:
        call()
    except Learn2PerturbError as error:
        return Outcome("clean line", str(error)[:300])
    except BaseException as error:
        return of_error(error)
    return None


def of_error(error: BaseException) -> Outcome:
    """Return the outcome of an error that none of our checks foresaw: its type, text and last place."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{pathlib.Path(where.filename).name}:{where.lineno}"
    return Outcome("traceback", f"{type(error).__name__}: {str(error)[:160]} at {place}")


def run(cases: Iterable[Case], *, jobs: int = 2, limit: float = 60.0) -> Iterator[tuple[Case, Outcome]]:
    """Judge every case in a forked process, ``jobs`` at a time; one that takes over ``limit`` seconds hangs."""
    waiting, running = iter(cases), {}
    while True:
        while len(running) < jobs and (case := next(waiting, None)) is not None:
            running.update([_start(case)])
        if not running:
            return
        ready, _, _ = select.select(list(running), [], [], 0.2)
        for pipe in [*ready, *(pipe for pipe in running if time.monotonic() - running[pipe][2] > limit)]:
            if pipe in running:
                child, case, _ = running.pop(pipe)
                yield case, _finish(pipe, child, hung=pipe not in ready)


def _start(case: Case) -> tuple[int, tuple[int, Case, float]]:
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return reading, (child, case, time.monotonic())
    os.close(reading)
    with contextlib.suppress(BaseException):
        os.setsid()
        faulthandler.disable()
        _be_quiet()
        with tempfile.TemporaryDirectory(prefix="laboratory-", ignore_cleanup_errors=True) as folder:
            try:
                outcome = case.judge(pathlib.Path(folder))
            except BaseException as error:
                outcome = of_error(error)
        os.write(writing, json.dumps([outcome.kind, outcome.detail[:400]]).encode())
    os._exit(0)


def _be_quiet() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


def _finish(pipe: int, child: int, *, hung: bool) -> Outcome:
    if hung:
        os.killpg(child, signal.SIGKILL)
    text = b"" if hung else os.read(pipe, 65536)
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if text:
        return Outcome(*json.loads(text))
    return Outcome("hang") if hung else Outcome("traceback", f"the process died: {os.waitstatus_to_exitcode(status)}")


def source_mark() -> str:
    """Return a hash of the package and of the laboratories: what was found with other code is tried again."""
    import learn2perturb

    digest = hashlib.sha256()
    for folder in (pathlib.Path(learn2perturb.__file__).parent, pathlib.Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Ledger:
    """Outcomes by case, in a file of lines: a run that was stopped goes on where it was."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self.path, self.mark = path, source_mark()
        self.found: dict[str, tuple[str, Outcome]] = {}
        if path is not None and path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    line = json.loads(text)
                    if line["mark"] == self.mark:
                        self.found[line["name"]] = line["group"], Outcome(line["kind"], line["detail"])

    def work(self, title: str, cases: list[Case], *, jobs: int = 2, limit: float = 60.0) -> None:
        """Judge the cases that are not known yet; say how far it is, and when it will be done."""
        todo = [case for case in cases if case.name not in self.found]
        started = spoken = time.monotonic()
        bad = 0
        for done, (case, outcome) in enumerate(run(todo, jobs=jobs, limit=limit), start=1):
            self.found[case.name] = case.group, outcome
            bad += outcome.kind in BAD
            self._keep(case, outcome)
            now = time.monotonic()
            if now - spoken > 15 or done == len(todo):
                spoken, left = now, (now - started) / done * (len(todo) - done)
                print(f"{title}: {done}/{len(todo)}, {bad} bad, about {left / 60:.1f} minutes left", flush=True)

    def _keep(self, case: Case, outcome: Outcome) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = {"mark": self.mark, "name": case.name, "group": case.group, **vars(outcome)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def bad(self) -> dict[str, Outcome]:
        """Return what must not have come out."""
        return {name: outcome for name, (_, outcome) in self.found.items() if outcome.kind in BAD}

    def table(self) -> str:
        """Return the counts by group, as Markdown."""
        counts = Counter((group, outcome.kind) for group, outcome in self.found.values())
        kinds = [kind for kind in GOOD + BAD if any(found == kind for _, found in counts)]
        lines = ["| | n | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
        for group in sorted({group for group, _ in counts}):
            numbers = [counts[group, kind] for kind in kinds]
            lines.append(f"| {group} | {sum(numbers)} | " + " | ".join(map(str, numbers)) + " |")
        return "\n".join(lines)
