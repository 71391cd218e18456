"""Training steps recorded and replayed: what is filled in between, when a recording is stale, and what NaN does."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.defenses import Losses
from learn2perturb.engine.recording import Recorder, Replay
from learn2perturb.training.alternating import Iteration, Optimizers

# Steps of a kind that are run before one is recorded.
WARM_UPS = 3
# A kind of step may be recorded anew when the schedule changes it, but a run must not spend itself on recording.
_MOST_RECORDINGS = 64

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

Step = Callable[[Tensor, Tensor, Tensor | float], Iteration]


def prepare(optimizers: Optimizers, device: torch.device) -> bool:
    """Let optimisers read their learning rate from a tensor, in one fused kernel; tell whether all of them can."""
    if not all(type(optimizer) in _FUSED for optimizer in optimizers.values()):
        return False
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["fused"], group["foreach"] = True, False
            if "capturable" in group:  # Adam counts its steps: on the device, where a graph is to count them
                group["capturable"] = device.type == "cuda"
    return True


def set_rate(group: dict[str, Any], value: float) -> None:
    """Set the learning rate of a parameter group, in the tensor that recorded steps read if there is one."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


@final
class NaNGuard:
    """A flag on the device: once a loss is not finite, fused optimisers make no further update. Read now and then."""

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)

    def watch(self, optimizers: Optimizers) -> None:
        """Let the flag hold these optimisers back (the way a gradient scaler does)."""
        for optimizer in optimizers.values():
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    @torch.no_grad()
    def check(self, losses: Losses) -> None:
        """Raise the flag if the loss is not finite; this does not wait for the device."""
        self.flag.logical_or_(~torch.isfinite(losses.total.detach()))

    def raised(self) -> bool:
        """Tell whether a loss was not finite; this waits for the device."""
        return bool(self.flag.item())


@final
@dataclass
class _Recording:
    """One kind of step: the tensors that a replay reads, what it runs, and where it leaves its results."""

    x: Tensor
    y: Tensor
    weight: Tensor
    runs: int = 0
    replay: Replay | None = None
    iteration: Iteration | None = None


@final
class RecordedSteps:
    """Runs steps: the first of a kind as they are, then recorded ones."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._known: dict[Hashable, _Recording] = {}
        self.usable = True

    def run(self, key: Hashable | None, x: Tensor, y: Tensor, weight: float, step: Step) -> Iteration:
        """Run ``step`` on a batch.

        Args:
            key: what the step depends on beside its tensors; None is never recorded.
            x: images (N, C, H, W).
            y: labels (N,).
            weight: of the regulariser, the one number that schedules move; a recorded step gets it as a tensor.
            step: maps images, labels and weight to what it did; no synchronisation, no number of the clock in it.
        """
        if key is None or not self.usable:
            return step(x, y, weight)
        key = (key, tuple(x.shape), x.stride())
        if key not in self._known:
            if len(self._known) >= _MOST_RECORDINGS:
                self._known.pop(next(iter(self._known)))  # the oldest; schedules do not come back
            self._known[key] = _Recording(x.clone(), y.clone(), torch.zeros((), device=x.device))
        recording = self._known[key]
        recording.x.copy_(x)
        recording.y.copy_(y)
        recording.weight.fill_(weight)
        if recording.replay is None and recording.runs >= WARM_UPS:
            self._record(recording, step)
        if recording.replay is not None and recording.iteration is not None:
            recording.replay()
            return recording.iteration
        return self._warm_up(recording, step)

    def _warm_up(self, recording: _Recording, step: Step) -> Iteration:
        results: list[Iteration] = []
        self._recorder.warm_up(lambda: results.append(step(recording.x, recording.y, recording.weight)))
        recording.runs += 1
        return results[0]

    def _record(self, recording: _Recording, step: Step) -> None:
        def recorded() -> None:
            done = step(recording.x, recording.y, recording.weight)
            # Without its graph, whose tensors would keep memory from the next recording.
            losses = dataclasses.replace(done.losses, total=done.losses.total.detach())
            recording.iteration = dataclasses.replace(done, losses=losses)

        try:
            recording.replay = self._recorder.record(recorded)
        except Exception as error:  # a device may refuse for any reason, and training can go on without
            self.usable = False
            recording.replay = None
            warnings.warn(
                f"the training step cannot be recorded here ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:120]}); it is launched kernel by kernel, which is slower",
                stacklevel=4,
            )
