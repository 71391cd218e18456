"""Values of settings, read from text or YAML as an annotation says; refused in one line. Knows no torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learn2perturb.checks import fraction
from learn2perturb.errors import ConfigError
from learn2perturb.reading import parse_yaml

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NOTHING = ("none", "null")
LONGEST_NUMBER = 100  # characters of a whole number


def guess(text: str) -> Any:
    """Return what ``text`` most likely means: a number, a fraction, a truth value, nothing, YAML, or text."""
    if re.fullmatch(r"[+-]?\d+", text):
        # Beyond what any setting can be, and what Python converts; whoever wants a number refuses the text.
        return int(text) if len(text) <= LONGEST_NUMBER else text
    try:
        return fraction(text)
    except ConfigError:
        pass
    try:
        value = parse_yaml(text)
    except Exception:  # YAML has many ways to be wrong
        return text
    return text if isinstance(value, str) or (value is None and text.lower() not in _NOTHING) else value


def convert(kind: str, value: Any) -> Any:
    """Return ``value`` as the annotation ``kind`` says (``"float | None"``), read from text where it is text.

    Of several kinds the first that fits is taken, in the order of ``_READERS``. A kind that is none of these, such as a
    class of the user's, takes any value: its owner refuses.

    Raises:
        ConfigError: it cannot be that.
    """
    kinds = _parts(kind)
    text = value.strip() if isinstance(value, str) else None
    if "None" in kinds and (value is None or (text is not None and text.lower() in _NOTHING)):
        return None
    if text is not None and "str" in kinds:
        # A text may be more than a number, and is a list where it has commas.
        listed = "list[str]" in kinds and "," in text
        kinds = ["list[str]"] if listed else [one for one in kinds if one not in ("float", "list[str]")]
    refusals = []
    for name, read in _READERS.items():
        for one in kinds:
            head, _, inner = one.partition("[")
            if head == name:
                try:
                    return read(inner.removesuffix("]"), value)
                except ConfigError as error:
                    refusals.append(error)
    if refusals:
        raise refusals[0]
    return value


def _parts(kind: str) -> list[str]:
    """Return the kinds that ``|`` separates, those within brackets left together."""
    return [part.strip() for part in re.split(r"\|(?![^\[]*\])", kind)]


def _truth(_: str, value: Any) -> bool:
    text = value.strip().lower() if isinstance(value, str) else None
    if isinstance(value, bool):
        return value
    if text in (*_YES, *_NO):
        return text in _YES
    raise ConfigError(f"{value!r} is no truth value; write true or false")


def _whole(_: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    raise ConfigError(f"{value!r} is not a whole number; write one such as 6")


def _choice(inner: str, value: Any) -> Any:
    allowed = ast.literal_eval(f"({inner},)")
    for one in allowed:
        if value == one or (isinstance(value, str) and value.strip() == str(one)):
            return one
    raise ConfigError(f"{value!r} is none of {', '.join(map(str, allowed))}")


def _number(_: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return fraction(value)


def _text(_: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ConfigError(f"{value!r} is a {type(value).__name__}; it must be a text")


def _items(inner: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        value = [item for item in re.split(r"[\s,\[\]()]+", value) if item]
    if not isinstance(value, (list, tuple)):
        what, example = {"int": ("whole numbers", "75,90"), "float": ("numbers", "0.1,8/255")}.get(
            inner, ("values", "a,b")
        )
        raise ConfigError(f"{value!r} is no list of {what}; write {example}")
    if not value and inner == "float":
        raise ConfigError("the list is empty; give at least one number, separated by commas")
    return [convert(inner or "Any", item) for item in value]


def _mapping(_: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {str(key): guess(item) if isinstance(item, str) else item for key, item in value.items()}
    raise ConfigError(f"{value!r} is a {type(value).__name__}; it must be a mapping, key: value")


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "bool": _truth,
    "int": _whole,
    "Literal": _choice,
    "list": _items,
    "tuple": lambda inner, value: tuple(_items(inner, value)),
    "float": _number,
    "Path": lambda inner, value: Path(_text(inner, value)),
    "str": _text,
    "dict": _mapping,
}


def converted(values: Mapping[str, Any], kinds: Mapping[str, str], where: str = "") -> dict[str, Any]:
    """Return ``values`` each as its kind says; what has no kind stays, for its owner to refuse.

    Raises:
        ConfigError: a value does not fit; the message names the setting.
    """
    result = {}
    for key, value in values.items():
        try:
            result[key] = convert(kinds[key], value) if key in kinds else value
        except ConfigError as error:
            raise ConfigError(f"{where}{key}: {error}") from None
    return result


def kinds_of(cls: Any) -> dict[str, str]:
    """Return the annotations of a dataclass's fields, as text, whether their module postpones annotations or not.

    Names that an annotation uses are looked up, so that ``Size`` with ``Size = float | None`` is ``float | None``.
    """
    return dict(_kinds(cls))


@functools.lru_cache(maxsize=256)  # options are made field by field, and resolving all annotations takes milliseconds
def _kinds(cls: Any) -> dict[str, str]:
    return {item.name: _text_of(_hint(cls, item)) for item in dataclasses.fields(cls)}


def _hint(cls: Any, item: dataclasses.Field[Any]) -> Any:
    """Return the annotation of one field; as it is written where a name in it is known to the type checker only."""
    if not isinstance(item.type, str):
        return item.type
    owner = next((one for one in cls.__mro__ if item.name in vars(one).get("__annotations__", {})), cls)
    known = vars(sys.modules.get(owner.__module__, typing))
    try:
        return _resolved(item.type, dict(known), dict(vars(owner)))
    except Exception:
        return item.type


def _resolved(text: str, known: dict[str, Any], own: dict[str, Any]) -> Any:
    """Return what the annotation ``text`` names, by ``typing.get_type_hints``."""
    holder = type("holder", (), {"__annotations__": {"field": text}})
    return typing.get_type_hints(holder, known, own)["field"]


def _text_of(hint: Any) -> str:
    """Return an annotation as :func:`convert` reads it: ``float | None``, ``Literal['a', 'b']``, ``list[int]``."""
    if isinstance(hint, str):
        return hint.replace("typing.", "")
    if isinstance(hint, typing.NewType):
        return _text_of(hint.__supertype__)
    if hint is type(None) or hint is None:
        return "None"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_text_of, arguments))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (typing.Annotated, typing.Final, typing.ClassVar):
        return _text_of(arguments[0])
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        kinds = {_text_of(one) for one in arguments if one is not Ellipsis}
        return f"{'tuple' if origin is tuple else 'list'}[{' | '.join(sorted(kinds))}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"dict[{', '.join(map(_text_of, arguments))}]"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
