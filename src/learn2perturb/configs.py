"""Configs: the frozen dataclasses that the verbs take. A field is at once a keyword argument, an option and its help.

Knows no torch, so that the command line starts fast.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.values import kinds_of

ENGINES = ("auto", "plain", "fast", "fast32")
# What the docstring of a function says of **settings, in the lines that the fields of the config take the place of.
_SETTINGS = re.compile(r"^( +)settings: .*(?:\n\1 .*)*", re.MULTILINE)


class Config(ABC):
    """Base of the configs: frozen dataclasses of plain values, each checked when it is made."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values, as a file gives them back: lists for tuples."""
        from learn2perturb.records import plain  # with all that writes files, which --help does not wait for

        values: dict[str, Any] = plain(self)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values.

        Raises:
            UnknownNameError: a key is no field.
            ConfigError: a value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings are a {type(values).__name__}; give a mapping such as {{'seed': 0}}")
        known = kinds_of(cls)
        for key in values:
            if key not in known:
                raise UnknownNameError.of("setting", key, known)
        return cls(**values)

    @classmethod
    def of(cls, config: Self | None, settings: Mapping[str, Any]) -> Self:
        """Return ``config``, by default that of all defaults, with the ``settings`` that were given by keyword.

        Raises:
            UnknownNameError: a setting is no field.
            ConfigError: a value is not allowed, or ``config`` is of another kind.
        """
        if config is None:
            return cls.from_dict(settings)
        if not isinstance(config, cls):
            raise ConfigError(f"config is a {type(config).__name__}; give {_a(cls.__name__)}, or keyword arguments")
        own = {name: getattr(config, name) for name in kinds_of(cls)}
        return cls.from_dict({**own, **settings}) if settings else config


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def field_help(cls: type) -> dict[str, str]:
    """Return what the docstring of ``cls`` says of each field, in its ``Args:`` section."""
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in (section.group(1) if section else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


F = TypeVar("F", bound=Callable[..., Any])


def takes(cls: type[Config]) -> Callable[[F], F]:
    """Return a decorator that says, in signature and docstring, which keyword arguments ``**settings`` stands for."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        parameters = [item for item in own.parameters.values() if item.kind is not item.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            for item in dataclasses.fields(cls)  # type: ignore[arg-type]  # subclasses are dataclasses
        ]
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        if function.__doc__:
            explained = field_help(cls).items()
            function.__doc__ = _SETTINGS.sub(
                lambda found: "\n".join(f"{found[1]}{name}: {text}" for name, text in explained), function.__doc__
            )
        return function

    return decorate
