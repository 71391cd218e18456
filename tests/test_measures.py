"""How the source is built: short flat functions, names in the registry, closed classes."""

from __future__ import annotations

import abc
import ast
import importlib
import inspect
import pathlib
import statistics
from collections.abc import Iterator
from enum import Enum

import pytest

from learn2perturb import registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "learn2perturb"
DEEPEST = 4  # blocks in blocks in one function
MEDIAN_LINES = 10
REGISTRIES = (registry.MODELS, registry.DATASETS, registry.ATTACKS, registry.DEFENSES, registry.NOISES)
# A choice and constants, no lists of what there is: what the demo trains unless told otherwise; means of pixels.
CHOICES = [
    ("cli/demo.py", ("none", "pgd_at", "learn2perturb")),
    ("models/normalize.py", ("paper", "cifar10", "cifar100")),
]

Function = ast.FunctionDef | ast.AsyncFunctionDef
PARTS = ast.stmt | ast.ExceptHandler | ast.match_case


def parsed() -> Iterator[tuple[str, ast.Module]]:
    """Yield the name of each source file and its tree."""
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


TREES = dict(parsed())


def functions(tree: ast.AST) -> Iterator[Function]:
    """Yield every function of a tree, methods and closures among them."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def depth(node: ast.AST) -> int:
    """Return how many blocks lie in one another below ``node``; an elif lies no deeper than its if."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        inner = [one for one in value if isinstance(one, PARTS)] if isinstance(value, list) else []
        continued = isinstance(node, ast.If) and field == "orelse" and len(inner) == 1 and isinstance(inner[0], ast.If)
        for child in inner:
            opens = isinstance(child, ast.stmt) and hasattr(child, "body") and not continued
            deepest = max(deepest, depth(child) + opens)
    return deepest


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        ("x = 1", 0),
        ("if a:\n  b", 1),
        ("if a:\n  b\nelif c:\n  d\nelse:\n  e", 1),
        ("if a:\n  b\nelse:\n  c\n  if d:\n    e", 2),
        ("for a in b:\n  with c:\n    try:\n      d\n    except E:\n      if f:\n        g", 4),
        ("def f():\n  while a:\n    b", 2),
    ],
)
def test_the_depth_of_a_text(text, deep):
    assert depth(ast.parse(text)) == deep


def test_no_function_is_nested_deeper_than_four():
    found = [f"{name}:{one.lineno} {one.name}" for name, tree in TREES.items() for one in functions(tree)
             if depth(one) > DEEPEST]  # fmt: skip
    assert found == []


def test_the_median_function_has_ten_lines_or_fewer():
    lines = [(one.end_lineno or 0) - one.lineno + 1 for tree in TREES.values() for one in functions(tree)]
    assert len(lines) > 2000
    assert statistics.median(lines) <= MEDIAN_LINES


# --- names of registered things


def listed(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Yield the strings of each list, tuple, set or mapping by names that is written out."""
    for node in ast.walk(tree):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
        texts = tuple(one.value for one in items if isinstance(one, ast.Constant) and isinstance(one.value, str))
        if texts:
            yield texts


def of_one_registry(texts: tuple[str, ...]) -> bool:
    """Tell whether two or more of ``texts`` are registered, and these are most of them: a list of registered things."""
    return any(2 <= sum(text in kind for text in set(texts)) > len(texts) / 2 for kind in REGISTRIES)


def test_no_list_of_registered_names_stands_outside_the_registry():
    found = [
        (name, texts)
        for name, tree in TREES.items()
        for texts in listed(tree)
        if name != "registry.py" and of_one_registry(texts)
    ]
    assert found == CHOICES


# --- classes


def classes() -> set[type]:
    """Return every class that the source defines at the top of a module."""
    found = set()
    for name in TREES:
        module = importlib.import_module(".".join(["learn2perturb", *name.removesuffix(".py").split("/")]))
        found |= {one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__}
    return found


def is_abstract(one: type) -> bool:
    """Tell whether a class says that it is a base: by an abstract method, as an ABC, or as a protocol."""
    return inspect.isabstract(one) or abc.ABC in one.__bases__ or getattr(one, "_is_protocol", False)


def test_a_class_that_has_subclasses_is_abstract_and_every_other_is_final():
    known = classes()
    assert len(known) > 250
    bases = {base for one in known for base in one.__mro__[1:] if base in known}
    # Errors are caught by their kind, so the family has classes in between.
    open_ones = {one for one in bases if not is_abstract(one) and not issubclass(one, Exception)}
    assert {f"{one.__module__}.{one.__name__}" for one in open_ones} == set()
    assert [one for one in bases if getattr(one, "__final__", False)] == []
    leaves = {one for one in known - bases if not is_abstract(one) and not issubclass(one, Exception | tuple | Enum)}
    assert {f"{one.__module__}.{one.__name__}" for one in leaves if "__final__" not in vars(one)} == set()
