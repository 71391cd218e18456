"""Runs taken in turn in one process: what else the machine does then falls on all of them alike."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch

from learn2perturb.progress import Reporter

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@final
@dataclass(frozen=True)
class Worker:
    """Something to time.

    Attributes:
        run: one counted run.
        warm: what is run once before, timed apart: it compiles and allocates; None runs ``run``.
    """

    run: Callable[[], object]
    warm: Callable[[], object] | None = None


@final
@dataclass(frozen=True)
class Timing:
    """What the runs of one worker took.

    Attributes:
        warmup: seconds of the first call, compilation included.
        seconds: of each counted run.
        peak: most bytes of memory in use at once in any of its runs, the first included.
    """

    warmup: float
    seconds: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """The median of the counted runs."""
        return statistics.median(self.seconds)

    def summary(self, images: int) -> dict[str, Any]:
        """Return the numbers of a run over ``images`` images."""
        return {
            "seconds": self.median,
            "images_per_second": images / self.median,
            "milliseconds": 1000 * self.median,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "rounds": len(self.seconds),
            "warmup_seconds": self.warmup,
            "peak_memory_bytes": self.peak,
        }

    def ratio_to(self, other: Timing) -> float:
        """Return how many times faster this is than ``other``: the median over rounds, each its own pair."""
        return statistics.median(theirs / own for theirs, own in zip(other.seconds, self.seconds, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: then the peak is that of the whole process
        _CLEAR.write_text("5", encoding="ascii")


def _peak(device: torch.device) -> int:
    """Return the high-water mark of memory since :func:`_forget_peak`: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


Key = TypeVar("Key", bound=Hashable)


def in_turn(
    workers: Mapping[Key, Worker], rounds: int, device: torch.device, reporter: Reporter, label: str
) -> dict[Key, Timing]:
    """Run each worker once to warm it up, then ``rounds`` times each, in turn."""
    warmups: dict[Key, float] = {}
    times: dict[Key, list[float]] = {key: [] for key in workers}
    peaks = dict.fromkeys(workers, 0)
    done, total = 0, len(workers) * (rounds + 1)
    for turn in range(rounds + 1):
        for key, worker in workers.items():
            reporter(done, total, label)
            call = worker.warm if turn == 0 and worker.warm is not None else worker.run
            _forget_peak(device)
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds = time.perf_counter() - start
            peaks[key] = max(peaks[key], _peak(device))
            if turn:
                times[key].append(seconds)
            else:
                warmups[key] = seconds
            done += 1
    reporter(done, total, label)
    return {key: Timing(warmups[key], tuple(times[key]), peaks[key]) for key in workers}


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` CPU threads for the body; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
