"""Libraries of others that are imported only when a part of theirs is asked for: timm and torchvision."""

from __future__ import annotations

import importlib
import types
import warnings

import torch

from learn2perturb.errors import MissingDependencyError

INSTALL = "pip install 'learn2perturb[hub]' && pip install --no-deps torchvision timm"
# Held for good: the operators vanish with the object that defined them.
_operators: list[torch.library.Library] = []


def library(name: str) -> types.ModuleType:
    """Import ``timm`` or ``torchvision``, also beside a torch whose build does not match torchvision's operators.

    Its wheel is built against one build of torch; beside another its library does not load, and the import then stops
    at ``operator torchvision::nms does not exist``. Networks and transforms
    need none of those operators, so two empty ones will do.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old names that they import: not the user's concern
            try:
                importlib.import_module("torchvision")
            except RuntimeError as error:
                if "torchvision::nms does not exist" not in str(error) or _operators:
                    raise
                operators = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _operators.append(operators)
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"what is of {name} needs it ({error}): {INSTALL}") from None
