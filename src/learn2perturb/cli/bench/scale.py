"""One training step on one process and on several that are started here: images a second, and what is lost."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException, spawn

from learn2perturb.cli.bench.scene import Scene
from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.step import config_of
from learn2perturb.cli.bench.timing import Worker, in_turn
from learn2perturb.engine import execution
from learn2perturb.engine.ranks import joined
from learn2perturb.errors import TrainingError
from learn2perturb.progress import Reporter
from learn2perturb.training.state import Training

COUNTS = (1, 2, 4)


def measure(settings: BenchSettings, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Time the step of one training, the same whole batch on 1, 2 and 4 processes; return an object for each number.

    ``efficiency`` is the speed-up over one process by the number of processes; ``waiting_share`` what of a step the
    processes spend in sums over all of them, waiting for each other included; ``messages`` how many such sums it has;
    ``work`` the CPU time of all processes in units of that of one, which other work on the machine does not change.
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
        row["settings"] = settings.shown("scale") | {"threads": settings.threads or 1, "device": str(scene.device)}
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


def _process(rank: int, count: int, port: int, settings: BenchSettings, answers: Any) -> None:
    torch.set_num_threads(settings.threads or 1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with joined() as ranks:
        scene = Scene.of(settings)
        training = Training(
            config_of(settings, "plain", str(scene.device)), None, scene.data, None, Reporter(False), ranks
        )
        x, y = scene.first_batch()

        def call() -> None:
            with execution.running(training.mode):
                training.run_step(x, y)

        used = 0.0

        def warm() -> None:
            nonlocal used
            call()
            ranks.spent.clear()
            used = time.process_time()

        timing = in_turn({"step": Worker(call, warm)}, settings.rounds or 1, scene.device, Reporter(False), "")["step"]
        steps = len(timing.seconds)
        seconds = float(ranks.sum(torch.tensor((time.process_time() - used) / steps, dtype=torch.float64)))
        if ranks.first:
            answers.put(
                timing.summary(len(scene.data))
                | {
                    "cpu_seconds": seconds,
                    "waiting_share": sum(ranks.spent) / sum(timing.seconds),
                    "messages": len(ranks.spent) // steps,
                }
            )
