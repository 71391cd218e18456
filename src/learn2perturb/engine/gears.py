"""The gears of the engine: ``plain`` (eager float32, the reference) and ``fast``, held together by parity tests."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from learn2perturb.engine import folding
from learn2perturb.errors import ConfigError


@dataclass(frozen=True)
class Gear:
    """One way to run passes.

    Attributes:
        name: ``plain`` or ``fast``.
        dtype: the autocast type of convolutions and matrix products; None computes in float32.
        channels_last: lay images and convolution weights out as NHWC in memory.
        threaded_draws: draw noise on the CPU with one generator a thread.
        fused_noise: draw and add noise in one compiled pass where that is possible.
        folding: fold BatchNorm into convolutions while a network in eval mode is attacked.
    """

    name: str
    dtype: torch.dtype | None = None
    channels_last: bool = False
    threaded_draws: bool = False
    fused_noise: bool = False
    folding: bool = False

    def place(self, network: nn.Module) -> nn.Module:
        """Lay the weights of ``network`` out as this gear wants them; values do not change."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return network.to(memory_format=layout)  # type: ignore[call-overload]

    def place_images(self, x: Tensor) -> Tensor:
        """Lay a batch of images, (N, C, H, W), out as this gear wants it."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


PLAIN = Gear("plain")
FAST = Gear("fast", dtype=torch.bfloat16, channels_last=True, threaded_draws=True, fused_noise=True, folding=True)

_current: contextvars.ContextVar[Gear] = contextvars.ContextVar("gear", default=PLAIN)


def current() -> Gear:
    """Return the gear that passes run in now."""
    return _current.get()


@contextlib.contextmanager
def running(gear: Gear) -> Iterator[Gear]:
    """Run all passes of the body in ``gear``."""
    token = _current.set(gear)
    try:
        yield gear
    finally:
        _current.reset(token)


def autocast(device_type: str) -> AbstractContextManager[None]:
    """Return the autocast context of the current gear for passes on ``device_type``."""
    dtype = current().dtype
    if dtype is None:
        return contextlib.nullcontext()
    context: AbstractContextManager[None] = torch.autocast(device_type, dtype=dtype)
    return context


def attacking(model: object, x: Tensor, in_eval_mode: bool) -> AbstractContextManager[object]:
    """Return the context in which a model is attacked at images ``x``, its weights being constants."""
    if in_eval_mode and current().folding and isinstance(model, nn.Module):
        with running(PLAIN):  # the pass that is traced must not compile anything
            folding.pairs(model, x)
        return folding.folded(model, x)
    return contextlib.nullcontext()


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


def select(name: str, device: torch.device, *, pixels: float = math.inf) -> Gear:
    """Return the gear called ``name``; ``auto`` is ``fast`` where the hardware has bfloat16 and the work is enough.

    ``pixels`` is the size of that work: images times their height times their width.

    Raises:
        ConfigError: the name is not ``auto``, ``plain`` or ``fast``, or ``fast`` is not to be had on this device.
    """
    if name not in ("auto", "plain", "fast"):
        raise ConfigError(f"engine is {name!r}; allowed: auto, plain, fast")
    if name == "plain":
        return PLAIN
    native = has_native_bfloat16(device)
    if native and (name == "fast" or pixels >= _WORTHWHILE_PIXELS):
        return FAST
    if name == "fast":
        raise ConfigError(f"engine 'fast' needs bfloat16 in hardware, which {device} lacks; use 'auto' or 'plain'")
    return PLAIN
