"""One slice: processes side by side until the time is up, then everything stopped, saved and packed."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper_scale.packing import MOST, pack
from benchmarks.paper_scale.plan import Plan
from benchmarks.paper_scale.state import State
from benchmarks.paper_scale.tasks import FLOOR, TRAIN, Task, ready
from learn2perturb.errors import TrainingError
from learn2perturb.training.interrupt import Interrupt

PARENT = "PAPER_SCALE_PARENT"  # the environment variable that tells a process which slice it belongs to
ROOT = Path(__file__).resolve().parents[2]
_GRACE = 25.0  # seconds that a process has to save what it has
_TRIES = 2  # a task that fails so often is left for another slice
_TOO_LATE = 20.0  # seconds before the end in which nothing new is begun


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    started: float
    epochs: int


class Slice:
    """Works a plan down for some minutes."""

    def __init__(
        self, plan: Plan, state: State, *, side: int, device: str, data_dir: Path | None, limit_runs: list[str]
    ) -> None:
        self.plan, self.state, self.side, self.device, self.data_dir = plan, state, side, device, data_dir
        self.limit_runs = limit_runs
        self.running: dict[Task, _Running] = {}
        self.failures: dict[Task, int] = {}
        self.done: list[dict[str, Any]] = []

    def work(self, minutes: float, out: Path | None, *, pack_minutes: float = 3.0, cache: bool = False) -> None:
        """Run tasks for ``minutes``; pack into ``out`` now and then, in case the end is sudden, and at the end.

        Raises:
            TrainingError: tasks have failed again and again; the rest was done.
        """
        started = time.monotonic()
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        deadline, packed = started + 60 * minutes, started
        interrupt = Interrupt(_say, saves=True)
        try:
            with interrupt.listening():
                while time.monotonic() < deadline and interrupt.received is None:
                    self._reap()
                    self._fill(deadline)
                    if not self.running:
                        break
                    if out is not None and time.monotonic() - packed > 60 * pack_minutes:
                        pack(self.state, out, cache=cache)
                        packed = time.monotonic()
                    time.sleep(0.1)
        finally:
            self._stop()
            seconds = time.monotonic() - started
            self.state.note({"date": date, "seconds": round(seconds, 1), "side": self.side, "tasks": self.done})
            if out is not None:
                files = pack(self.state, out, cache=cache)
                size = sum(path.stat().st_size for path in files)
                _say(f"packed {len(files)} files, {size / 2**20:.1f} MiB")
                if size > MOST:
                    _say(f"that is more than {MOST >> 20} MiB; leave weights behind next time: pack --leave RUN")
        failed = [str(task) for task, count in self.failures.items() if count >= _TRIES]
        if failed:
            raise TrainingError(f"{', '.join(failed)} failed {_TRIES} times; read {self.state.folder / 'logs'}")

    def _fill(self, deadline: float) -> None:
        if deadline - time.monotonic() < _TOO_LATE:
            return
        busy = {task.run for task in self.running}
        for task in ready(self.plan, self.state):
            if Task(FLOOR) in self.running or len(self.running) >= self.side:
                return  # nothing beside a measurement
            if task.run in busy or self.failures.get(task, 0) >= _TRIES:
                continue
            if self.limit_runs and task.run not in self.limit_runs and task.kind != FLOOR:
                continue
            self._start(task)
            busy.add(task.run)

    def _start(self, task: Task) -> None:
        # Every path absolute, since the process works in the folder of the state.
        log = self.state.log(str(task).replace(" ", "-"))
        log.parent.mkdir(parents=True, exist_ok=True)
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(ROOT), str(ROOT / "src"), *(str(Path(path).resolve()) for path in given if path)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            PARENT: str(os.getpid()),
            # Compiling takes a minute or more in every process; the next slice on this machine finds it done.
            "TORCHINDUCTOR_CACHE_DIR": str(self.state.cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.state.cache / "triton"),
        }
        data = self.data_dir or os.environ.get("LEARN2PERTURB_DATA_DIR") or ".data"
        environment["LEARN2PERTURB_DATA_DIR"] = str(Path(data).resolve())
        words = [
            *(sys.executable, "-m", "benchmarks.paper_scale", "task", task.kind, *([task.run] if task.run else [])),
            *("--plan", str(self.plan.path.resolve()), "--state", str(self.state.folder), "--device", self.device),
        ]
        with open(log, "ab") as file:
            # In the folder of the state, so that no path of this machine gets into a record.
            process = subprocess.Popen(
                words, cwd=self.state.folder, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.running[task] = _Running(process, time.monotonic(), self._epochs(task))
        _say(f"{task}: begun")

    def _epochs(self, task: Task) -> int:
        return self.state.epochs(task.run) if task.kind == TRAIN else 0

    def _reap(self) -> None:
        for task, running in list(self.running.items()):
            code = running.process.poll()
            if code is not None:
                self._ended(task, running, code)

    def _ended(self, task: Task, running: _Running, code: int) -> None:
        del self.running[task]
        seconds = time.monotonic() - running.started
        if code:
            self.failures[task] = self.failures.get(task, 0) + 1
        note: dict[str, Any] = {"task": str(task), "seconds": round(seconds, 1), "code": code}
        if task.kind == TRAIN:
            note["epochs"] = self._epochs(task) - running.epochs
        self.done.append(note)
        _say(f"{task}: {'ended' if not code else f'failed, code {code}'} after {seconds:.0f} s")

    def _stop(self) -> None:
        """Let every process save and end; one that does not in time has its last checkpoint."""
        self._reap()
        for running in self.running.values():
            running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for task, running in list(self.running.items()):
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            self._ended(task, running, 0)


def _say(text: str) -> None:
    print(f"paper_scale: {text}", flush=True)
