"""Train and eval mode of a network, set for a while and given back to every submodule as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import InputError


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

    None leaves the modes as they are, and so does a model that is no module.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        if modules and training is not None and any(flag != training for flag in flags):
            modules[0].train(training)
        yield
    finally:
        # From the root down and by train(), not by the flag alone: some modules work there (they merge weights).
        for module, flag in zip(modules, flags, strict=True):
            if module.training != flag:
                module.train(flag)
                module.training = flag
