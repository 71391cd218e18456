"""Training steps in a row on a CUDA card, as a training launches them, and the kernels they are made of.

python benchmarks/steps_on_a_card.py --model resnet20 --defense learn2perturb --kernels 20

``learn2perturb bench step`` waits for the device after each step; a training does not, so its host works ahead. Prints
JSON: milliseconds a step and those of its host for the same batch again, for the replayed graph alone, and with batches
drawn and augmented as in an epoch; seconds of compilation; kernels of one step by time.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from learn2perturb.data import ImageData
from learn2perturb.engine import compile_time, execution
from learn2perturb.progress import Reporter
from learn2perturb.runs.environment import environment
from learn2perturb.training import TrainConfig
from learn2perturb.training.recorded import WARM_UPS
from learn2perturb.training.state import Training

EPOCHS = 100_000  # so long that whatever the fast mode compiles is earned back


def random_images(count: int = 50_000) -> ImageData:
    """Return a set of the size of CIFAR-10's."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    names, half = tuple(map(str, range(10))), (0.5,) * 3
    return ImageData("random", pixels, labels, names, flip=True, crop_padding=4, mean=half, std=half)


def in_a_row(call: Callable[[], object], times: int) -> dict[str, float]:
    """Return milliseconds a call: until the device is done, and until the host is."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return {"step": (time.perf_counter() - start) / times * 1e3, "host": host / times * 1e3}


def kernels_of(call: Callable[[], object], most: int) -> list[tuple[str, float, int]]:
    """Return name, microseconds and launches of the kernels of one call, those that take longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total
            counts[event.name] += 1
    return [(name[:100], round(microseconds), counts[name]) for name, microseconds in times.most_common(most)]


def measure(defense: str, model: str, sharing: str, steps: int, kernels: int) -> dict[str, Any]:
    """Return what was measured of one training's step."""
    options = {"noise_delay": 0, "sharing": sharing} if defense == "learn2perturb" else {}
    config = TrainConfig(
        defense=defense, model=model, recipe="fast", epochs=EPOCHS, batch_size=128, monitor=0, device="cuda",
        engine="fast", options=options,
    )  # fmt: skip
    training = Training(config.resolve(), None, random_images(), None, Reporter(False))
    batches = training.source.epoch(0)
    x, y = next(batches)
    with execution.running(training.mode):
        for _ in range(WARM_UPS + 2):
            training.run_step(x, y)
        assert training.recorded is not None
        replays = [known.replay for known in training.recorded._known.values() if known.replay is not None]
        result: dict[str, Any] = {
            "recorded": bool(replays),
            "compile_seconds": compile_time.seconds_spent(),
            "same_batch_ms": in_a_row(lambda: training.run_step(x, y), steps),
            "epoch_ms": in_a_row(lambda: training.run_step(*next(batches)), steps),
        }
        if replays:
            result["replay_ms"] = in_a_row(replays[0], steps)
        if kernels:
            result["kernels"] = kernels_of(lambda: training.run_step(x, y), kernels)
    return result | {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "environment": environment(training.device),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", default="learn2perturb")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--sharing", default="per_example", help="of Learn2Perturb's draws")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kernels", type=int, default=0, help="list so many kernels")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; learn2perturb bench step measures a CPU", file=sys.stderr)
        return 2
    print(json.dumps(measure(**vars(given)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
