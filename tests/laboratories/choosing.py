"""Which tests judge a mutant: those that run its line, the quickest and nearest first, within a limit of seconds."""

from __future__ import annotations

import ast
import functools
import pathlib
from collections import Counter
from collections.abc import Mapping

from tests.laboratories.covering import SOURCE, Test
from tests.laboratories.mutants import Mutant

_START = 0.05  # seconds of a test that takes none
_FAR, _ELSEWHERE = 3.0, 8.0  # as if they took that many times as long: the folder's other files, and other folders
_DEFAULTS = "test_defaults"  # the tables of public defaults, near to every file: some hold those of other folders


def tests_of(mutant: Mutant, known: Mapping[str, Test], limit: float) -> tuple[str, ...]:
    """Return names of tests, the first to be run first, of not more than ``limit`` seconds in all.

    What is run when a module is imported (a constant, a default, a table) is judged by the tests that run any line of
    the function it is a default of, or of the file, and by those named after the file; where there is none, by those of
    the folder.
    """
    lines, imported = lines_of(mutant)
    running = [
        one
        for one in known.values()
        if one.lines.get(mutant.path, frozenset()) & lines or (imported and _is_near(mutant, one))
    ]
    if not running:
        running = [one for one in known.values() if _folder(one.name) == mutant.path.split("/")[0]]
    chosen, left = [], limit
    for one in _in_order(mutant, running):
        left -= one.seconds
        if left < 0 and chosen:
            break
        chosen.append(one.name)
    return tuple(chosen)


def lines_of(mutant: Mutant) -> tuple[frozenset[int], bool]:
    """Return the lines that run where the mutant's place has a meaning, and whether it is run by an import."""
    tree = _tree(mutant.path)
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and _holds(node, mutant.line)]
    around.sort(key=lambda node: (node.lineno, -_end(node)))
    functions = [node for node in around if isinstance(node, ast.FunctionDef)]
    inner = around[-1]
    if functions and inner is not functions[-1]:
        return frozenset(range(inner.lineno, _own_end(inner) + 1)), False
    if functions:  # a default
        return _body(functions[-1]), True
    bodies = (_body(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda))
    return frozenset().union(*bodies), True


def _in_order(mutant: Mutant, tests: list[Test]) -> list[Test]:
    """Quickest and nearest first; of the many cases of one test, each next one counts as longer."""

    def cost(one: Test) -> float:
        if _folder(one.name) != mutant.path.split("/")[0]:
            return (one.seconds + _START) * _ELSEWHERE
        return (one.seconds + _START) * (1.0 if _is_near(mutant, one) else _FAR)

    met: Counter[str] = Counter()
    ranked = []
    for one in sorted(tests, key=cost):
        met[one.name.split("[")[0]] += 1
        ranked.append((cost(one) * met[one.name.split("[")[0]], one.name, one))
    return [one for *_, one in sorted(ranked, key=lambda found: found[:2])]


def _is_near(mutant: Mutant, test: Test) -> bool:
    name, stem = pathlib.PurePath(test.name.split("::")[0]).name, pathlib.PurePath(mutant.path).stem
    return name.startswith(_DEFAULTS) or (
        _folder(test.name) == mutant.path.split("/")[0] and name.startswith(f"test_{stem}")
    )


def _folder(test: str) -> str:
    return test.split("/")[1]


@functools.cache
def _tree(path: str) -> ast.Module:
    return ast.parse((SOURCE / path).read_text(encoding="utf-8"))


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _holds(node: ast.stmt, line: int) -> bool:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
    return first <= line <= _end(node)


def _own_end(node: ast.stmt) -> int:
    """Return the last line of a statement without the block that it holds."""
    block = getattr(node, "body", None) or getattr(node, "cases", None)
    first = block[0] if block else None
    if isinstance(first, ast.match_case):
        first = first.pattern
    return max(node.lineno, first.lineno - 1) if isinstance(first, ast.stmt | ast.pattern) else _end(node)


def _body(node: ast.FunctionDef | ast.Lambda) -> frozenset[int]:
    inner = node.body if isinstance(node.body, list) else [node.body]
    return frozenset(range(inner[0].lineno, (inner[-1].end_lineno or inner[-1].lineno) + 1))
