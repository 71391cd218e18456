"""Augmentation of the user's choice: transforms of torchvision by name, or any function of an image."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.engine.libraries import library
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError, UnknownNameError
from learn2perturb.plugins import working_folder_first
from learn2perturb.presets import parse_attack

Transform = Callable[[Any], Any]
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# A plus before a name: that of 1e+3 stays.
_BETWEEN = re.compile(r"\s*\+\s*(?=[A-Za-z_])")


@final
@dataclass(frozen=True)
class Transforms:
    """Transforms of an image, one after the other: uint8 (C, H, W) to an image of the same shape.

    Each batch is a function of (seed, epoch, batch), whatever torch, numpy or ``random`` a transform draws from.

    Args:
        text: ``RandomRotation:degrees=10 + RandomErasing:p=0.5`` (of ``torchvision.transforms.v2``), or
            ``module:function`` of the user's.

    Raises:
        ConfigError: a transform is unknown, or refuses its settings.
    """

    text: str
    steps: tuple[tuple[str, Transform], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ConfigError(f"transforms is {self.text!r}; write RandomRotation:degrees=10, or module:function")
        parts = [part.strip() for part in _BETWEEN.split(self.text.strip())]
        object.__setattr__(self, "steps", tuple((part, _built(part)) for part in parts))

    def __call__(self, images: Tensor, *seeds: int | str) -> Tensor:
        """Return images (N, C, H, W), each transformed by itself, float in [0, 1] or uint8.

        Raises:
            InputError: a transform fails, or gives no such image.
        """
        with isolated_rng():
            seed_everything(*seeds)
            return torch.stack([self._one(image) for image in images])

    def _one(self, image: Tensor) -> Tensor:
        shape, device = image.shape, image.device
        for name, transform in self.steps:
            try:
                # A copy: one that works in place must not reach the set.
                image = transform(image.clone())
            except Learn2PerturbError:
                raise
            except Exception as error:  # a stranger's code may raise anything
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise InputError(f"transform {name} failed on an image {tuple(shape)}: {reason}; correct it") from error
            _check(name, image, shape)
        return image.as_subclass(Tensor).to(device) if type(image) is not Tensor else image.to(device)


def _check(name: str, image: Any, shape: torch.Size) -> None:
    """Refuse what is no image of ``shape``.

    Raises:
        InputError: it is none.
    """
    if not isinstance(image, Tensor):
        raise InputError(f"transform {name} gives a {type(image).__name__}; it must give a tensor, as it is given one")
    if image.shape != shape:
        raise InputError(
            f"transform {name} makes an image {tuple(shape)} one of {tuple(image.shape)}; it must keep the shape "
            f"(RandomResizedCrop:size={shape[-1]} crops and resizes)"
        )
    if image.dtype != torch.uint8:
        inside = image.is_floating_point() and bool(((image >= 0) & (image <= 1)).all())  # also false of NaN
        if not inside:
            raise InputError(f"transform {name} gives {image.dtype} outside [0, 1]; give uint8, or float in [0, 1]")


def _built(part: str) -> Transform:
    """Return the transform that ``part`` names.

    Raises:
        ConfigError: there is none, or it refuses its settings.
    """
    return _function(part) if _FUNCTION.fullmatch(part) else _of_torchvision(part)


def _function(part: str) -> Transform:
    module, _, name = part.partition(":")
    try:
        with working_folder_first():
            found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f"transform {part}: {type(error).__name__}: {error}; run from the folder of the module, and write its "
            "name without .py"
        ) from None
    if not callable(found):
        raise ConfigError(f"transform {part} is a {type(found).__name__}; name a function of an image")
    return found


def _of_torchvision(part: str) -> Transform:
    name, settings = parse_attack(part)  # written as an attack is
    v2: Any = library("torchvision.transforms.v2")
    known = [one for one in dir(v2) if inspect.isclass(getattr(v2, one)) and issubclass(getattr(v2, one), v2.Transform)]
    if name not in known:
        raise UnknownNameError.of("transform of torchvision.transforms.v2", name, [*known, "module:function"])
    try:
        return getattr(v2, name)(**settings)
    except Exception as error:  # of many types, by what its class makes of them
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"transform {part} cannot be made: {reason}; correct its settings") from None
