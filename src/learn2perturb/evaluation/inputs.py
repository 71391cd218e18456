"""What is wrong with a model before any check is run: found, named, with a fix."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor, nn

from learn2perturb.engine.answers import scale_of
from learn2perturb.engine.modes import live_dropouts, switchable
from learn2perturb.engine.random import derive_seed, seed_everything
from learn2perturb.errors import InputError
from learn2perturb.evaluation.passes import PROBABILITIES, Model, are_probabilities, checked_logits, passes_differ
from learn2perturb.evaluation.replays import BY_ROW, SEEDS, replayed
from learn2perturb.noise import noise_disabled
from learn2perturb.noise.base import NoiseModule

_IMAGES = 8
# Of logits, against rounding: a batch of another size is summed in another order. Batch statistics change far more.
_TOLERANCE = 1e-3
_LARGEST = 1e6  # of a logit: -inf, or what stands for it, makes no difference large enough to pass


def in_train_mode(model: Model) -> list[str]:
    """Return the names of the submodules of ``model`` that are in train mode where that is no way to draw noise."""
    if not isinstance(model, nn.Module):
        return []
    known = set(switchable(model)) - set(live_dropouts(model))
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if module in known and module.training and not isinstance(module, NoiseModule)
    ]


def check_fixed(model: Model, x: Tensor, seed: int) -> list[str]:
    """Check that ``model`` (in eval mode) is a fixed function of an image; return what could not be checked.

    Raises:
        InputError: it stays in train mode, changes its own buffers in a pass, seeds the generators, or answers
            differently in another batch: no number of it would mean anything.
    """
    reason = replay_of(model, x, seed)
    if reason in (SEEDS, BY_ROW):
        raise InputError(
            f"{reason}: its draws are replayed, and votes or averages over them count one draw many times; draw noise "
            "without seeding"
        )
    return check_batches(model, x, seed)


def replay_of(model: Model, x: Tensor, seed: int) -> str:
    """Return how the draws of ``model`` (in eval mode) are replayed, or nothing; of its noise, not of this package's.

    Raises:
        InputError: it stays in train mode, or changes its own buffers in a pass.
    """
    still = in_train_mode(model)
    if still:
        raise InputError(
            f"the model stays in train mode after eval() ({_shown(still)}), so its answers depend on the batch; do not "
            "override train() or set .training inside forward()"
        )
    _check_buffers(model, x[:_IMAGES])
    with _quiet(model):
        return replayed(model, x[:_IMAGES], seed)


def check_batches(model: Model, x: Tensor, seed: int) -> list[str]:
    """Check that the answer of ``model`` does not change with the batch; return what could not be checked.

    Raises:
        InputError: it does.
    """
    x = x[:_IMAGES]
    with _quiet(model):
        if not passes_differ(model, x, seed):
            _check_batch_size(model, x)
            return []
    return [
        "whether the answer depends on the batch was not checked: the model draws noise that is none of this package's"
    ]


def warn_of_probabilities(model: Model, x: Tensor, seed: int) -> list[str]:
    """Warn, and say so in the findings, if ``model`` gives probabilities where attacks need logits."""
    seed_everything(seed, "probe", 0)
    with torch.no_grad():
        if not are_probabilities(checked_logits(model, x[:_IMAGES])):
            return []
    warnings.warn(PROBABILITIES, stacklevel=3)
    return [PROBABILITIES]


def _quiet(model: Model) -> contextlib.AbstractContextManager[object]:
    return noise_disabled(model) if isinstance(model, nn.Module) else contextlib.nullcontext()


def _check_buffers(model: Model, x: Tensor) -> None:
    """Refuse a model one pass of which changes its buffers."""
    moved = _moved_buffers(model, x)
    if moved:
        raise InputError(
            f"a pass in eval mode changes buffers of the model ({_shown(moved)}): test images would move its "
            "statistics; freeze them (BatchNorm in eval mode uses its running statistics and leaves them alone)"
        )


def _moved_buffers(model: Model, x: Tensor) -> list[str]:
    """Return the names of the buffers that one pass changes; they are put back."""
    buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    if not buffers:
        return []
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with torch.no_grad():
        checked_logits(model, x)
        moved = [name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])]
        for name in moved:
            buffers[name].copy_(before[name])
    return moved


def peculiarities(model: Model, x: Tensor, seed: int) -> list[str]:
    """Return, after warning, why a score of ``model`` (in eval mode) is not one of single images; for the record."""
    found = []
    moved = _moved_buffers(model, x)
    if moved:
        found.append(
            f"a pass in eval mode changes buffers of the model ({_shown(moved)}), so the score depends on the images "
            "before; freeze them"
        )
    elif _depends_on_companions(model, x[:_IMAGES], seed):
        found.append(
            "the model's answer for an image depends on the other images of its batch (batch statistics in eval "
            "mode?), so this score holds for this batch size and order only; give it running statistics"
        )
    for text in found:
        warnings.warn(text, stacklevel=5)  # whoever called evaluate
    return found


def _depends_on_companions(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether an image is answered otherwise beside other images, or in a smaller batch; noise is switched off.

    Of a model with noise that is none of ours it is not known, and so of one that takes no other batch than its own.
    """
    half = x[: _IMAGES // 2] if len(x) > 1 else torch.cat([x, 1 - x])
    try:
        with _quiet(model), torch.no_grad():
            if passes_differ(model, half, derive_seed(seed, "companions")):
                return False
            first = checked_logits(model, torch.cat([half, half]))[: len(half)]
            others = [checked_logits(model, torch.cat([half, 1 - half / 2]))[: len(half)], checked_logits(model, half)]
    except Exception:  # a stranger's model may raise anything at a batch that is not its own
        return False
    allowed = _TOLERANCE * (1 + first.abs().amax(dim=1, keepdim=True).clamp_max(_LARGEST))
    return any(bool((torch.nan_to_num(first - other).abs() > allowed).any()) for other in others)


def _check_batch_size(model: Model, x: Tensor) -> None:
    if _depends_on_companions(model, x, 0):
        raise InputError(
            "the model's answer changes with the batch size, or changes with the other images of its batch; is a "
            "BatchNorm inside in train mode, or without running statistics, or a generator seeded from the batch? give "
            "the network itself, in eval mode"
        )
    with torch.no_grad():
        together = checked_logits(model, x)
        alone = torch.cat([checked_logits(model, image) for image in x.split(1)])
    difference = float((together - alone).abs().max())
    allowed = _TOLERANCE * (1 + scale_of(together))
    if difference > allowed:
        raise InputError(
            f"the model's answer changes with the batch size: logits of images alone and in a batch of {len(x)} differ "
            f"by {difference:.3g} (rounding explains {allowed:.1g}); is a BatchNorm inside in train mode, or without "
            "running statistics, or a generator seeded from the batch? give the network itself, in eval mode"
        )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
