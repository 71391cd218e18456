"""Parts of the user's own: modules that are imported by ``--import``, packages that declare entry points. No torch.

A module registers its parts when it is imported (``DEFENSES.register(...)``, ``@register_noise``, ``register_check``).
An installed package names them in its ``pyproject.toml`` instead::

    [project.entry-points."learn2perturb.defenses"]
    soft_at = "my_package.defense:SoftAdversarialTraining"

and nothing of it is imported before the name is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from learn2perturb.errors import ConfigError, Learn2PerturbError

# Modules to import, separated by commas: by the command line, and by every process that it starts.
VARIABLE = "LEARN2PERTURB_IMPORT"
OPTION = "--import"
PARTS = "parts"  # the entry of headers and of the metadata of records that says which parts are not of this package
OURS = __package__


class Declared(NamedTuple):
    """A part that an installed package declares: its name, where it lives, and the package that says so."""

    name: str
    target: str
    package: str


def declared(group: str) -> list[Declared]:
    """Return what installed packages declare in ``learn2perturb.GROUP``, in order of their names."""
    if not _mentioned(tuple(_folders())):
        return []
    # Here, since this import alone takes a tenth of a second.
    from importlib.metadata import entry_points

    found = []
    for point in sorted(entry_points(group=f"{OURS}.{group}"), key=lambda one: one.name):
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else ""
        found.append(Declared(point.name, f"{point.module}:{point.attr}", package))
    return found


def _folders() -> Iterator[tuple[str, int]]:
    """Give the places of packages, with when something was last put into each."""
    for place in sys.path:
        with contextlib.suppress(OSError):
            yield place or os.curdir, os.stat(place or os.curdir).st_mtime_ns


@functools.lru_cache(maxsize=8)
def _mentioned(folders: tuple[tuple[str, int], ...]) -> bool:
    """Tell whether a package in these places may declare parts: read from its files, in milliseconds."""
    mark = f"[{OURS}.".encode()
    for place, _ in folders:
        if not os.path.isdir(place):
            return True  # an archive: importlib.metadata reads it
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")) and mark in _said_by(entry.path):
                    return True
    return False


def _said_by(about: str) -> bytes:
    with contextlib.suppress(OSError), open(os.path.join(about, "entry_points.txt"), "rb") as file:
        return file.read()
    return b""


def without_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the modules that ``--import`` names anywhere among ``words``, and the other words.

    Raises:
        ConfigError: ``--import`` comes without a module.
    """
    modules, others, remaining = [], [], list(words)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        if name != OPTION:
            others.append(word)
            continue
        if not equals:
            value = remaining.pop(0) if remaining else ""
        if not value or value.startswith("-"):
            raise ConfigError(f"{OPTION} needs a module; write {OPTION} my_module, or {OPTION} path/to/file.py")
        modules += names_in(value)
    return modules, others


def names_in(text: str) -> list[str]:
    """Return the modules of a comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]


@contextlib.contextmanager
def imported(modules: Sequence[str] = ()) -> Iterator[None]:
    """Import ``modules`` and those of ``$LEARN2PERTURB_IMPORT``; processes that the body starts import them too.

    Raises:
        ConfigError: there is no such module, or it fails.
    """
    before = os.environ.get(VARIABLE)
    wanted = list(dict.fromkeys([*names_in(before or ""), *map(_absolute, modules)]))
    if not wanted:
        yield
        return
    here = os.getcwd()
    sys.path.append(here)  # what a part imports later lies beside it
    try:
        import_all(wanted)
        os.environ[VARIABLE] = ",".join(wanted)
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def import_all(modules: Sequence[str] | None = None) -> None:
    """Import modules by name or by file, those of ``$LEARN2PERTURB_IMPORT`` by default: at the start of a worker.

    Raises:
        ConfigError: there is no such module, or it fails.
    """
    for name in names_in(os.environ.get(VARIABLE, "")) if modules is None else modules:
        try:
            _import_one(name)
        except Learn2PerturbError as error:
            raise ConfigError(f"{OPTION} {name}: {error}") from error
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{OPTION} {name}: {error}; run from the folder of the file, or give its path, my/own_module.py"
            ) from None
        except Exception as error:
            raise ConfigError(f"{OPTION} {name} failed: {type(error).__name__}: {error}; correct the module") from error


def _absolute(module: str) -> str:
    return os.path.abspath(module) if module.endswith(".py") else module


def _import_one(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _import_file(name)
    with working_folder_first():
        return importlib.import_module(name)


@contextlib.contextmanager
def working_folder_first() -> Iterator[None]:
    """Let the body find modules of the working folder, as `python -m` does; a console script has its own there."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a module may have put the path right by itself
            sys.path.remove(here)


def _import_file(file: str) -> ModuleType:
    """Import a file under its own name, by which parts of it are found again."""
    from pathlib import Path  # not at the top, nor what is below: --help imports this module and needs none of these

    path = Path(file)
    name = path.stem
    if not name.isidentifier():
        raise ConfigError(f"{name!r} is no name of a module; use letters, digits and underscores")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; check the path")
    there = sys.modules.get(name)
    if there is not None:
        if Path(getattr(there, "__file__", None) or "").resolve() != path.resolve():
            raise ConfigError(f"a module {name!r} is imported already, from elsewhere; rename the file")
        return there
    from importlib import util

    spec = util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def is_ours(module: str) -> bool:
    """Tell whether a module is of this package."""
    return module.partition(".")[0] == OURS


def file_of(module: str) -> dict[str, Any]:
    """Return which module it is: its name, and its file, where it has one, with the SHA-256."""
    import hashlib
    from pathlib import Path

    file = getattr(sys.modules.get(module) or _imported_quietly(module), "__file__", None)
    source: dict[str, Any] = {"module": module}
    if file and os.path.isfile(file):
        source |= {"file": os.path.basename(file), "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    return source


def source_of(module: str, thing: object = None) -> dict[str, Any]:
    """Return where the code of a module is from: its name, its file with the SHA-256, and the package it came in.

    Of a ``thing`` in it, a function or class, also ``code``: a fingerprint of its own definition and what that uses.
    """
    from learn2perturb.definitions import code_of

    source = file_of(module)
    if "file" in source and (package := _package_of(module)):
        source["package"] = package
    if thing is not None and (code := code_of(thing)):
        source["code"] = code
    return source


def codes_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprint of the code of each part, by kind and name, of what ``own_parts`` or a record says."""
    found = {}
    for part in parts.get(PARTS) or ():
        if isinstance(part, Mapping) and isinstance(part.get("code"), str):
            found[f"{part.get('kind')} {part.get('name')}"] = str(part["code"])
    return found


def changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the parts that both have and whose code differs, by kind and name; records of before do not say."""
    one, other = codes_of(first), codes_of(second)
    return sorted(part for part in one.keys() & other.keys() if one[part] != other[part])


def _imported_quietly(module: str) -> ModuleType | None:
    with contextlib.suppress(Exception):
        return importlib.import_module(module)
    return None


@functools.cache  # a look at every installed package takes a while
def _package_of(module: str) -> str:
    from importlib.metadata import packages_distributions, version

    names = packages_distributions().get(module.partition(".")[0], [])
    return f"{names[0]} {version(names[0])}" if names else ""


def told(source: Mapping[str, Any]) -> str:
    """Return a source in a few words."""
    return str(source.get("package") or source.get("module") or "")
