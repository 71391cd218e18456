"""Values of settings, read from text or YAML as an annotation says; refused in one line. Knows no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from learn2perturb.checks import fraction
from learn2perturb.errors import ConfigError
from learn2perturb.reading import parse_yaml

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NOTHING = ("none", "null")
_TEXTS = {"str", "Average"}  # the second is one of several words; its owner refuses others
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

    Raises:
        ConfigError: it cannot be that.
    """
    kinds = {part.strip() for part in kind.split("|")}
    text = value.strip() if isinstance(value, str) else None
    if "None" in kinds and (value is None or (text is not None and text.lower() in _NOTHING)):
        return None
    if "bool" in kinds:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in (*_YES, *_NO):
            return text.lower() in _YES
        raise ConfigError(f"{value!r} is no truth value; write true or false")
    if "int" in kinds:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if text is not None and re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        raise ConfigError(f"{value!r} is not a whole number; write one such as 6")
    words = re.findall(r"['\"]([^'\"]+)['\"]", kind) if "Literal[" in kind else []
    if words:
        if text in words:
            return text
        raise ConfigError(f"{value!r} is none of {', '.join(words)}")
    if "list[float]" in kinds and (text is not None or isinstance(value, (list, tuple))):
        return _numbers(value if text is None else [item for item in re.split(r"[\s,\[\]]+", text) if item])
    if "float" in kinds and not (kinds & _TEXTS and text is not None):  # a text may be more than a number
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        return fraction(value)
    if "list[str]" in kinds and text is not None and "," in text:
        return [item for item in re.split(r"[\s,\[\]]+", text) if item]
    if kinds & _TEXTS and isinstance(value, str):
        return value
    if "list[int]" in kinds:
        items = [item for item in re.split(r"[\s,\[\]]+", text) if item] if text is not None else value
        if isinstance(items, list):
            return [convert("int", item) for item in items]
        raise ConfigError(f"{value!r} is no list of whole numbers; write 75,90")
    if "list[str]" in kinds and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    if kind.startswith("dict") and isinstance(value, dict):
        return {str(key): guess(item) if isinstance(item, str) else item for key, item in value.items()}
    expected = "a mapping, key: value" if kind.startswith("dict") else "a text" if "str" in kinds else kind
    raise ConfigError(f"{value!r} is a {type(value).__name__}; it must be {expected}")


def _numbers(items: Sequence[Any]) -> list[float]:
    if not items:
        raise ConfigError("the list is empty; give at least one number, separated by commas")
    return [convert("float", item) for item in items]


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
    """Return the annotations of a dataclass's fields, as text, whether their module postpones annotations or not."""
    return {
        item.name: item.type.__name__ if isinstance(item.type, type) else str(item.type).replace("typing.", "")
        for item in dataclasses.fields(cls)
    }
