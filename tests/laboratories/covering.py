"""``python -m tests.laboratories.covering``: which test runs which line of the package, and for how many seconds."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import pathlib
import pkgutil
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import coverage
import pytest
import torch

from tests.laboratories.cases import Case, Outcome, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "learn2perturb"
STORE = pathlib.Path("runs/laboratories/lines")
# Tests elsewhere that run lines of the mutated folders within seconds.
ELSEWHERE = (
    "tests/cli/test_defaults.py", "tests/cli/test_options.py", "tests/cli/test_programs.py",
    "tests/compat/test_*others.py", "tests/diagnosis/test_values.py", "tests/engine/test_halving.py",
)  # fmt: skip
WORDS = ("-q", "-m", "not slow and not browser", "-p", "no:cacheprovider", "-p", "no:benchmark")
LONGEST = 30.0  # seconds: a test that takes longer judges no mutant


@dataclass(frozen=True)
class Test:
    """A test that passes: its seconds, and the lines of each file of the package that it runs."""

    __test__ = False  # is none of pytest's own

    name: str
    seconds: float
    lines: dict[str, frozenset[int]]


class Watch:
    """A plugin of pytest: every test is a context of the coverage, and so is a fixture that tests share."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.contexts = [""]
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, list[str]] = {}
        self.failed: set[str] = set()

    @contextlib.contextmanager
    def _context(self, name: str) -> Iterator[None]:
        self.contexts.append(name)
        self.measured.switch_context(name)
        try:
            yield
        finally:
            self.contexts.pop()
            self.measured.switch_context(self.contexts[-1])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items += items[:1]  # again: the first of a file pays for what is imported on first use, seconds of it

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        started = busy()
        with self._context(item.nodeid):
            done = yield
        self.seconds[item.nodeid] = busy() - started
        self.fixtures[item.nodeid] = list(getattr(item, "fixturenames", ()))
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        with self._context(f"fixture {fixturedef.argname}"):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)


def busy() -> float:
    """Return the seconds of work of this process and of those that it waited for: other work does not lengthen them."""
    return sum(os.times()[:4])


def measure(path: str) -> list[Test]:
    """Run the tests of a file in this process; return those that pass."""
    measured = coverage.Coverage(data_file=None, config_file=False, include=[f"{SOURCE}/*"])
    measured.set_option("run:core", "ctrace")  # the one that knows contexts in every Python
    measured.set_option("run:disable_warnings", ["already-imported", "no-data-collected"])
    watch = Watch(measured)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        measured.start()
        pytest.main([*WORDS, f"--timeout={LONGEST}", path], plugins=[watch])
        measured.stop()
    lines: dict[str, dict[str, set[int]]] = {}
    data = measured.get_data()
    for file in data.measured_files():
        inner = pathlib.Path(file).relative_to(SOURCE).as_posix()
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                lines.setdefault(context, {}).setdefault(inner, set()).add(line)
    return [
        Test(name, seconds, _merged([lines.get(one, {}) for one in (name, *(f"fixture {x}" for x in fixtures))]))
        for (name, seconds), fixtures in zip(watch.seconds.items(), watch.fixtures.values(), strict=True)
        if name not in watch.failed and seconds <= LONGEST
    ]


def _merged(parts: list[dict[str, set[int]]]) -> dict[str, frozenset[int]]:
    files = {file for part in parts for file in part}
    return {file: frozenset().union(*(part.get(file, ()) for part in parts)) for file in sorted(files)}


def places_of(folders: Iterable[str]) -> tuple[str, ...]:
    """Return where the tests are that judge mutants of ``folders``: those of the folders, and a few elsewhere."""
    return (*(f"tests/{folder}" for folder in folders), *ELSEWHERE)


def cover(*, places: Iterable[str], store: pathlib.Path = STORE, jobs: int = 1) -> dict[str, Test]:
    """Return what is known of the tests by name, measured where it is not known for this source and these tests."""
    store = store.resolve() / mark_of_source()
    store.mkdir(parents=True, exist_ok=True)
    kept = {path: store / f"{path.replace('/', '.')}-{_digest([ROOT / path])}.json" for path in test_files(places)}
    todo = [Case(path, "lines", _writer(path, at)) for path, at in kept.items() if not at.exists()]
    if todo:
        _preload()
    started = time.monotonic()
    for done, (case, outcome) in enumerate(run(todo, jobs=jobs, limit=1800.0), start=1):
        left = (time.monotonic() - started) / done * (len(todo) - done) / 60
        print(f"lines: {done}/{len(todo)}, about {left:.0f} minutes left: {case.name}: {outcome.detail}", flush=True)
    tests = [one for at in kept.values() if at.exists() for one in _read(at)]
    return {one.name: one for one in tests}


def test_files(places: Iterable[str]) -> list[str]:
    """Return the files of tests in folders and patterns below the root."""
    found = [
        path
        for place in places
        for path in sorted((ROOT / place).rglob("test_*.py") if (ROOT / place).is_dir() else ROOT.glob(place))
    ]
    return [path.relative_to(ROOT).as_posix() for path in found]


test_files.__test__ = False  # type: ignore[attr-defined]  # nor is this


def mark_of_source() -> str:
    """Return a hash of the package and of what tests share: what was measured with others is measured again."""
    shared = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    shared = [path for path in shared if path.parent.name != "laboratories"]
    return _digest([*sorted(SOURCE.rglob("*.py")), *sorted(shared)])


def _digest(paths: list[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _writer(path: str, at: pathlib.Path):
    def judge(_: pathlib.Path) -> Outcome:
        tests = measure(path)
        content = [[one.name, round(one.seconds, 3), {f: sorted(x) for f, x in one.lines.items()}] for one in tests]
        half = at.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(content), encoding="utf-8")
        half.replace(at)
        return Outcome("same result", f"{len(tests)} tests, {sum(one.seconds for one in tests):.0f} s")

    return judge


def _read(at: pathlib.Path) -> list[Test]:
    content = json.loads(at.read_text(encoding="utf-8"))
    return [Test(name, seconds, {f: frozenset(x) for f, x in lines.items()}) for name, seconds, lines in content]


def _preload() -> None:
    """Import the package once, rather than in the process of every file."""
    import learn2perturb

    for module in pkgutil.walk_packages(learn2perturb.__path__, "learn2perturb."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def main() -> int:
    """Measure what is not known yet."""
    parser = argparse.ArgumentParser(prog="python -m tests.laboratories.covering", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--store", type=pathlib.Path, default=STORE, help=f"where it is kept (default {STORE})")
    parser.add_argument("places", nargs="+", help="files and folders of tests")
    arguments = parser.parse_args()
    tests = cover(places=arguments.places, store=arguments.store, jobs=arguments.jobs)
    print(f"{len(tests)} tests, {sum(one.seconds for one in tests.values()):.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
