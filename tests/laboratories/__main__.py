"""``python -m tests.laboratories``: break the package in every way, count what comes out, write the table."""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a resumed run is bit-identical only at an equal thread count

import torch

from tests.laboratories import crash, damage, hostile, kills
from tests.laboratories.cases import Case, Ledger

LABORATORIES = ("crash", "kills", "damage", "hostile")
# full: what docs/reliability.md reports; sample: minutes on two cores, for every push. Damage is by kind of file.
SIZES = {
    "full": {"crash": 600, "kills": 200, "damage": 170, "hostile": 100_000},
    "sample": {"crash": 80, "kills": 16, "damage": 12, "hostile": 200},
}


def _cases(laboratory: str, folder: pathlib.Path, size: int, seed: int) -> list[Case]:
    if laboratory == "crash":
        return crash.cases(folder, most=size, seed=seed)
    if laboratory == "kills":
        return kills.cases(folder, most=size, seed=seed)
    if laboratory == "damage":
        return damage.cases(folder, each=size, seed=seed)
    return hostile.cases(folder, most=size, seed=seed)


def main() -> int:
    """Run the laboratories; 1 if anything came out that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.laboratories", description=__doc__)
    parser.add_argument("laboratories", nargs="*", metavar="NAME", help=f"of {', '.join(LABORATORIES)} (default: all)")
    parser.add_argument("--size", choices=SIZES, default="full", help="how many cases (default full)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a case hangs (default 60)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/laboratories"), help="results, kept")
    arguments = parser.parse_args()
    if unknown := set(arguments.laboratories) - set(LABORATORIES):
        parser.error(f"no laboratory {', '.join(sorted(unknown))}; there are {', '.join(LABORATORIES)}")
    torch.set_num_threads(1)
    started, tables, bad = time.time(), [], {}
    for laboratory in arguments.laboratories or LABORATORIES:
        ledger = Ledger(arguments.out / f"{laboratory}-{arguments.size}-{arguments.seed}.jsonl")
        with tempfile.TemporaryDirectory(prefix="laboratory-") as folder:
            print(f"{laboratory}: preparing", flush=True)
            cases = _cases(laboratory, pathlib.Path(folder), SIZES[arguments.size][laboratory], arguments.seed)
            ledger.work(laboratory, cases, jobs=arguments.jobs, limit=arguments.limit)
        tables.append(ledger.table())
        bad |= ledger.bad()
    _summary(arguments, tables, bad, time.time() - started)
    return 1 if bad else 0


def _summary(arguments: argparse.Namespace, tables: list[str], bad: dict[str, object], seconds: float) -> None:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    how = f"{arguments.jobs} processes, {seconds / 60:.1f} minutes"
    lines = [f"Size {arguments.size}, seed {arguments.seed}, {how}, {versions}.", "", *(f"{one}\n" for one in tables)]
    lines += [f"bad: {name}: {outcome}" for name, outcome in bad.items()]
    text = "\n".join(lines)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"summary-{arguments.size}-{arguments.seed}.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
