"""Paper scale in slices: train, evaluate, carry off, carry back, go on; then the report and the published weights.

python -m benchmarks.paper_scale work --minutes 9 --state runs/paper --data-dir .data --out runs/carried
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from learn2perturb.errors import Learn2PerturbError

if TYPE_CHECKING:
    from benchmarks.paper_scale.plan import Plan
    from benchmarks.paper_scale.state import State


def main(words: list[str] | None = None) -> int:
    """Run one verb; 0 is success, 1 a failed task, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="paper_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    work = verbs.add_parser("work", help="one slice")
    work.add_argument("--minutes", type=float, default=9.0, help="of the slice, packing not counted (default 9)")
    work.add_argument("--side", type=int, default=1, help="processes side by side (default 1)")
    work.add_argument("--data-dir", type=Path, help="folder of the data sets")
    work.add_argument("--in", dest="carried", type=Path, help="folder of packed files to begin with")
    work.add_argument("--out", type=Path, help="folder to pack into, every three minutes and at the end")
    work.add_argument("--runs", nargs="*", default=[], help="these only")
    task = verbs.add_parser("task", help="what one process of a slice does")
    task.add_argument("kind", choices=("floor", "train", "evaluate"))
    task.add_argument("run", nargs="?", default="")
    packing = verbs.add_parser("pack", help="write the state as a few files")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--leave", nargs="*", default=[], metavar="RUN", help="leave the weights of these out")
    unpacking = verbs.add_parser("unpack", help="add packed files to the state")
    unpacking.add_argument("folder", type=Path)
    status = verbs.add_parser("status", help="what is done and what is not")
    report = verbs.add_parser("report", help="write the results as Markdown and figures")
    report.add_argument("--out", type=Path, required=True, help="folder")
    publish = verbs.add_parser("publish", help="put a run's weights and card into the package's zoo")
    publish.add_argument("run")
    publish.add_argument("--zoo", type=Path, help="another folder than the package's")
    cell = verbs.add_parser("cell", help="compute a cell anew from the published weights (zoo:RUN)")
    cell.add_argument("run", help="zoo:NAME, or NAME of a run in the state")
    cell.add_argument("cell")
    cell.add_argument("--out", type=Path, required=True, help="the record")
    for verb in (work, task, cell):
        verb.add_argument("--device", default="auto")
    for verb in (work, packing):
        verb.add_argument("--cache", action="store_true", help="pack compiled kernels, too")
    for verb in (work, task, packing, unpacking, status, report, publish, cell):
        verb.add_argument("--state", type=Path, default=Path("runs/paper_scale"), help="folder of everything")
        verb.add_argument("--plan", type=Path, help="YAML file (default: plan.yaml beside this program)")
    given = parser.parse_args(words)
    try:
        return _run(given)
    except Learn2PerturbError as error:
        print(f"paper_scale: error: {error}", file=sys.stderr)
        from learn2perturb.errors import TrainingError

        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        return 0  # told to stop, and it has saved


def _run(given: argparse.Namespace) -> int:
    from benchmarks.paper_scale.plan import PLAN, read_plan
    from benchmarks.paper_scale.state import State

    plan = read_plan(given.plan or PLAN)
    state = State(given.state.resolve())
    if given.verb == "task":
        from benchmarks.paper_scale.tasks import Task, perform

        _end_with_parent()
        perform(plan, state, Task(given.kind, given.run), given.device)
    elif given.verb == "work":
        from benchmarks.paper_scale.packing import unpack
        from benchmarks.paper_scale.work import Slice

        state.folder.mkdir(parents=True, exist_ok=True)
        for run in given.runs:
            plan.config(run)
        if given.carried is not None:
            unpack(given.carried, state)
        part = Slice(
            plan, state, side=given.side, device=given.device, data_dir=given.data_dir, limit_runs=given.runs
        )  # fmt: skip
        part.work(given.minutes, given.out, cache=given.cache)
    elif given.verb == "cell":
        _cell(given, plan, state)
    elif given.verb == "pack":
        from benchmarks.paper_scale.packing import pack

        for path in pack(state, given.out, leave=given.leave, cache=given.cache):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    elif given.verb == "unpack":
        from benchmarks.paper_scale.packing import unpack

        print(f"brought forward: {', '.join(unpack(given.folder, state)) or 'nothing'}")
    elif given.verb == "status":
        from benchmarks.paper_scale.report import status

        print(status(plan, state))
    elif given.verb == "report":
        from benchmarks.paper_scale.report import write_report

        print(write_report(plan, state, given.out))
    elif given.verb == "publish":
        from benchmarks.paper_scale.publish import publish

        print(publish(plan, state, given.run, given.zoo))
    return 0


def _end_with_parent() -> None:
    """Let this process save and end when the slice that began it is gone: it would work on unseen, and hold its run."""
    from benchmarks.paper_scale.work import PARENT

    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _cell(given: argparse.Namespace, plan: Plan, state: State) -> None:
    from benchmarks.paper_scale.tasks import cells_of, compute
    from learn2perturb.errors import UnknownNameError
    from learn2perturb.zoo import PREFIX

    run = given.run.removeprefix(PREFIX)
    known = {cell.name: cell for cell in cells_of(plan, run)}
    if given.cell not in known:
        raise UnknownNameError.of("cell", given.cell, known)
    public = given.run.startswith(PREFIX)
    compute(
        plan, run, known[given.cell], given.device, given.out,
        lambda name: f"{PREFIX}{name}" if public else str(state.run(name)),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
