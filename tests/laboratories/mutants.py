"""Mutants: one place of the source changed, found in the syntax tree.

Left alone is what no caller can tell: texts and docstrings, types, ``__repr__``, the words of errors and warnings.
"""

from __future__ import annotations

import ast
import itertools
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_ORDER: dict[type[ast.cmpop], str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
# What is allowed for rounding has no exact edge that could be told; on which side of it a number lies can.
_ALLOWANCES = {"rounding", "tolerance", "allowed", "nothing"}
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*", ast.Mod: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
_TYPES = ("annotation", "returns", "decorator_list", "bases", "type_params")
# strict of zip guards against what the code around it rules out; the others are of how a thing is shown or named
_COSMETIC = ("strict", "stacklevel", "repr", "digest_size")
_TINY = 1e-5  # a guard against a division by zero, or an allowance for rounding: whether it is there can be told


@dataclass(frozen=True)
class Mutant:
    """A change of one place: the line and the column it is at, and the whole text of the file with it."""

    path: str  # below src/learn2perturb
    line: int
    before: str
    after: str
    text: str
    column: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: `{self.before}` to `{self.after}`"


def mutants(source: pathlib.Path, path: str) -> list[Mutant]:
    """Return every mutant of a file below ``source``."""
    content = (source / path).read_bytes()
    starts = [0, *itertools.accumulate(map(len, content.splitlines(keepends=True)))]
    found = []
    for node in _places(ast.parse(content)):
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        for new in _changes(node):
            # In brackets: what is replaced may stand next to an operator that binds more closely.
            text = content[:start] + f"({new})".encode() + content[end:]
            before = content[start:end].decode()
            found.append(Mutant(path, node.lineno, before, new, text.decode(), node.col_offset))
    return found


def _places(node: ast.AST) -> Iterator[ast.expr]:
    """Yield expressions that decide something."""
    if _is_left_alone(node):
        return
    for name, value in ast.iter_fields(node):
        if name in _TYPES:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr):
                    yield child
                yield from _places(child)


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.JoinedStr() | ast.Assert() | ast.FunctionDef(name="__repr__"):
            return True
        case ast.keyword(arg=name):
            return name in _COSMETIC
        case ast.If(test=test):
            return "TYPE_CHECKING" in ast.unparse(test)
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(op=ast.BitOr())):
            return name[0].isupper()  # a type's other name
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in ("warn", "isinstance", "cast") or name.endswith(("Error", "Warning"))
    return False


def _changes(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return _of_constant(node.value)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        named = {name.id.strip("_").lower() for name in ast.walk(node) if isinstance(name, ast.Name)}
        if type(node.ops[0]) in _ORDER and named & _ALLOWANCES:
            return [f"not (({left}) {_ORDER[type(node.ops[0])]} ({right}))"]
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
        return ["0.0" if 0 < value < _TINY else repr(value * 2) if value else "1.0"]
    return []
