"""A step recorded once and replayed with a single launch: CUDA graphs.

A replay runs the recorded kernels on the recorded memory. So what changes from step to step must lie in tensors that
are filled in between (images, labels, learning rate, tau), and nothing in the step may wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """What records; the tests have one of their own that runs on the CPU."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run ``step`` for real: a recording needs workspaces, momenta and compiled code to be there."""

    def record(self, step: Callable[[], None]) -> Replay:
        """Record ``step`` without running it; return what runs it, again and again."""


@final
class CudaGraphs:
    """Records on a CUDA device. Random numbers are fresh in every replay: they follow the default generator's seed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run ``step`` on a stream of its own, on which autograd's first passes must not be recorded."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            step()
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def record(self, step: Callable[[], None]) -> Replay:
        """Record ``step`` in a pool of memory that all recordings share: they are replayed one at a time."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side):
            step()
        return graph.replay
