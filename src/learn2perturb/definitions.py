"""What a function or class of the user's is made by: a fingerprint of its definition and of all that this uses.

A record that names ``my_module:flip`` says nothing of what ``flip`` did, and its file may hold ten other things. So
the text of its definition is hashed, with whatever that uses of the user's own files, as Python reads it: comments,
docstrings and layout do not count. Code of installed packages is known by their version. Knows no torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_INSTALLED = tuple(
    {str(Path(place).resolve()) for key, place in sysconfig.get_paths().items() if key.endswith(("lib", "stdlib"))}
)
_PACKAGES = {"site-packages", "dist-packages"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_of(thing: object) -> str | None:
    """Return 16 hexadecimal digits that follow from the code of a function, a class, or an object that can be called.

    What an object is made with is part of it: the settings of a partial function, of a method's object, what a function
    holds on to. None where the code cannot be read.
    """
    text = _text(thing)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def home_of(thing: object) -> str:
    """Return the module that a function, class or object is of."""
    if isinstance(thing, functools.partial):
        return home_of(thing.func)
    return str(getattr(_definition(thing), "__module__", None) or "")


def title_of(thing: object) -> str:
    """Return what a function, class or object is called."""
    if isinstance(thing, functools.partial):
        return title_of(thing.func)
    return str(getattr(_definition(thing), "__qualname__", type(thing).__name__))


def is_installed(module: str) -> bool:
    """Tell whether a module came with Python or with an installed package, which a version identifies."""
    if module == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or _top(module) == __package__:
        return True
    place = Path(file).resolve()
    return str(place).startswith(_INSTALLED) or not _PACKAGES.isdisjoint(place.parts)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _definition(thing: object) -> object:
    """Return the function or class that a thing is, or is made by."""
    if isinstance(thing, type | types.FunctionType | types.BuiltinFunctionType):
        return thing
    function = inspect.unwrap(getattr(thing, "__func__", thing))  # type: ignore[arg-type]
    return function if isinstance(function, types.FunctionType) else type(thing)


def _text(thing: object) -> str | None:
    if isinstance(thing, functools.partial):
        inner = _text(thing.func)
        return None if inner is None else f"{inner}\n{_shown([*thing.args, *sorted(thing.keywords.items())])}"
    found = _definition(thing)
    module, name = home_of(thing), title_of(thing)
    if isinstance(found, types.FunctionType) and found.__code__.co_filename.startswith("<"):
        text: str | None = _bytecode(found.__code__)  # of a shell, or of exec
    else:
        text = _defined(module, name.partition(".")[0])
    if text is None:
        return None
    if isinstance(found, types.FunctionType):
        held = [cell.cell_contents for cell in found.__closure__ or () if _is_set(cell)]
        # A method: its object's settings; a function within another: what it holds on to of that one.
        about = [
            getattr(thing, "__self__", None),
            found.__defaults__,
            sorted((found.__kwdefaults__ or {}).items()),
            *held,
        ]
        if found.__name__ == "<lambda>":  # several in one file have one name
            about += [found.__code__.co_varnames, found.__code__.co_names, found.__code__.co_consts]
        return f"{text}\n{name}\n{_shown(about)}"
    return text if isinstance(thing, type) else f"{text}\n{_shown([thing])}"


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _shown(values: list[Any]) -> str:
    """Return what is plain of ``values`` as text, and the code of functions; other things by their type."""
    found = []
    for value in values:
        if isinstance(value, _PLAIN):
            found.append(repr(value))
        elif isinstance(value, list | tuple | set | frozenset):
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            found.append(f"{type(value).__name__}({_shown(list(items))})")
        elif isinstance(value, dict):
            found.append(f"dict({_shown([list(item) for item in value.items()])})")
        elif isinstance(value, types.FunctionType) and not is_installed(value.__module__):
            found.append(str(code_of(value)))
        else:
            found.append(f"{type(value).__qualname__} {_ADDRESS.sub('', repr(value))[:2000]}")
    return ", ".join(found)


def _bytecode(code: types.CodeType) -> str:
    """Return what a function compiled to, whose text is nowhere."""
    constants = [_bytecode(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _defined(module: str, name: str) -> str | None:
    """Return the statements that ``name`` of ``module`` follows from, as one text; None where they cannot be read."""
    there = sys.modules.get(module)
    if there is None or _module(there) is None:
        return None
    found: dict[tuple[str, int], str] = {}
    _follow(there, name, found)
    return "\n".join(found[key] for key in sorted(found)) if found else None


def _follow(module: types.ModuleType, name: str | None, found: dict[tuple[str, int], str]) -> None:
    """Add the statements of ``module`` that ``name`` follows from, all of them for None, and those they use."""
    read = _module(module)
    if read is None:
        return
    known = name in read.bound
    waiting = [*read.bound[name]] if name is not None and known else list(range(len(read.statements)))
    while waiting:
        number = waiting.pop()
        statement = read.statements[number]
        if (module.__name__, number) in found:
            continue
        found[module.__name__, number] = ast.unparse(statement)
        for used in _used(statement):
            waiting += read.bound.get(used, ())
        for home, attribute in _imports(statement, module):
            there = sys.modules.get(home)
            if there is not None and (_top(home) == _top(module.__name__) or not is_installed(home)):
                inner = sys.modules.get(f"{home}.{attribute}")
                _follow(inner or there, None if inner is not None else attribute, found)


@final
class _Read:
    """A module's file: its statements, without docstrings, and by which of them each name is bound."""

    def __init__(self, text: str) -> None:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = [one for one in node.body if not _is_text(one)] or [ast.Pass()]
        self.statements = tree.body
        self.bound: dict[str, list[int]] = {}
        for number, statement in enumerate(self.statements):
            for name in _binds(statement):
                self.bound.setdefault(name, []).append(number)


# By module object: a file that is edited while the process runs is not what the process runs.
_READ: weakref.WeakKeyDictionary[types.ModuleType, _Read | None] = weakref.WeakKeyDictionary()


def _module(module: types.ModuleType) -> _Read | None:
    if module not in _READ:
        _READ[module] = None
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py"):
            with contextlib.suppress(OSError, ValueError, SyntaxError):
                _READ[module] = _Read(Path(file).read_text(encoding="utf-8"))
    return _READ[module]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _binds(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement gives a value, or changes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((one.asname or one.name).partition(".")[0] for one in statement.names)
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield from (one.id for one in ast.walk(node) if isinstance(one, ast.Name))
        elif node is not statement and isinstance(node, ast.stmt):
            yield from _binds(node)


def _used(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            yield node.id


def _imports(statement: ast.stmt, module: types.ModuleType) -> Iterator[tuple[str, str | None]]:
    """Yield the modules that a statement imports from, and the name; None is all of it."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            yield from ((one.name, None) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            with contextlib.suppress(ImportError, ValueError):
                home = importlib.util.resolve_name(home, module.__package__) if node.level else home
                yield from ((home, None if one.name == "*" else one.name) for one in node.names)
