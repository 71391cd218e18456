"""Run a study: a loop over what can be done now, until everything is there or the time is up."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from learn2perturb.brief import brief
from learn2perturb.checks import check_choice, check_count
from learn2perturb.errors import ConfigError, Interrupted
from learn2perturb.experiments import executors
from learn2perturb.experiments.estimates import Estimates
from learn2perturb.experiments.executors import LOST, Executor, InProcess, Processes, Ray, Slurm
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.results import Results
from learn2perturb.experiments.spec import RunPlan, Study
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import read_study
from learn2perturb.experiments.sweeping import Trials, chosen_study, read_sweep, search
from learn2perturb.experiments.tasks import DONE, FAILED, HELD, STOPPED, TRAIN, Outcome, Task
from learn2perturb.progress import Reporter, duration

STORE = "runs/store"
_TRIES = 3  # of a task whose process dies
_TOO_LATE = 2.0  # seconds before the end in which nothing new is begun
_PATIENCE = 2.0  # seconds until a task that another process has is looked at again


@final
@dataclass(frozen=True)
class Placing:
    """Where the tasks of a study are done.

    Args:
        engine: ``local``, ``ray`` or ``slurm``.
        jobs: tasks at a time; of ``local`` more than one are processes that divide the cores.
        device: of each task.
        address: of a Ray cluster; None: on this machine.
        cpus: cores of a Ray task.
        gpus: cards of a Ray task; a fraction lets several share one.
        slurm: settings of submitit's executor, such as ``{"slurm_partition": "gpu", "timeout_min": 240}``.
    """

    engine: str = "local"
    jobs: int | None = None
    device: str = "auto"
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, executors.NAMES)
        check_count("jobs", self.jobs, optional=True)
        if self.engine != "ray" and self.address is not None:
            raise ConfigError("address is of a Ray cluster; give --engine ray too")
        if self.cpus <= 0 or self.gpus < 0:
            raise ConfigError(f"cpus is {self.cpus} and gpus {self.gpus}; give more than 0 cpus, and 0 or more gpus")

    def executor(self, store: Path, progress: bool) -> Executor:
        """Return what does the tasks."""
        if self.engine == "ray":
            return Ray(
                store, self.device, address=self.address, jobs=self.jobs, cpus=self.cpus, gpus=self.gpus
            )  # fmt: skip
        if self.engine == "slurm":
            settings = dict(self.slurm)
            cluster = str(settings.pop("cluster", "slurm"))
            return Slurm(store, self.device, jobs=self.jobs or 100, settings=settings, cluster=cluster)
        if (self.jobs or 1) == 1:
            return InProcess(store, self.device, progress)
        return Processes(store, self.device, self.jobs or 1)


@final
@dataclass(frozen=True)
class StudyRun:
    """What a call of :func:`study` has come to.

    Attributes:
        results: what is there.
        failures: task -> why it failed.
        computed: tasks that were done in this call.
        trials: what a search has tried; None where the study has none, or it is not finished.
        complete: whether nothing is missing.
    """

    __repr__ = brief

    results: Results
    failures: Mapping[str, str]
    computed: int
    trials: Trials | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.results.missing == 0


def study(
    name: str | os.PathLike[str] | Study,
    *,
    level: str | None = None,
    changes: Mapping[str, Any] | None = None,
    store: str | os.PathLike[str] = STORE,
    placing: Placing | None = None,
    minutes: float | None = None,
    progress: bool = True,
) -> StudyRun:
    """Run a study as far as it is not done, and return what it has found.

    Args:
        name: a YAML file, the name of a study that comes with the package, or a :class:`Study`.
        level: ``smoke``, ``laptop``, ``paper``, or another that the study has.
        changes: replaces settings, by dotted keys: ``{"train.epochs": 3}``.
        store: folder of trained networks and records; what is in it is never computed again.
        placing: where tasks are done; by default one after the other in this process.
        minutes: ends at a checkpoint after so many; the same call again goes on.
        progress: say what is done, and about how long the rest takes.

    Raises:
        ConfigError: something in the study is not allowed.
        Interrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM; its text says what is saved.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes is {minutes!r}; give a number above 0")
    if not isinstance(name, Study):
        name = read_study(Path(name) if isinstance(name, os.PathLike) else name, level, changes)
    where = Placing() if placing is None else placing
    plan = read_sweep(name)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    failures: dict[str, str] = {}
    computed = 0

    def work(one: Study) -> Results:
        nonlocal computed
        ledger = Ledger(one, Store(store))
        with Reporter(progress) as reporter:
            estimates = Estimates(ledger, where.device) if progress else None
            executor = where.executor(ledger.store.folder, progress)
            loop = _Loop(ledger, executor, deadline, reporter.line, estimates)
            try:
                loop.run()
            except KeyboardInterrupt as stop:
                raise Interrupted.of(stop, f"what is done is in {ledger.store.folder}") from None
        failures.update(loop.failures)
        computed += loop.computed
        return ledger.results()

    trials = None
    if plan is not None:
        trials = search(name, plan, where.jobs or 1, work)
        if trials is None:  # the time was up
            return StudyRun(Ledger(name, Store(store)).results(), failures, computed)
        name = chosen_study(name, plan, trials.chosen)
    return StudyRun(work(name), failures, computed, trials)


@final
class _Loop:
    """Begins what can be begun while there is room, and takes what has ended."""

    def __init__(
        self, ledger: Ledger, executor: Executor, deadline: float | None, say: Callable[[str], object],
        estimates: Estimates | None,
    ) -> None:  # fmt: skip
        self.ledger, self.executor, self.deadline, self.say = ledger, executor, deadline, say
        self.running: dict[str, Task] = {}
        self.failures: dict[str, str] = {}
        self.computed = 0
        self._tries: Counter[str] = Counter()
        self._later: dict[str, float] = {}
        self._left = _Left(ledger, estimates, executor.room) if estimates is not None else None

    def run(self) -> None:
        """Work until nothing can be done, or the time is up."""
        with self.executor:
            while True:
                waiting = self._begin()
                if not self.running:
                    if not waiting:
                        return
                    time.sleep(_PATIENCE)
                    continue
                for task, outcome in self.executor.ended(timeout=1.0):
                    del self.running[task.key]
                    self._take(task, outcome)

    def _seconds(self) -> float | None:
        """Return how much time is left; 0 where it is too little to begin anything, None where there is no end."""
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        return left if left > _TOO_LATE else 0.0

    def _begin(self) -> bool:
        """Begin what there is room for; tell whether something is left that another process has."""
        seconds, now = self._seconds(), time.monotonic()
        waiting = False
        if seconds == 0:
            return waiting
        begun = set()
        for task in self.ledger.ready():
            if len(self.running) >= self.executor.room:
                return waiting
            if task.key in self.running or task.key in begun or str(task) in self.failures:
                continue
            if self._later.get(task.key, 0.0) > now:
                waiting = True
                continue
            self._later.pop(task.key, None)
            if self._left is not None:
                self._left.before(task)
            self.executor.submit(task, seconds)
            self.running[task.key] = task
            begun.add(task.key)
        return waiting

    def _take(self, task: Task, outcome: Outcome) -> None:
        if outcome.state == DONE:
            self.computed += 1
            left = "" if self._left is None else self._left.after(task, outcome.seconds)
            self.say(f"{task}: done in {duration(outcome.seconds)}{left}")
        elif outcome.state == HELD:
            self._later[task.key] = time.monotonic() + _PATIENCE
        elif outcome.state == FAILED:
            self.failures[str(task)] = outcome.message
            self.say(f"{task}: failed: {outcome.message}")
        elif outcome.state == STOPPED:
            self.say(f"{task}: stopped after {duration(outcome.seconds)}, and saved")
        elif outcome.state == LOST:
            self._tries[task.key] += 1
            if self._tries[task.key] >= _TRIES:
                self.failures[str(task)] = f"its process died {_TRIES} times: {outcome.message}"
                self.say(f"{task}: failed: {self.failures[str(task)]}")
            else:
                self.say(f"{task}: its process died; it goes on in another")


@final
class _Left:
    """About how long the rest takes, from estimates that what is done corrects."""

    def __init__(self, ledger: Ledger, estimates: Estimates, room: int) -> None:
        self._ledger, self._estimates, self._room = ledger, estimates, room
        self._guessed: dict[str, float] = {}
        self._expected = self._took = 0.0

    def before(self, task: Task) -> None:
        """Guess how long a task takes that is to begin: once it is done nothing of it is left to guess by."""
        self._guess(_item(task), _title(task))

    def after(self, task: Task, seconds: float) -> str:
        """Return the words that follow on a task that is done."""
        items = list(self._ledger.missing())
        if not items:
            return ""
        self._expected += self._guess(_item(task), _title(task))
        self._took += seconds
        ratio = self._took / self._expected if self._expected > 0 else 1.0
        rest = sum(self._guess(item, _title(item)) for item in items) * ratio / self._room
        return f"; {len(items)} left, about {duration(rest)}"

    def _guess(self, item: Any, key: str) -> float:
        if key not in self._guessed:
            train = isinstance(item, RunPlan)
            self._guessed[key] = self._estimates.training(item) if train else self._estimates.cell(item)
        return self._guessed[key]


def _item(task: Task) -> Any:
    return task.run if task.kind == TRAIN else task.pair


def _title(item: Any) -> str:
    if isinstance(item, Task):
        return f"train {item.title}" if item.kind == TRAIN else item.title
    return f"train {item.title}" if isinstance(item, RunPlan) else str(item.title)
