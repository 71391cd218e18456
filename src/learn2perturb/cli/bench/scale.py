"""One training step on one process and on several that are started here: images a second, and what is lost."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from operator import truediv
from statistics import median
from typing import Any, final

import torch
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import ProcessException, spawn

from learn2perturb.cli.bench.scene import Scene
from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.step import config_of
from learn2perturb.cli.bench.timing import Worker, in_turn
from learn2perturb.engine import execution
from learn2perturb.engine.ranks import ALONE, Ranks, joined
from learn2perturb.errors import TrainingError
from learn2perturb.progress import Reporter
from learn2perturb.training.state import Training

COUNTS = (1, 2, 4)


def measure(settings: BenchSettings, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Time the step of one training, the same whole batch on 1, 2 and 4 processes; return an object for each number.

    The step is run in the fastest execution mode of this machine, as a long training is, and compiled nowhere.
    ``efficiency`` is the speed-up over one process by the number of processes; ``waiting_share`` what of a step the
    processes spend in sums over all of them, waiting for each other included; ``messages`` how many such sums it has;
    ``work`` the CPU time of all processes in units of that of one, which other work on the machine changes least.
    ``overhead`` is what of the CPU time is distribution itself, as a share: against as many processes at once that do
    the same rows apart, in turn with the others; ``slower`` is the same of seconds, waiting for each other included.
    """
    scene = Scene.of(settings)
    where = scene.where()
    found: dict[str, dict[str, Any]] = {}
    for number, count in enumerate(COUNTS):
        reporter(number, len(COUNTS), "processes")
        found[f"{count} processes" if count > 1 else "1 process"] = _timed(settings, count)
    alone = found["1 process"]["images_per_second"]
    for count, row in zip(COUNTS, found.values(), strict=True):
        row["work"] = row["cpu_seconds"] / found["1 process"]["cpu_seconds"]
        row["efficiency"] = row["images_per_second"] / alone / count
        row["settings"] = settings.shown("scale") | {
            "threads": settings.threads or 1, "device": str(scene.device), "engine": scene.fastest,
        }  # fmt: skip
        row["environment"] = where
    return found


def _timed(settings: BenchSettings, count: int) -> dict[str, Any]:
    """Return what the first of ``count`` new processes has measured.

    Raises:
        TrainingError: one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    try:
        spawn(_process, (count, port, settings, answers), nprocs=count)
    except ProcessException as error:
        last = str(error).strip().splitlines()[-1][:300]
        raise TrainingError(f"a step on {count} processes failed ({last}); give a smaller --batch-size") from None
    answer: dict[str, Any] = answers.get()
    return answer


@final
class _Metered:
    """A step that all processes begin together, and what it took in each call: seconds, CPU seconds of all of them."""

    def __init__(self, training: Training, x: Tensor, y: Tensor, ranks: Ranks) -> None:
        self._training, self._x, self._y, self._ranks = training, x, y, ranks
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.waiting: list[float] = []

    def __call__(self) -> None:
        ranks = self._ranks
        ranks.largest(0)
        ranks.spent.clear()
        used, start = time.process_time(), time.perf_counter()
        with execution.running(self._training.mode):
            self._training.run_step(self._x, self._y)
        self.seconds.append(time.perf_counter() - start)
        used, self.messages = time.process_time() - used, len(ranks.spent)
        self.waiting.append(sum(ranks.spent))
        self.cpu.append(float(ranks.sum(torch.tensor(used, dtype=torch.float64))))

    def forget_first(self) -> None:
        """Leave out the first call, which warms up."""
        del self.seconds[0], self.cpu[0], self.waiting[0]


def _process(rank: int, count: int, port: int, settings: BenchSettings, answers: Any) -> None:
    torch.set_num_threads(settings.threads or 1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with joined() as ranks:
        scene = Scene.of(settings)
        config = config_of(settings, scene.fastest, str(scene.device))
        x, y = scene.first_batch()
        share = ranks.share(len(y))

        def metered(own: Ranks, x: Tensor, y: Tensor) -> _Metered:
            training = Training(config, None, scene.data, None, Reporter(False), own)
            training.mode = execution.eager(training.mode)  # what several processes cannot have shall one not have
            return _Metered(training, training.mode.place_images(x), y, ranks)

        steps = {"together": metered(ranks, x, y)}
        if count > 1:  # the same rows in as many processes at once, which know nothing of each other
            steps["apart"] = metered(ALONE, share.of(x), share.of(y))
        workers = {name: Worker(step) for name, step in steps.items()}
        timing = in_turn(workers, settings.rounds or 1, scene.device, Reporter(False), "")["together"]
        for step in steps.values():
            step.forget_first()
        together, apart = steps["together"], steps.get("apart", steps["together"])
        if ranks.first:
            answers.put(
                replace(timing, seconds=tuple(together.seconds)).summary(len(scene.data))
                | {
                    "cpu_seconds": median(together.cpu),
                    "overhead": median(map(truediv, together.cpu, apart.cpu)) - 1,
                    "slower": median(map(truediv, together.seconds, apart.seconds)) - 1,
                    "waiting_share": sum(together.waiting) / sum(together.seconds),
                    "messages": together.messages,
                }
            )
