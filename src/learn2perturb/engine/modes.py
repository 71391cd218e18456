"""Modes of a network and of torch, set for a while and given back as they were."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from learn2perturb.engine.compiler import tried_anew
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import InputError


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Run the body, or as a decorator a function, as if the caller were in no mode of torch.

    A caller's ``no_grad`` and ``inference_mode`` would take away the gradients of attacks, and his ``autocast`` would
    compute in another type than the record says; on a card, float32 is float32. What failed to compile for
    somebody else is tried anew.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(tried_anew())
        if torch.cuda.is_available():
            stack.enter_context(full_float32())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products on a card in float32 for the body, not in TF32.

    TF32, cuDNN's default, rounds operands to 10 bits. torch has two sets of switches, and refuses to read the older one
    once the newer has been used.
    """
    places: list[tuple[Any, str, Any]] = []
    try:
        places = [(b, "allow_tf32", b.allow_tf32) for b in (torch.backends.cudnn, torch.backends.cuda.matmul)]
    except RuntimeError:
        cudnn: Any = torch.backends.cudnn
        newer = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
        places = [(b, "fp32_precision", b.fp32_precision) for b in newer]
    try:
        for backend, switch, before in places:
            setattr(backend, switch, "ieee" if isinstance(before, str) else False)
        yield
    finally:
        for backend, switch, before in places:
            setattr(backend, switch, before)


@contextlib.contextmanager
def one_image_explained(images: int) -> Iterator[None]:
    """Say in our words that a batch of one image cannot go through a BatchNorm in train mode.

    Raises:
        InputError: torch has said so.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"a batch of {images} cannot go through the model in train mode: a BatchNorm sees one number a channel, of "
            "which there is no variance; give batches of at least two images"
        ) from error


def blind_to_one_image(model: nn.Module, image: torch.Tensor) -> bool:
    """Tell whether a BatchNorm of ``model`` sees one number a channel of a batch of one image (1, C, H, W).

    Such a network cannot train on one image. It is looked at in eval mode, in which nothing moves.
    """
    found = False

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal found
        found |= inputs[0].numel() == inputs[0].shape[1]

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [module.register_forward_pre_hook(look) for module in norms]
    try:
        if norms:
            with isolated_rng(), in_mode(model, False), torch.no_grad():
                model(image)
    except Exception:  # whatever is wrong with the network is said when it is tried on images
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def in_mode(model: object, training: bool | None) -> Iterator[None]:
    """Put every submodule of ``model`` in train or eval mode for the body, then each back in its own, also on failure.

    None leaves the modes as they are, and so does a model that is no module. Modules whose mode was decided when they
    were made (of ``torch.export``, ``torch.jit.freeze``) keep it, and so do :func:`live_dropouts` in eval mode.
    """
    modules = switchable(model)
    flags = [module.training for module in modules]
    live = [] if training else live_dropouts(model)
    try:
        if modules and training is not None and any(flag != training for flag in flags):
            _switch(modules[0], training)
            for module in live:
                module.training = True
        yield
    finally:
        # From the root down and by train(), not by the flag alone: some modules work there (they merge weights).
        for module, flag in zip(modules, flags, strict=True):
            if module.training != flag:
                _switch(module, flag)
                module.training = flag


def live_dropouts(model: object) -> list[nn.Module]:
    """Return the dropouts that are in train mode inside a model in eval mode: that is done on purpose, for draws.

    So Monte Carlo dropout is switched on. In a model that is in train mode itself there are none: nothing was meant.
    """
    modules = switchable(model)
    if not modules or modules[0].training:
        return []
    return [module for module in modules if isinstance(module, _DropoutNd) and module.training]


@contextlib.contextmanager
def dropouts_off(model: object) -> Iterator[None]:
    """Switch the :func:`live_dropouts` of ``model`` off for the body."""
    live = live_dropouts(model)
    try:
        for module in live:
            module.training = False  # not by eval(), which a dropout for Monte Carlo may override
        yield
    finally:
        for module in live:
            module.training = True


def switchable(model: object) -> list[nn.Module]:
    """Return the submodules of ``model``, itself first, that have a mode and can be put in another."""
    # A frozen module has no mode. An exported one has a train() of its own, which raises; what is inside has no say.
    exported = isinstance(model, fx.GraphModule) and "train" in vars(model)
    if not isinstance(model, nn.Module) or exported or not hasattr(model, "training"):
        return []
    return list(dict.fromkeys([model, *itertools.chain.from_iterable(map(switchable, model.children()))]))


def _switch(module: nn.Module, training: bool) -> None:
    try:
        module.train(training)
    except NotImplementedError:  # something exported lies within: what is around it is switched without it
        for child in module.children():
            if switchable(child):
                _switch(child, training)
