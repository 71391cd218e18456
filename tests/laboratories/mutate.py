"""``python -m tests.laboratories.mutate``: change one place of the source; tests that run its line must fail."""

from __future__ import annotations

import argparse
import compileall
import contextlib
import functools
import gc
import hashlib
import importlib
import io
import json
import os
import pathlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np  # noqa: F401 - these are imported once here rather than for every mutant
import pytest
import scipy.stats  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo

from tests.laboratories.cases import Case, Outcome, run
from tests.laboratories.choosing import tests_of
from tests.laboratories.covering import ROOT, SOURCE, WORDS, busy, cover, mark_of_source, places_of
from tests.laboratories.listed_mutants import EQUIVALENT, LISTED, SPEED
from tests.laboratories.mutants import Mutant, mutants

FOLDERS = ("attacks", "evaluation", "diagnosis", "certification", "defenses", "noise")
MOST = 0.05  # of the sample may survive
DIED, SURVIVED, LABORATORY = "clean line", "same result", "refused for good"
HANGS = 60  # seconds of one test, which took ten at most without the change


@dataclass(frozen=True)
class Trial:
    """A mutant, the tests that judge it, and what it is called."""

    name: str
    mutant: Mutant
    tests: tuple[str, ...] = field(repr=False)


def every(folders: Iterable[str] = FOLDERS) -> dict[str, Mutant]:
    """Return the mutants of the folders by a name that stays when other places change, equivalent ones left out."""
    found: dict[str, Mutant] = {}
    for folder in folders:
        for path in sorted((SOURCE / folder).rglob("*.py")):
            met: Counter[tuple[str, str, str]] = Counter()
            for mutant in mutants(SOURCE, path.relative_to(SOURCE).as_posix()):
                key = line_of(mutant), mutant.before, mutant.after
                met[key] += 1
                if (mutant.path, *key) not in EQUIVALENT and not _is_for_speed(mutant):
                    found[" | ".join((mutant.path, *key, str(met[key])))] = mutant
    return found


def sample(n: int, seed: int, folders: Iterable[str] = FOLDERS) -> list[Mutant]:
    """Return ``n`` mutants, each place as likely as any other; a change elsewhere leaves most of a sample as it was."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode()).digest()

    found = every(folders)
    return [found[name] for name in sorted(found, key=place)[:n]]


def _is_for_speed(mutant: Mutant) -> bool:
    return (mutant.path, line_of(mutant).split(" = ")[0]) in SPEED


@functools.cache
def _lines(path: str) -> list[str]:
    return (SOURCE / path).read_text(encoding="utf-8").splitlines()


def line_of(mutant: Mutant) -> str:
    """Return the line of the source that a mutant begins on, without its indent."""
    return _lines(mutant.path)[mutant.line - 1].strip()


class Judge:
    """A plugin of pytest: of what was collected run the tests that are named, in that order, and note what fails.

    With ``limit``, no test is begun after so many seconds of work.
    """

    def __init__(self, names: Iterable[str], limit: float | None = None) -> None:
        self.place = {name: place for place, name in enumerate(names)}
        self.wide = [name for name in self.place if "::" not in name]  # files and folders
        self.limit, self.ends = limit, float("inf")
        self.failed: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # File by file, so that what its tests share is made once.
        first: dict[str, int] = {}
        for item in items:
            file = item.nodeid.split("::")[0]
            first[file] = min(first.get(file, len(self.place)), self._of(item.nodeid))
        items[:] = [item for item in items if self._of(item.nodeid) < len(self.place)]
        items.sort(key=lambda item: (first[item.nodeid.split("::")[0]], self._of(item.nodeid)))
        if self.limit is not None:
            self.ends = busy() + self.limit

    def _of(self, name: str) -> int:
        """Return the place of a test, or of the file or folder that it is in; one after the last if there is none."""
        around = (self.place[one] for one in self.wide if name.startswith((f"{one}::", f"{one}/")))
        return self.place.get(name, min(around, default=len(self.place)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        return True if busy() > self.ends else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def case(trial: Trial, limit: float | None = None) -> Case:
    """Return the case of a mutant: ``DIED`` with the test that failed, ``SURVIVED``, or what is wrong here."""

    def judge(folder: pathlib.Path) -> Outcome:
        if not trial.tests:
            return Outcome(SURVIVED, "no test runs it")
        # With the compiled files: they are valid for as long as the size and the time of a source stay.
        package = pathlib.Path(shutil.copytree(SOURCE, folder / "learn2perturb"))
        (package / trial.mutant.path).write_text(trial.mutant.text, encoding="utf-8")
        judge = Judge(trial.tests, limit)
        try:
            code, said = _pytest(folder, judge, stop=True)
        except BaseException as error:  # of pytest or of this file: nothing that the mutant has to answer for
            return Outcome(LABORATORY, repr(error)[:300])
        if judge.failed:
            return Outcome(DIED, judge.failed[0])
        return Outcome(LABORATORY, f"pytest {code}: {said[-300:]}") if code else Outcome(SURVIVED)

    return Case(trial.name, trial.mutant.path.split("/")[0], judge)


def unchanged(tests: Iterable[str]) -> Case:
    """Return the case of the package as it is: the detail has the tests that fail, which kill nothing."""

    def judge(folder: pathlib.Path) -> Outcome:
        shutil.copytree(SOURCE, folder / "learn2perturb")
        judge = Judge(tests)
        code, said = _pytest(folder, judge, stop=False)
        if code not in (0, 1):
            return Outcome(LABORATORY, f"pytest {code}: {said[-300:]}")
        return Outcome(SURVIVED, json.dumps(judge.failed))

    return Case("unchanged", "unchanged", judge)


def _pytest(source: pathlib.Path, judge: Judge, *, stop: bool) -> tuple[int, str]:
    """Run tests in this process, on the package that lies in ``source``."""
    for name in [name for name in sys.modules if name.split(".")[0] == "learn2perturb"]:
        del sys.modules[name]
    os.chdir(ROOT)
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = f"{source}:{os.environ.get('PYTHONPATH', '')}"
    torch.set_num_threads(1)
    assert str(importlib.import_module("learn2perturb.errors").__file__).startswith(str(source))
    said = io.StringIO()
    words = [
        *WORDS,
        f"--timeout={HANGS}",
        *(["-x"] if stop else []),
        *dict.fromkeys(one.split("::")[0] for one in judge.place),
    ]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return int(pytest.main(words, plugins=[judge])), said.getvalue()


def main() -> int:
    """Try the listed mutants and a sample; 1 if a listed one survives, or more than ``MOST`` of the sample."""
    arguments = _arguments()
    if arguments.only:
        found = every(arguments.folders).values()
        drawn = [one for one in found if any(text in str(one) for text in arguments.only)]
    else:
        drawn = sample(arguments.n, arguments.seed, arguments.folders)
    arguments.out.mkdir(parents=True, exist_ok=True)
    _prepare()
    known = cover(places=places_of(arguments.folders), store=arguments.out / "lines", jobs=arguments.jobs)
    listed = [] if arguments.only or not arguments.listed else _listed()
    rest = [Trial(str(one), one, tests_of(one, known, arguments.limit)) for one in drawn]
    found = _run(listed, None, arguments) | _run(rest, arguments.limit, arguments)
    groups = {"listed": listed, f"sample, seed {arguments.seed}": rest}
    text = "\n".join(_lines_of(title, trials, found) for title, trials in groups.items() if trials)
    print(text)
    (arguments.out / f"mutants-{arguments.seed}.md").write_text(text + "\n", encoding="utf-8")
    return int(bool(_alive(listed, found)) or len(_alive(rest, found)) > MOST * len(rest))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.laboratories.mutate", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="mutants of the sample (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--folders", nargs="+", default=FOLDERS, choices=FOLDERS, help="of the sample (default all)")
    parser.add_argument(
        "--only", nargs="+", help="instead of a sample, every mutant whose file:line:column: change has this"
    )
    parser.add_argument("--no-listed", dest="listed", action="store_false", help="leave the listed mutants out")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of tests of a mutant (default 60)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/laboratories"), help="results, kept")
    return parser.parse_args()


def _prepare() -> None:
    """Do once what every mutant's process would do again: compile what it copies, and look over what is loaded."""
    sys.dont_write_bytecode = False
    compileall.compile_dir(str(SOURCE), quiet=1)
    gc.collect()
    gc.freeze()


def _listed() -> list[Trial]:
    return [Trial(f"listed: {one.name}", one.mutant(SOURCE), one.tests) for one in LISTED]


def _alive(trials: list[Trial], found: dict[str, Outcome]) -> list[str]:
    return [one.name for one in trials if found[one.name].kind in (SURVIVED, LABORATORY)]


def _lines_of(title: str, trials: list[Trial], found: dict[str, Outcome]) -> str:
    alive = _alive(trials, found)
    head = f"{title}: {len(trials)} mutants, {len(alive)} survived ({len(alive) / len(trials):.1%})"
    return "\n".join([head, *(f"  {one} {found[one].detail}".rstrip() for one in alive)])


def _run(trials: list[Trial], limit: float | None, arguments: argparse.Namespace) -> dict[str, Outcome]:
    """Try them; a run that was stopped goes on, and what survived is tried again.

    The tests that killed are run on the package without a change at the end; a mutant whose test fails there too has
    not died.
    """
    path = arguments.out / f"mutants-{mark_of_source()}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {name: Outcome(kind, detail) for name, kind, detail in map(json.loads, lines)}
    found = {name: one for name, one in found.items() if one.kind not in (SURVIVED, LABORATORY)}
    todo = [case(one, limit) for one in trials if one.name not in found]
    started = time.monotonic()
    patience = 1800.0 if limit is None else 10 * limit + 2 * HANGS  # of the clock, on a machine that has other work
    with path.open("a", encoding="utf-8") as file:
        for done, (one, outcome) in enumerate(run(todo, jobs=arguments.jobs, limit=patience), start=1):
            found[one.name] = outcome
            file.write(json.dumps([one.name, outcome.kind, outcome.detail]) + "\n")
            file.flush()
            left = (time.monotonic() - started) / done * (len(todo) - done) / 60
            word = {SURVIVED: "SURVIVED", LABORATORY: "COULD NOT BE TRIED"}.get(outcome.kind, "died")
            print(
                f"{done}/{len(todo)}, about {left:.0f} minutes left: {word}: {one.name} ({outcome.detail})", flush=True
            )
    found = {one.name: found[one.name] for one in trials}
    return found | _not_dead(found)


def _not_dead(found: dict[str, Outcome]) -> dict[str, Outcome]:
    """Return the mutants that were killed by tests which fail without a change."""
    killers = sorted({one.detail for one in found.values() if one.kind == DIED})
    if not killers:
        return {}
    ((_, outcome),) = run([unchanged(killers)], jobs=1, limit=3600.0)
    if outcome.kind != SURVIVED:
        print(f"the tests could not be run without a change: {outcome.detail}")
        return {name: Outcome(LABORATORY, outcome.detail) for name in found}
    broken = json.loads(outcome.detail)
    return {
        name: Outcome(SURVIVED, f"but for {one.detail}, which fails without a change")
        for name, one in found.items()
        if one.kind == DIED and one.detail in broken
    }


if __name__ == "__main__":
    sys.exit(main())
