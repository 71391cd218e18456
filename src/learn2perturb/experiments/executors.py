"""Where the tasks of a study are done: in this process, in several on this machine, on Ray, or in a SLURM array.

Each takes tasks while it has room, and gives them back with their outcome. A task whose process died is given back as
``lost``: it is tried again, and goes on from what it has saved.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any, final

from learn2perturb.checks import check_count
from learn2perturb.errors import ConfigError, Interrupted, MissingDependencyError
from learn2perturb.experiments.tasks import STOPPED, Outcome, Task, perform
from learn2perturb.plugins import VARIABLE

LOST = "lost"
NAMES = ("local", "ray", "slurm")
_GRACE = 30.0  # seconds that a process has to save what it has


class Executor(ABC):
    """Does tasks, ``room`` at a time at most."""

    room: int = 1

    @abstractmethod
    def submit(self, task: Task, seconds: float | None) -> None:
        """Begin a task; after ``seconds`` it is to save and stop."""

    @abstractmethod
    def ended(self, timeout: float) -> list[tuple[Task, Outcome]]:
        """Return what has ended, at the latest after ``timeout`` seconds."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what is still at work, so that it saves."""
        return


@final
class InProcess(Executor):
    """One task after the other, in this process."""

    def __init__(self, store: Path, device: str, progress: bool) -> None:
        self._settings: dict[str, Any] = {"device": device, "progress": progress}
        self._store = store
        self._waiting: list[tuple[Task, float | None]] = []

    def submit(self, task: Task, seconds: float | None) -> None:
        """Note the task; it is done when its outcome is asked for."""
        self._waiting.append((task, seconds))

    def ended(self, timeout: float) -> list[tuple[Task, Outcome]]:
        """Do what was submitted."""
        found = []
        while self._waiting:
            task, seconds = self._waiting.pop(0)
            found.append((task, perform(self._store, task, seconds=seconds, **self._settings)))
        return found


_AT_WORK = threading.Event()  # of this worker


def _work(folder: str, store: Path, task: Task, until: float | None, device: str, most: float | None = None) -> Outcome:
    """Do a task in another process, until a time of day, and for ``most`` seconds: it may have waited for its turn."""
    left = [seconds for seconds in (None if until is None else until - time.time(), most) if seconds is not None]
    if left and min(left) <= 0:
        return Outcome(STOPPED)
    os.chdir(folder)  # data sets and runs may be named relative to where the study was begun
    _AT_WORK.set()
    try:
        return perform(store, task, seconds=min(left) if left else None, device=device)
    finally:
        _AT_WORK.clear()


def _until(seconds: float | None) -> float | None:
    return None if seconds is None else time.time() + seconds


def _begin(threads: int) -> None:
    """Make a worker ready: its share of the cores, and an end by signal that saves."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number=number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says who stops
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Save and end when the process that the results go to is gone: a worker would work on unseen, and hold its run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        if _AT_WORK.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        while _AT_WORK.is_set() and time.monotonic() < end:
            time.sleep(0.05)
        # The main thread waits for work that nobody will send: it holds both ends of that pipe itself.
        os._exit(1)


@final
class Processes(Executor):
    """``jobs`` processes on this machine, which divide its cores among them."""

    def __init__(self, store: Path, device: str, jobs: int) -> None:
        check_count("jobs", jobs)
        self.room, self._store, self._device = jobs, store, device
        self._threads = max(1, (os.cpu_count() or 1) // jobs)
        self._futures: dict[Future[Outcome], Task] = {}
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, task: Task, seconds: float | None) -> None:
        """Give the task to a process that is free."""
        # A worker starts when there is work for it, and its threads are made when it imports torch.
        with _environment(OMP_NUM_THREADS=str(self._threads)):
            self._send(task, seconds)

    def _made(self) -> ProcessPoolExecutor:
        # Spawned: a fork of a process with threads of torch may hang.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.room, context, initializer=_begin, initargs=(self._threads,))

    def _send(self, task: Task, seconds: float | None) -> None:
        self._pool = self._pool or self._made()
        work = os.getcwd(), self._store, task, _until(seconds), self._device
        try:
            future = self._pool.submit(_work, *work)
        except BrokenProcessPool:
            self._pool = self._made()
            future = self._pool.submit(_work, *work)
        self._futures[future] = task

    def ended(self, timeout: float) -> list[tuple[Task, Outcome]]:
        """Return what has ended; what a process that died was at is lost, and so is what the others then were at."""
        done, _ = wait(self._futures, timeout, FIRST_COMPLETED)
        found = []
        for future in done:
            task = self._futures.pop(future)
            error = future.exception()
            if error is None:
                found.append((task, future.result()))
            elif isinstance(error, (BrokenProcessPool, KeyboardInterrupt)):
                self._pool = None
                found.append((task, Outcome(LOST, message=f"the process died: {error}")))
            else:
                raise error
        return found

    def __exit__(self, *error: object) -> None:
        """End the workers by SIGTERM, which saves; kill those that do not end in time."""
        if self._pool is None:
            return
        busy = bool(self._futures)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if busy:
            for child in multiprocessing.active_children():
                child.terminate()
        end = time.monotonic() + _GRACE
        for child in multiprocessing.active_children():
            child.join(max(0.1, end - time.monotonic()))
            if child.is_alive():
                child.kill()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@final
class Ray(Executor):
    """A Ray task each, on this machine or on the cluster at ``address``, which must see the folder of the store."""

    def __init__(
        self, store: Path, device: str, *, address: str | None, jobs: int | None, cpus: float, gpus: float
    ) -> None:
        try:
            import ray
        except ImportError:
            raise MissingDependencyError(
                "--engine ray needs ray, which is not installed: pip install 'learn2perturb[cluster]'"
            ) from None
        self._ray, self._store, self._device = ray, store.resolve(), device
        self._began = not ray.is_initialized()
        if self._began:
            local: dict[str, Any] = {"num_cpus": jobs or os.cpu_count()} if address is None else {"address": address}
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, **local)
        environment = {"OMP_NUM_THREADS": str(max(1, round(cpus))), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        environment[VARIABLE] = os.environ.get(VARIABLE, "")
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, runtime_env={"env_vars": environment})
        self._work = remote(_work)
        self.room = jobs or max(1, int(ray.cluster_resources().get("CPU", 1) / cpus))
        self._tasks: dict[Any, Task] = {}

    def submit(self, task: Task, seconds: float | None) -> None:
        """Give the task to Ray, which places it."""
        reference = self._work.remote(os.getcwd(), self._store, task, _until(seconds), self._device)
        self._tasks[reference] = task

    def ended(self, timeout: float) -> list[tuple[Task, Outcome]]:
        """Return what has ended."""
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=timeout)
        found = []
        for reference in done:
            task = self._tasks.pop(reference)
            try:
                found.append((task, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                found.append((task, Outcome(LOST, message=str(error).splitlines()[0])))
        return found

    def __exit__(self, *error: object) -> None:
        """Interrupt what is at work, which saves, and leave Ray if this process began it."""
        for reference in self._tasks:
            self._ray.cancel(reference, force=False)
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=_GRACE)
        if self._began:
            self._ray.shutdown()


@final
class Slurm(Executor):
    """A job each in SLURM arrays, through submitit; ``settings`` are submitit's, such as ``slurm_partition``."""

    def __init__(self, store: Path, device: str, *, jobs: int, settings: Mapping[str, Any], cluster: str) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingDependencyError(
                "--engine slurm needs submitit, which is not installed: pip install 'learn2perturb[cluster]'"
            ) from None
        check_count("jobs", jobs)
        self.room, self._store, self._device = jobs, store.resolve(), device
        self._executor = submitit.AutoExecutor(folder=store / "slurm", cluster=cluster)
        self._minutes = settings.get("timeout_min", 60)
        given = {"timeout_min": self._minutes, "slurm_array_parallelism": jobs, **settings}
        try:
            self._executor.update_parameters(**given)
        except (TypeError, ValueError, NameError) as error:
            raise ConfigError(f"--slurm: {' '.join(str(error).split())}; see submitit's update_parameters") from None
        self._waiting: list[tuple[Task, float | None]] = []  # until when
        self._jobs: list[tuple[Task, Any]] = []

    def submit(self, task: Task, seconds: float | None) -> None:
        """Note the task; those of one round become one array."""
        self._waiting.append((task, _until(seconds)))

    def ended(self, timeout: float) -> list[tuple[Task, Outcome]]:
        """Submit what waits, and return what has ended."""
        if self._waiting:
            # Two minutes before SLURM ends it the job saves; the rest is another job's.
            own = 60.0 * max(1, self._minutes - 2)
            with self._executor.batch():
                sent = [
                    (task, self._executor.submit(_work, os.getcwd(), self._store, task, until, self._device, own))
                    for task, until in self._waiting
                ]
            self._jobs += sent
            self._waiting = []
        end = time.monotonic() + timeout
        while not (done := [one for one in self._jobs if one[1].done()]) and time.monotonic() < end:
            time.sleep(0.2)
        self._jobs = [one for one in self._jobs if one not in done]
        return [(task, _outcome(job)) for task, job in done]

    def __exit__(self, *error: object) -> None:
        """Cancel what is at work: by the signal that saves."""
        for _, job in self._jobs:
            job.cancel(check=False)


def _outcome(job: Any) -> Outcome:
    error = job.exception()
    if error is None:
        outcome: Outcome = job.result()
        return outcome
    return Outcome(LOST, message=str(error).strip().splitlines()[-1])
