"""Annotated shapes, checked at every call: ``learn2perturb.engine.shapes`` as jaxtyping's types, by beartype."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import torch
from beartype import beartype

from learn2perturb.engine import shapes

ALIASES = {name for name, value in vars(shapes).items() if typing.get_origin(value) is typing.Annotated}


def jax_type(annotation: Any) -> Any:
    """Return an annotation with jaxtyping's types in the place of the aliases; None where it has none of them."""
    if typing.get_origin(annotation) is typing.Annotated:
        tensor, number, dimensions = typing.get_args(annotation)
        return getattr(jaxtyping, number)[tensor, dimensions]
    if typing.get_origin(annotation) is tuple:
        parts = [jax_type(part) for part in typing.get_args(annotation)]
        return tuple[tuple(object if part is None else part for part in parts)] if any(parts) else None
    return None


def shapes_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the checkable annotations of a function."""
    found = {}
    for name, text in function.__annotations__.items():
        if isinstance(text, str) and any(alias in text for alias in ALIASES):
            with contextlib.suppress(NameError):  # a name for the type checker alone
                found[name] = jax_type(eval(text, function.__globals__))
    return {name: hint for name, hint in found.items() if hint is not None}


def checked(function: types.FunctionType) -> Callable[..., Any]:
    """Return the function with its shapes checked; a compiler that looks into it sees the function alone."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, shapes_of(function)
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    checking = jaxtyping.jaxtyped(copy, typechecker=beartype)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (function if torch.compiler.is_compiling() else checking)(*arguments, **named)

    return call


def places() -> Iterator[tuple[Any, str, types.FunctionType]]:
    """Yield every place, a module or a class, that holds a function whose shapes are annotated, with its name there."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("learn2perturb.")]
    owners: dict[int, Any] = {id(module): module for module in modules}
    for module in modules:
        owners.update({id(one): one for one in vars(module).values() if isinstance(one, type)})
    for owner in owners.values():
        if getattr(owner, "__module__", "learn2perturb").startswith("learn2perturb"):
            for name, value in list(vars(owner).items()):
                if inspect.isfunction(value) and shapes_of(value):
                    yield owner, name, value


@contextlib.contextmanager
def checking() -> Iterator[int]:
    """Check shapes in the body, in the modules that are imported by now; yields how many functions are checked."""
    held = list(places())
    made = {id(function): checked(function) for _, _, function in held}
    try:
        for owner, name, function in held:
            setattr(owner, name, made[id(function)])
        yield len(made)
    finally:
        for owner, name, function in held:
            setattr(owner, name, function)
