"""Other people's libraries: missing in CI is a failure, missing elsewhere is a reason to skip."""

from __future__ import annotations

import importlib
import os
import types

import pytest
import torch

# Held for the whole session: the operators vanish with the object that defined them.
_operators: list[torch.library.Library] = []


def import_torchvision() -> types.ModuleType:
    """Import torchvision, also beside a torch whose build does not match its compiled operators.

    Its wheel is built against one build of torch; beside another its library does not load, and the import then stops
    at ``operator torchvision::nms does not exist``. Networks need none of those operators, so two empty ones will do.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error) or _operators:
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.append(library)
    return importlib.import_module("torchvision")


def import_or_skip(name: str) -> types.ModuleType:
    """Import the library ``name``; skip the test where it is missing, but fail it in CI."""
    try:
        import_torchvision()  # timm imports it too
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"{name} cannot be imported, and CI must have it: {error}")
        pytest.skip(f"{name} is not installed: make setup")


@pytest.fixture(scope="session")
def torchvision() -> types.ModuleType:
    """The library torchvision, with its networks."""
    import_or_skip("torchvision.models")
    return import_or_skip("torchvision")


@pytest.fixture(scope="session")
def timm() -> types.ModuleType:
    """The library timm."""
    return import_or_skip("timm")
