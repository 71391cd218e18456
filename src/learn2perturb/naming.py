"""Names of networks: registered ones, those of timm and torchvision, ``module:function``, the hub. Knows no torch."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.plugins import working_folder_first
from learn2perturb.registry import MODELS

HUB, ZOO = "hf-hub:", "zoo:"
LIBRARIES = ("timm", "torchvision")
PRETRAINED = "?pretrained"
_LIBRARY = re.compile(r"(timm|torchvision):([\w.]+)(\?pretrained)?")
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@final
@dataclass(frozen=True)
class NetworkName:
    """What the name of a network says.

    Attributes:
        kind: ``registered`` here, one of a library, a ``function`` of the user's, or a repository of the ``hub``.
        name: within that: ``resnet18d`` of ``timm:resnet18d?pretrained``.
        pretrained: whether the weights that the library publishes are asked for.
        text: the whole name, without ``?pretrained``.
    """

    kind: Literal["registered", "timm", "torchvision", "function", "hub"]
    name: str
    pretrained: bool = False
    text: str = ""

    @property
    def foreign(self) -> bool:
        """Whether it is none of this package's own networks."""
        return self.kind != "registered"


def network_name(text: object) -> NetworkName:
    """Return what a name of a network means; whether a library or the hub has it is not looked up.

    Raises:
        UnknownNameError: it is none.
    """
    if isinstance(text, str) and text not in MODELS:
        library = _LIBRARY.fullmatch(text)
        if library is not None:
            kind: Any = library[1]
            return NetworkName(kind, library[2], library[3] is not None, text.removesuffix(PRETRAINED))
        if text.startswith(HUB):
            return NetworkName("hub", text.removeprefix(HUB), text=text)
        if is_factory(text):
            return NetworkName("function", text, text=text)
        if ":" in text:
            raise UnknownNameError(
                f"unknown network {text!r}; write a registered name, timm:NAME or torchvision:NAME (with {PRETRAINED} "
                f"for its published weights), module:function, or {HUB}owner/name"
            )
    return NetworkName("registered", MODELS.entry(text).name, text=str(text))  # type: ignore[arg-type]


def of_library(text: str) -> bool:
    """Tell whether ``text`` is the name of a network of timm or torchvision."""
    return _LIBRARY.fullmatch(text) is not None


def is_factory(text: str) -> bool:
    """Tell whether ``text`` is ``module:function`` and no file or folder."""
    places = (HUB, ZOO, *(f"{library}:" for library in LIBRARIES))
    return _FACTORY.fullmatch(text) is not None and not text.startswith(places) and not Path(text).exists()


def made_by(factory: str, *, itself: bool = False) -> Any:
    """Return what ``module:function`` gives, called without arguments; modules of the working folder are found.

    ``itself``: a function that cannot be called without arguments is meant itself.

    Raises:
        ConfigError: there is no such module or function, it fails, or it gives no model.
    """
    module_name, _, function_name = factory.partition(":")
    try:
        with working_folder_first():
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
    if not callable(made):
        raise ConfigError(f"{factory} returned a {type(made).__name__}; it must return the model, images to logits")
    return made


def function_of(factory: str) -> Any:
    """Return ``function`` of ``module:function`` itself.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = factory.partition(":")
    try:
        with working_folder_first():
            return getattr(importlib.import_module(module), name)
    except Exception as error:  # a stranger's module may raise anything
        raise ConfigError(f"{factory}: {type(error).__name__}: {error}; write module:function") from error


def _takes_arguments(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code does not say
        return False
    return any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)
