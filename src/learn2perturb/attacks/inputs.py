"""What attacks want of images and labels, said before any pass is made."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from learn2perturb.errors import InputError

TOLERANCE = 1e-6  # of pixel values and distances: float32 rounding, far below 1/255


def check_images(model: Any, x: Any, y: Any) -> None:
    """Raise InputError unless ``model`` is callable and ``x`` and ``y`` are what attacks want."""
    check_pixels(model, x)
    _check_labels(x, y)


def check_pixels(model: Any, x: Any) -> None:
    """Raise InputError unless ``model`` is callable and ``x`` are images."""
    if not callable(model):
        raise InputError(f"model must be callable, mapping images to logits, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    if x.dtype not in (torch.float32, torch.float64):
        fix = "x.float() / 255 makes bytes into images in [0, 1]" if x.dtype == torch.uint8 else "use x.float()"
        raise InputError(f"x must be float32 or float64, got {x.dtype}; {fix} (the model may cast it)")
    if x.ndim != 4:
        raise InputError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}; one image is x.unsqueeze(0)")
    if x.numel() == 0:
        raise InputError(f"x is empty, shape {tuple(x.shape)}; give at least one image, or leave out the empty batch")
    lowest, highest = (bound.item() for bound in torch.aminmax(x.detach()))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise InputError("x holds NaN or infinite values; all pixels must be finite and in [0, 1]")
    if lowest < -TOLERANCE or highest > 1 + TOLERANCE:
        raise InputError(
            f"x must be in [0, 1], got values from {lowest:.4g} to {highest:.4g}; divide bytes by 255 and put the "
            "normalisation into the model"
        )


def _check_labels(x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor):
        raise InputError(f"y must be a torch.Tensor, got {type(y).__name__}; use torch.as_tensor(y)")
    if y.dtype != torch.int64:
        raise InputError(f"y must be int64 class numbers, got {y.dtype}; use y.long(), or y.argmax(dim=1) if one-hot")
    if y.shape != x.shape[:1]:
        raise InputError(f"y must have shape ({len(x)},), one label an image, got {tuple(y.shape)}")
    if y.device != x.device:
        raise InputError(f"x is on {x.device} but y on {y.device}; use y.to(x.device)")


def check_classes(y: Tensor, classes: int) -> None:
    """Raise InputError unless all labels are classes of a model that has ``classes``."""
    lowest, highest = (bound.item() for bound in torch.aminmax(y))
    if lowest < 0 or highest >= classes:
        raise InputError(
            f"y must be in 0..{classes - 1} (the model has {classes} classes), got values from {lowest} to {highest}"
        )
