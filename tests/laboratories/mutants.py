"""Mutants: one place of the source changed, found in the syntax tree; texts, types and docstrings are left alone."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*", ast.Mod: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change of one place: the line it is on, and the whole text of the file with it."""

    path: str  # below src/learn2perturb
    line: int
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: `{self.before}` to `{self.after}`"


def mutants(source: pathlib.Path, path: str) -> list[Mutant]:
    """Return every mutant of a file below ``source``."""
    text = (source / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    return [
        Mutant(path, node.lineno, ast.get_source_segment(text, node) or "", new, _replaced(text, node, new))
        for node in _places(tree)
        for new in _changes(node)
    ]


def _replaced(text: str, node: ast.expr, new: str) -> str:
    lines = text.encode().splitlines(keepends=True)
    assert node.end_lineno is not None and node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    content = text.encode()
    # In brackets: what is replaced may stand next to an operator that binds more closely.
    return (content[:start] + f"({new})".encode() + content[end:]).decode()


def _places(node: ast.AST) -> Iterator[ast.expr]:
    """Yield expressions that decide something: not of annotations, messages of errors, or checks of types alone."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return  # of zip: a guard against what the code around it rules out
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr):
                    yield child
                yield from _places(child)


def _changes(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return _of_constant(node.value)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        return [f"({left}) {_COMPARE[type(node.ops[0])]} ({right})"]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return [f"({ast.unparse(node.left)}) {_BINARY[type(node.op)]} ({ast.unparse(node.right)})"]
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        return [word.join(f"({ast.unparse(value)})" for value in node.values)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return [ast.unparse(node.operand)]
    if isinstance(node, ast.IfExp):
        return [ast.unparse(node.body), ast.unparse(node.orelse)]
    return []


def _of_constant(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1), *([str(value - 1)] if value > 1 else [])]
    if isinstance(value, float):
        return [repr(value * 2) if value else "1.0"]
    return []
