"""Which parts of an experiment are none of this package's, and where their code is from: for records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from learn2perturb.attacks import Attack
from learn2perturb.noise import noise_modules
from learn2perturb.plugins import PARTS, is_ours, source_of
from learn2perturb.registry import DATASETS, DEFENSES, MODELS, Registry


def own_parts(
    model: object = None,
    *,
    dataset: str | None = None,
    defense: str | None = None,
    attacks: Iterable[Attack | None] = (),
    checks: Iterable[Callable[..., Any]] = (),
) -> dict[str, Any]:
    """Return ``{"parts": [...]}``: kind, name, module, file, SHA-256 and package of each; empty where all are ours."""
    network = getattr(model, "registered_name", None)
    named: tuple[tuple[Registry, str | None], ...] = ((DEFENSES, defense), (MODELS, network), (DATASETS, dataset))
    found = [
        {"kind": registry.kind, **registry.entry(name).source()}
        for registry, name in named
        if isinstance(name, str) and name in registry and registry.entry(name).own
    ]
    laws = noise_modules(model) if isinstance(model, nn.Module) else []
    things = [
        *(("noise", str(law.kind), type(law).__module__) for law in laws),
        *(("attack", type(one).__name__, type(one).__module__) for attack in attacks for one in _within(attack)),
        *(("check", one.__name__, one.__module__) for one in checks),
    ]
    found += [
        {"kind": kind, "name": name, **source_of(module)}
        for kind, name, module in dict.fromkeys(things)
        if not is_ours(module)
    ]
    return {PARTS: found} if found else {}


def _within(attack: object) -> Iterator[Attack]:
    """Yield an attack, and those that it is made of."""
    if isinstance(attack, Attack):
        yield attack
        for item in dataclasses.fields(attack):
            yield from _within(getattr(attack, item.name, None))
