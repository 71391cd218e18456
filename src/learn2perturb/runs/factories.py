"""Models of the user's own by ``module:function``. Knows no torch."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from learn2perturb.errors import ConfigError

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_factory(text: str) -> bool:
    """Tell whether ``text`` is ``module:function`` and no file or folder."""
    places = ("hf-hub:", "zoo:")
    return _FACTORY.fullmatch(text) is not None and not text.startswith(places) and not Path(text).exists()


def made_by(factory: str, *, itself: bool = False) -> Any:
    """Return what ``module:function`` gives, called without arguments; modules of the working folder are found.

    ``itself``: a function that cannot be called without arguments is meant itself.

    Raises:
        ConfigError: there is no such module or function, it fails, or it gives no model.
    """
    module_name, _, function_name = factory.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        made = function if itself and _takes_arguments(function) else function()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{factory}: {error}; run from the folder of the file, and write its name without .py"
        ) from None
    except AttributeError as error:
        raise ConfigError(f"{factory}: {error}; write module:function") from error
    except Exception as error:
        raise ConfigError(
            f"{factory} failed: {type(error).__name__}: {error}; it is called without arguments and returns the model"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(made):
        raise ConfigError(f"{factory} returned a {type(made).__name__}; it must return the model, images to logits")
    return made


def _takes_arguments(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code does not say
        return False
    return any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)
