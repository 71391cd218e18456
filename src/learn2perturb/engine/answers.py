"""What a model answers: asked in its own type and the current execution mode, checked, -inf made a number."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from learn2perturb.engine import execution
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.shapes import Images, Logits
from learn2perturb.errors import InputError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What a logit of -inf counts as (a masked class, the log of no vote at all): far below all others, and still a number.
# Differences and means of infinities are NaN; 1e9 times the largest constant of C&W is finite in float32.
LOWEST = -1e9


def own_type(model: object) -> torch.dtype | None:
    """Return the float type of the first weight of ``model``, or None where it has none or is no module."""
    if not isinstance(model, nn.Module):
        return None
    return next((weight.dtype for weight in model.parameters() if weight.dtype in _FLOATS), None)


def fitting(model: object, x: Tensor) -> Tensor:
    """Return images ``x`` in the type of the model's weights; gradients flow back in the type of ``x``."""
    dtype = own_type(model)
    return x if dtype is None or not x.is_floating_point() else x.to(dtype)


def ask(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return what ``model`` answers to ``x``, of any kind, in the current execution mode."""
    # Autograd lets nobody write into a leaf, and a model may normalise its images in place.
    images = x.clone() if x.requires_grad and x.is_leaf else x
    with execution.autocast(x.device.type):
        return model(fitting(model, images))


def plain_logits(logits: Tensor) -> Tensor:
    """Return logits as float32 at least, with -inf as a finite number below all others; NaN and inf stay."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nan_to_num(logits, nan=math.nan, posinf=math.inf, neginf=LOWEST)


def scale_of(logits: Tensor) -> float:
    """Return the largest absolute logit, masked classes left out: what rounding is a share of."""
    return float(logits.where(logits > LOWEST, 0.0).abs().max())


def logits_of(model: Callable[[Tensor], Tensor], x: Images) -> Logits:
    """Return the checked logits (N, K) of one pass, float32 at least; this waits for the device.

    Raises:
        InputError: the answer is something else, or not finite.
    """
    # A copy: a model may work on its input in place, and the next draw must see the same images.
    logits = Halving().map(lambda part: ask(model, part.clone()), x)
    check_answer(logits, len(x))
    check_finite(logits)
    return plain_logits(logits)


def check_answer(answer: object, images: int) -> None:
    """Check that a model's ``answer`` to so many images is logits (N, K).

    Raises:
        InputError: it is something else.
    """
    if not isinstance(answer, Tensor):
        first = " so that it gives its first element: lambda x: model(x)[0]" if isinstance(answer, tuple | list) else ""
        if isinstance(answer, np.ndarray | np.generic):
            first = ": l2p.black_box(function) for a function of numpy arrays"
        raise InputError(f"the model must return logits (N, K), got a {type(answer).__name__}; wrap it{first}")
    if not answer.is_floating_point():
        raise InputError(
            f"the model must return float logits, here ({images}, classes >= 2), got {answer.dtype} of shape "
            f"{tuple(answer.shape)}; return them before argmax"
        )
    if answer.ndim != 2 or answer.shape[0] != images or answer.shape[1] < 2:
        raise InputError(
            f"the model must return logits (N, K), here ({images}, classes >= 2), got {tuple(answer.shape)}; "
            "a model with one output is wrapped as torch.cat([-z, z], dim=1)"
        )


def check_finite(logits: Tensor) -> None:
    """Check the values of logits (N, K); this waits for the device.

    Raises:
        InputError: one is NaN or inf, or all of an image are -inf. A class with -inf is one that is never the answer.
    """
    if not bool((logits < math.inf).all()):
        raise InputError("the model returned NaN or infinite logits; check its weights and its input normalisation")
    if not bool((logits > -math.inf).any(dim=1).all()):
        raise InputError("the model returned -inf for every class of an image; at least one must be finite")


def check_weights(model: object) -> None:
    """Check that gradients can pass through ``model``.

    Raises:
        InputError: its weights were made in inference mode, and autograd takes none of those.
    """
    if isinstance(model, nn.Module) and any(weight.is_inference() for weight in model.parameters()):
        raise InputError(
            "the model's weights were made inside torch.inference_mode(), where autograd cannot use them; build or "
            "load the model outside of it, or take copy.deepcopy(model) there"
        )
