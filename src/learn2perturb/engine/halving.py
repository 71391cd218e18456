"""Work on a batch in parts that fit into memory: halved where it runs out, said aloud, and kept so for what follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar, final

import torch
from torch import Tensor

from learn2perturb.errors import ElsewhereError, MemoryLimitError

T = TypeVar("T")
# What torch says on the CPU (Linux, Windows), on CUDA and on MPS; the CPU has no error class of its own.
_SAID = ("can't allocate memory", "not enough memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` says that memory ran out, on whatever device."""
    if isinstance(error, ElsewhereError):  # whose memory it was does not matter here
        return False
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


@final
class Halving:
    """Rows at a time that fit; None until memory has run out."""

    def __init__(self) -> None:
        self.rows: int | None = None

    def run(self, work: Callable[[slice], T], count: int) -> list[T]:
        """Return what ``work`` gives for the parts of ``count`` rows, in their order: one part if all fits.

        ``work`` must not depend on what a failed call of it has left, such as the state of random generators.

        Raises:
            MemoryLimitError: a single row does not fit.
        """
        found: list[T] = []
        done = 0
        while not found or done < count:
            rows = min(self.rows or count, count - done)
            try:
                found.append(work(slice(done, done + rows)))
                done += rows
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._halve(rows, error)
        return found

    def map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return the rows that ``function`` gives for the rows of ``tensors``; where all fits, in one call."""
        count = len(tensors[0])

        def part(rows: slice) -> Tensor:
            whole = rows.start == 0 and rows.stop == count
            return function(*(tensors if whole else (tensor[rows] for tensor in tensors)))

        parts = self.run(part, count)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _halve(self, rows: int, error: Exception) -> None:
        if rows == 1:
            raise MemoryLimitError(
                f"out of memory with a single image ({str(error)[:100]}); free memory, or give another device"
            ) from None
        self.rows = (rows + 1) // 2
        warnings.warn(
            f"out of memory with {rows} images in a pass: going on with {self.rows}; a smaller batch size avoids this",
            stacklevel=4,
        )
