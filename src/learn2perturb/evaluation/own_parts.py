"""Which parts of an experiment are none of this package's, and where their code is from: for records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, default_collate

from learn2perturb.attacks import Attack
from learn2perturb.definitions import home_of, is_installed, title_of
from learn2perturb.noise import noise_modules
from learn2perturb.plugins import PARTS, is_ours, source_of
from learn2perturb.registry import DATASETS, DEFENSES, MODELS, Registry

# Kind of a part, its name, and the function, class or object that it is.
_Part = tuple[str, str, object]


def own_parts(
    model: object = None,
    *,
    dataset: str | None = None,
    defense: str | None = None,
    attacks: Iterable[Attack | None] = (),
    checks: Iterable[Callable[..., Any]] = (),
    others: Iterable[object] = (),
    data: object = None,
) -> dict[str, Any]:
    """Return ``{"parts": [...]}``: kind, name, module, file, SHA-256, code and package of each; empty: all are ours.

    ``code`` is a fingerprint of the part's own definition and of what it uses, see ``definitions.code_of``.

    Args:
        model: a network, whose modules and noise are looked at, or a function.
        dataset: name of a registered data set.
        defense: name of a registered defense.
        attacks: those used, with what they are made of.
        checks: of a diagnosis.
        others: more networks or functions that numbers follow from, such as a network without its noise.
        data: what images are read from: its transforms, loader and class.
    """
    network = getattr(model, "registered_name", None)
    found = named_parts((DEFENSES, defense), (MODELS, network), (DATASETS, dataset))
    parts = [
        *(part for one in (model, *others) for part in _of_model(one)),
        *(part for attack in attacks for part in _of_attack(attack)),
        *(("check", one.__name__, one) for one in checks),
        *_of_data(data),
    ]
    told = {(str(part["kind"]), str(part["name"])) for part in found}
    for kind, name, thing in parts:
        module = home_of(thing)
        # A registered network is told by its name; what comes with an installed package by that package's version.
        if (kind, name) not in told and not is_ours(module) and (kind in _REGISTERED or not is_installed(module)):
            told.add((kind, name))
            found.append({"kind": kind, "name": name, **source_of(module, thing)})
    return {PARTS: found} if found else {}


def named_parts(*named: tuple[Registry, object]) -> list[dict[str, Any]]:
    """Return those registered parts that are the user's own, as :func:`own_parts` tells them."""
    return [
        {"kind": registry.kind, **registry.entry(name).source()}
        for registry, name in named
        if isinstance(name, str) and name in registry and registry.entry(name).own
    ]


_REGISTERED = ("attack", "noise", "check")


def _of_model(model: object) -> Iterator[_Part]:
    """Yield the noise laws of a network and the classes of its modules, or the function that it is."""
    if isinstance(model, nn.Module):
        laws = {type(law): str(law.kind) for law in noise_modules(model)}
        yield from (("noise", kind, law) for law, kind in laws.items())
        kinds = [kind for kind in dict.fromkeys(map(type, model.modules())) if kind not in laws]
        yield from (("module", kind.__qualname__, kind) for kind in kinds)
    elif callable(model):
        function = getattr(model, "function", model)  # of arrays, within a black box
        yield "function", title_of(function), function


def _of_attack(attack: object) -> Iterator[_Part]:
    """Yield an attack, those that it is made of, and the functions and networks that it was given."""
    if not isinstance(attack, Attack):
        return
    yield "attack", type(attack).__name__, type(attack)
    for item in dataclasses.fields(attack):
        value = getattr(attack, item.name, None)
        if isinstance(value, Attack):
            yield from _of_attack(value)
        elif isinstance(value, nn.Module):
            yield from _of_model(value)
        elif callable(value):
            yield "function", f"{type(attack).__name__}.{item.name} {title_of(value)}", value


def _of_data(data: object) -> Iterator[_Part]:
    """Yield the transforms of a source of batches, the class and functions of a data set or loader of the user's."""
    inner: Any = data
    while hasattr(inner, "source"):  # what checks, or joins, batches of another
        inner = inner.source
    for name, step in getattr(getattr(inner, "transforms", None), "steps", ()):
        yield "transform", name, step
    loader = inner if isinstance(inner, DataLoader) else getattr(inner, "loader", None)
    if isinstance(loader, DataLoader):
        if loader.collate_fn is not default_collate:
            yield "collate_fn", title_of(loader.collate_fn), loader.collate_fn
        inner = loader.dataset
    yield from (("data set", one.__qualname__, one) for one in [type(inner)] if data is not None)
    for name in ("transform", "transforms", "target_transform"):
        function = getattr(inner, name, None)
        if callable(function):
            yield "transform", f"{name} {title_of(function)}", function
