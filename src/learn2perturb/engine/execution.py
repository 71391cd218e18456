"""Execution modes: ``plain`` (eager float32, the reference) and ``fast``; parity tests compare them."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_choice
from learn2perturb.configs import ENGINES
from learn2perturb.engine import compiling, folding, memory
from learn2perturb.engine.compiler import tried_anew
from learn2perturb.errors import ConfigError


@final
@dataclass(frozen=True)
class ExecutionMode:
    """One way to run forward and backward passes.

    Attributes:
        name: ``plain``, ``fast`` or ``fast32``.
        dtype: the autocast type of convolutions and matrix products; None computes in float32.
        channels_last: lay images and convolution weights out as NHWC in memory.
        threaded_draws: draw noise on the CPU with one generator a thread.
        fused_noise: draw and add noise in one compiled pass where that is possible.
        kept_memory: keep freed memory in the process, so that tensors need no fresh pages.
        folding: fold BatchNorm into convolutions while a network in eval mode is attacked.
        folding_compiled: fold it in compiled passes, too. A GPU's compiler joins the BatchNorm to the loop after it, so
            that folding would only add a few kernels a layer.
        compiled_rows: compile the passes of an attacked network for batches of this many images; 0 compiles none.
        compiled_training: compile the training passes of such batches, too.
        recording: record a training step as a CUDA graph and replay it.
        windows: of images that differ from others in a window (see ``windows``), compute what the window reaches.
        full_passes: where few images are attacked, several targets, restarts, proposals or draws (where copies are
            draws, see ``by_row``) of each go in one pass.
        tuned_convolutions: let cuDNN try its algorithms on each new shape and keep the fastest.
    """

    name: str
    dtype: torch.dtype | None = None
    channels_last: bool = False
    threaded_draws: bool = False
    fused_noise: bool = False
    kept_memory: bool = False
    folding: bool = False
    folding_compiled: bool = True
    compiled_rows: int = 0
    compiled_training: bool = False
    recording: bool = False
    windows: bool = False
    full_passes: bool = False
    tuned_convolutions: bool = False

    def place(self, network: nn.Module) -> nn.Module:
        """Lay the weights of ``network`` out as this mode wants them; values do not change."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return network.to(memory_format=layout)  # type: ignore[call-overload]

    def place_images(self, x: Tensor) -> Tensor:
        """Lay a batch of images, (N, C, H, W), out as this mode wants it."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


PLAIN = ExecutionMode("plain")
FAST = ExecutionMode(
    "fast", dtype=torch.bfloat16, channels_last=True, threaded_draws=True, fused_noise=True, kept_memory=True,
    folding=True, windows=True, full_passes=True,
)  # fmt: skip
# On a CUDA device small networks wait for launches and memory: everything in compiled kernels, a step in one launch.
CUDA = ExecutionMode(
    "fast", dtype=torch.bfloat16, channels_last=True, folding=True, folding_compiled=False, compiled_training=True,
    recording=True, full_passes=True, tuned_convolutions=True,
)  # fmt: skip

# What computes in bfloat16 above, in float32: for processors and cards that lack it, and to see what it changes.
FAST32 = dataclasses.replace(FAST, name="fast32", dtype=None)
CUDA32 = dataclasses.replace(CUDA, name="fast32", dtype=None)

_current: contextvars.ContextVar[ExecutionMode] = contextvars.ContextVar("execution mode", default=PLAIN)


def current() -> ExecutionMode:
    """Return the execution mode that passes run in now."""
    return _current.get()


@contextlib.contextmanager
def running(mode: ExecutionMode) -> Iterator[ExecutionMode]:
    """Run all passes of the body in ``mode``."""
    token = _current.set(mode)
    tuned = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = mode.tuned_convolutions or tuned
        with tried_anew(), memory.kept() if mode.kept_memory else contextlib.nullcontext():
            yield mode
    finally:
        torch.backends.cudnn.benchmark = tuned
        _current.reset(token)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Run the passes of the body in float32: where rounding would decide what they say."""
    mode = current()
    with contextlib.nullcontext() if mode.dtype is None else running(in_full_precision(mode)):
        yield


def in_full_precision(mode: ExecutionMode) -> ExecutionMode:
    """Return ``mode`` but for the type that it computes in, which is float32: of ``fast``, ``fast32``."""
    return dataclasses.replace(mode, dtype=None, name="fast32" if mode.name == "fast" else mode.name)


# Image points of a full pass, forward and backward. On a CPU 64 images of 32 x 32: ResNet-20 on two threads takes
# 1.9 ms an image with 5, 1.2 with 21, 0.6 with 64 and no less with more. Elsewhere what is small for any card.
_POINTS = {"cpu": 2**16}
_POINTS_ELSEWHERE = 2**18


def rows_of_a_full_pass(x: Tensor) -> int:
    """Return how many images of the size of ``x`` (N, C, H, W) fill a pass, forward and backward; it may be 0."""
    return _POINTS.get(x.device.type, _POINTS_ELSEWHERE) // max(x.shape[2:].numel(), 1)


def autocast(device_type: str) -> AbstractContextManager[None]:
    """Return the autocast context of the current execution mode for passes on ``device_type``."""
    dtype = current().dtype
    if dtype is None:
        return contextlib.nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device_type, dtype=dtype)
    return context


@contextlib.contextmanager
def attacking(model: object, x: Tensor, in_eval_mode: bool) -> Iterator[int]:
    """Run the passes of the body on a model that is attacked at images ``x``, its weights being constants.

    Yields how many layers are folded.
    """
    mode = current()
    if not (in_eval_mode and mode.folding and isinstance(model, nn.Module)):
        yield 0
        return
    if len(x) == mode.compiled_rows and not mode.folding_compiled and compiling.compiles(model):
        with compiling.compiled(model, mode.compiled_rows):
            yield 0
        return
    with running(PLAIN):  # the pass that is traced must not compile anything
        folding.pairs(model, x)
    with folding.folded(model, x) as count, compiling.compiled(model, mode.compiled_rows):
        yield count


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Run the passes of a training step of the body, those of its attack among them."""
    mode = current()
    with compiling.compiled(model, mode.compiled_rows if mode.compiled_training else 0):
        yield


def has_native_bfloat16(device: torch.device) -> bool:
    """Tell whether ``device`` multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


# Below this many pixels in a whole training, the seconds that compiling costs are never earned back (measured on two
# cores: noise compiles in 4 to 15 s and saves about 1 s in 130 images of 32 x 32 on ResNet-20).
_WORTHWHILE_PIXELS = 20_000 * 32 * 32

# Compiling a whole network for its attack costs tens of seconds, and saves about a sixth of each pass: 0.1 ms an image
# of 32 x 32 on ResNet-20 and two cores. One epoch of CIFAR-10 under PGD-7, 350,000 passes, is about twice the price.
_COMPILED_PIXELS = 300_000 * 32 * 32
# The passes that train are two for seven of those, save a tenth, and cost as much to compile.
_COMPILED_TRAINING_PIXELS = 3 * _COMPILED_PIXELS


def with_compiled_attack(mode: ExecutionMode, attacked_pixels: float, rows: int) -> ExecutionMode:
    """Return ``mode`` with attacks on batches of ``rows`` images compiled, if it folds them and the work is enough."""
    return (
        dataclasses.replace(mode, compiled_rows=rows) if mode.folding and attacked_pixels >= _COMPILED_PIXELS else mode
    )


# Of the time of ``plain``, about, that the passes of an attack take: seen with ResNet-20 on CPUs, alone at work.
_PACES = {"plain": 1.0, "fast": 0.45, "fast32": 0.65}


def guessed_pace(mode: ExecutionMode) -> float:
    """Return about how long the passes of an attack take in ``mode``, in the time that they take in ``plain``."""
    return _PACES[mode.name]


def eager(mode: ExecutionMode) -> ExecutionMode:
    """Return ``mode`` without what is recorded or compiled beforehand."""
    return dataclasses.replace(mode, compiled_rows=0, compiled_training=False, recording=False)


def select(
    name: str | None, device: torch.device, *, pixels: float = math.inf, attacked_pixels: float = 0, rows: int = 0
) -> ExecutionMode:
    """Return the execution mode ``name``; ``auto`` is the faster of ``fast`` and ``fast32`` if the work is enough.

    Args:
        name: ``auto``; ``plain``; ``fast``, in bfloat16; ``fast32``, which does all but that. None is the faster of
            those in float32.
        device: where passes will run.
        pixels: the size of the work: images times their height times their width.
        attacked_pixels: those of them that attacks differentiate, once for each of their passes.
        rows: images in a batch of an attack, which its compiled passes are made for.

    Raises:
        ConfigError: the name is none of these, or not available on this device.
    """
    check_choice("engine", name, ENGINES, optional=True)
    if name is None or name == "auto":
        able = _fastest(device, allowed=("fast32",) if name is None else ("fast", "fast32"))
        name = able if pixels >= _WORTHWHILE_PIXELS else "plain"
    if name == "plain":
        return PLAIN
    if name == "fast" and not has_native_bfloat16(device):
        instead = "'fast32', 'auto' or 'plain'" if device.type in _TRIED else "'auto' or 'plain'"
        raise ConfigError(f"engine 'fast' needs bfloat16 in hardware, which {device} lacks; use {instead}")
    if device.type not in _TRIED:
        raise ConfigError(f"engine {name!r} runs on {' and '.join(_TRIED)}, not on {device}; use 'auto' or 'plain'")
    mode = with_compiled_attack(_MODES[name, device.type], attacked_pixels, rows)
    enough = mode.compiled_rows > 0 and attacked_pixels >= _COMPILED_TRAINING_PIXELS
    return dataclasses.replace(mode, compiled_training=mode.compiled_training or enough)


def _fastest(device: torch.device, allowed: Sequence[str]) -> str:
    if "fast" in allowed and has_native_bfloat16(device):
        return "fast"
    return "fast32" if device.type in _TRIED else "plain"


_MODES = {("fast", "cpu"): FAST, ("fast", "cuda"): CUDA, ("fast32", "cpu"): FAST32, ("fast32", "cuda"): CUDA32}
_TRIED = ("cpu", "cuda")
