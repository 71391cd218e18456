"""Train and eval mode of a network, set for a while and given back to every submodule as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


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
