"""``python -m tests.laboratories.mutate``: change one place of the source; tests of its folder must fail."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import pathlib
import random
import re
import shutil
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: F401 - imported once here rather than for every mutant
import pytest
import scipy.stats  # noqa: F401
import torch

from tests.laboratories.cases import Case, Outcome, run
from tests.laboratories.listed_mutants import EQUIVALENT, LISTED
from tests.laboratories.mutants import Mutant, mutants

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "learn2perturb"
FOLDERS = ("attacks", "evaluation", "diagnosis", "certification", "defenses", "noise")
MOST = 0.05  # of the sample may survive


def sample(n: int, seed: int) -> list[Mutant]:
    """Return ``n`` mutants of the folders, each place as likely as any other, equivalent ones left out."""
    every = [
        mutant
        for folder in FOLDERS
        for path in sorted((SOURCE / folder).rglob("*.py"))
        for mutant in mutants(SOURCE, path.relative_to(SOURCE).as_posix())
        if (mutant.path, line_of(mutant), mutant.before, mutant.after) not in EQUIVALENT
    ]
    return random.Random(seed).sample(every, min(n, len(every)))


@functools.cache
def _lines(path: str) -> list[str]:
    return (SOURCE / path).read_text(encoding="utf-8").splitlines()


def line_of(mutant: Mutant) -> str:
    """Return the line of the source that a mutant begins on, without its indent."""
    return _lines(mutant.path)[mutant.line - 1].strip()


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    """Return the tests of a mutant's folder, those that are named after its file first."""
    folder, name = f"tests/{mutant.path.split('/')[0]}", pathlib.PurePath(mutant.path).stem
    near = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(f"test_{name}*.py"))
    return (*near, folder)


def case(mutant: Mutant, tests: tuple[str, ...], name: str) -> Case:
    """Return the case of a mutant; ``same result`` is a mutant that survived."""

    def judge(folder: pathlib.Path) -> Outcome:
        shutil.copytree(SOURCE, folder / "learn2perturb", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "learn2perturb" / mutant.path).write_text(mutant.text, encoding="utf-8")
        code, said = _pytest(folder, tests)
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return Outcome("same result" if code == 0 else "clean line", found[1] if found else f"exit {code}")

    return Case(name, mutant.path.split("/")[0], judge)


def _unchanged() -> Mutant:
    return Mutant("errors.py", 0, "", "", (SOURCE / "errors.py").read_text(encoding="utf-8"))


def _pytest(source: pathlib.Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run tests in this process, on the package that lies in ``source``."""
    for name in [name for name in sys.modules if name.split(".")[0] == "learn2perturb"]:
        del sys.modules[name]
    os.chdir(ROOT)
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = f"{source}:{os.environ.get('PYTHONPATH', '')}"
    torch.set_num_threads(1)
    said = io.StringIO()
    words = ["-q", "-x", "-m", "not slow and not compat", "-p", "no:cacheprovider", *tests]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return int(pytest.main(words)), said.getvalue()


def main() -> int:
    """Try the listed mutants and a sample; 1 if a listed one survives, or more than ``MOST`` of the sample."""
    parser = argparse.ArgumentParser(prog="python -m tests.laboratories.mutate", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="mutants of the sample (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a mutant is dead (default 900)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/laboratories"), help="results, kept")
    arguments = parser.parse_args()
    chosen = [(one.mutant(SOURCE), one.tests, f"listed: {one.name}") for one in LISTED]
    chosen += [(mutant, tests_of(mutant), str(mutant)) for mutant in sample(arguments.n, arguments.seed)]
    # The last of the tests of a mutant is its folder, or all that there is: what fails without a change says nothing.
    tests = sorted({tests if name.startswith("listed") else tests[-1:] for _, tests, name in chosen})
    tried = [case(_unchanged(), some, f"unchanged: {' '.join(some)}") for some in tests]
    found = _run([*tried, *(case(*one) for one in chosen)], arguments)
    if broken := [name for name in found if name.startswith("unchanged: ") and found[name][0] != "same result"]:
        print(f"tests that fail without any change: {', '.join(broken)}; what they say of mutants is worth nothing")
    found = {name: one for name, one in found.items() if not name.startswith("unchanged: ")}
    listed = {name: one for name, one in found.items() if name.startswith("listed: ")}
    rest = {name: one for name, one in found.items() if name not in listed}
    lines = []
    for title, some in (("listed", listed), ("sample", rest)):
        alive = [name for name, (kind, _) in some.items() if kind == "same result"]
        share = len(alive) / max(len(some), 1)
        lines += [f"{title}: {len(some)} mutants, {len(alive)} survived ({share:.1%})", *(f"  {one}" for one in alive)]
    text = "\n".join(lines)
    print(text)
    (arguments.out / "mutants.md").write_text(text + "\n", encoding="utf-8")
    alive = sum(kind == "same result" for kind, _ in rest.values())
    return int(bool(broken) or any(kind == "same result" for kind, _ in listed.values()) or alive > MOST * len(rest))


def _run(tried: list[Case], arguments: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Try them all, say how far it is, keep what is known in a file: a run that was stopped goes on."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"mutants-{arguments.seed}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {name: (kind, detail) for name, kind, detail in map(json.loads, lines)}
    todo = [one for one in tried if one.name not in found]
    started = time.monotonic()
    with path.open("a", encoding="utf-8") as file:
        for done, (one, outcome) in enumerate(run(todo, jobs=arguments.jobs, limit=arguments.limit), start=1):
            found[one.name] = outcome.kind, outcome.detail
            file.write(json.dumps([one.name, outcome.kind, outcome.detail]) + "\n")
            file.flush()
            left = (time.monotonic() - started) / done * (len(todo) - done) / 60
            word = "SURVIVED" if outcome.kind == "same result" else "died"
            print(
                f"{done}/{len(todo)}, about {left:.0f} minutes left: {word}: {one.name} ({outcome.detail})", flush=True
            )
    return {one.name: found[one.name] for one in tried}


if __name__ == "__main__":
    sys.exit(main())
