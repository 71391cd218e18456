"""Typed options: made from the fields of a dataclass, read from text or YAML, every refusal one line with a fix.

Plain argparse: the same options from jsonargparse would cost more start-up than everything else that ``--help`` needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, final

from learn2perturb import configs
from learn2perturb.configs import Config
from learn2perturb.errors import ConfigError
from learn2perturb.reading import parse_yaml
from learn2perturb.tables import aligned
from learn2perturb.terminal import trusted, visible
from learn2perturb.values import convert, guess, kinds_of

C = TypeVar("C", bound=Config)


@final
class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are :class:`ConfigError`, and which knows near names."""

    def __init__(self, prog: str | None = None, description: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.several: str | None = None  # the name that further operands are kept by, where a verb takes several

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        fix = "" if ";" in message or "did you mean" in message else f"; see {self.prog} --help"
        raise ConfigError(message + fix)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse ``words``; option names may have ``_`` for ``-``, and mappings dotted keys: ``--options.gamma 1e-3``.

        Raises:
            ConfigError: a word is no option, or a value does not fit its option.
        """
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        arguments, rest = self.parse_known_args(_spelled(words))
        if self.several is not None:
            # Not by nargs="*": argparse would take what stands after an option for one word too many.
            others = [word for word in rest if not word.startswith("-")]
            setattr(arguments, self.several, others)
            rest = [word for word in rest if word not in others]
        if rest:
            word = next((item for item in rest if item.startswith("-")), rest[0]).partition("=")[0]
            if not word.startswith("-"):
                self.error(f"{word!r} is one word too many")
            near = difflib.get_close_matches(word, known, n=2)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            self.error(f"unknown option {word!r}: {hint}see {self.prog} --help; nothing was done")
        return arguments


def _spelled(words: Sequence[str]) -> list[str]:
    """Return ``words`` with ``-`` in the names of options, and dotted keys as ``--options=key=value``."""
    result: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word == "--":
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        head, dot, key = name.partition(".")
        head = head.replace("_", "-")
        if not dot:
            result.append(head + equals + value)
            continue
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"option {name} needs a value; write {name} VALUE")
            value = remaining.pop(0)
        result.append(f"{head}={key}={value}")
    return result


def typed(kind: str) -> Callable[[str], Any]:
    """Return a converter for argparse."""

    def read(text: str) -> Any:
        try:
            return convert(kind, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


@final
class _Mapping(argparse.Action):
    """Collects ``--options key=value`` and ``--options '{key: value}'`` into one dictionary."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        found = dict(getattr(namespace, self.dest, None) or {})
        key, equals, value = values.partition("=")
        if values.lstrip().startswith("{"):
            try:
                more = parse_yaml(values)
            except Exception:  # YAML has many ways to be wrong
                more = None
            if not isinstance(more, dict):
                parser.error(f"argument {option_string}: {values!r} is no mapping; write {option_string}.KEY VALUE")
            found |= convert("dict", more)
        elif equals and key.isidentifier():
            found[key] = guess(value)
        else:
            parser.error(f"argument {option_string}: {values!r} is no KEY=VALUE; write {option_string}.KEY VALUE")
        setattr(namespace, self.dest, found)


# --- options from a dataclass


def field_help(cls: type) -> dict[str, str]:
    """Return what the docstring of ``cls`` says of each field, as plain text."""
    return {name: text.replace("``", "") for name, text in configs.field_help(cls).items()}


@final
class _Switch(argparse.BooleanOptionalAction):
    """``--name`` and ``--no-name``; its help says what it is told to, whatever the version of Python."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: Any = None, help: str | None = None) -> None:
        super().__init__(option_strings, dest, default)
        self.help = help


def add_fields(
    parser: argparse.ArgumentParser, cls: type, *, title: str, skip: Sequence[str] = (), only: Sequence[str] = ()
) -> None:
    """Add an option for every field of a dataclass; what is not given is not in the namespace."""
    group = parser.add_argument_group(title)
    explained = field_help(cls)
    for item in dataclasses.fields(cls):
        if item.name in skip or (only and item.name not in only):
            continue
        kind = kinds_of(cls)[item.name]
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(explained, item)}
        if "bool" in kind:
            settings |= {"nargs": "?", "const": True}
        _add_field(group, item.name, kind, settings)


def add_config(
    parser: argparse.ArgumentParser,
    cls: type[Config],
    *,
    title: str,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    otherwise: Mapping[str, str] | None = None,
) -> None:
    """Add an option for every field of the config of a verb, with its default; :func:`config_of` reads them.

    Args:
        parser: gets the options.
        cls: the config.
        title: of the group of options.
        skip: fields that are no options.
        only: fields that are, where not all are.
        otherwise: field -> what it is where it is not given, if not the default of the field; then it is None.
    """
    group = parser.add_argument_group(title)
    explained, otherwise = field_help(cls), otherwise or {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]  # subclasses are dataclasses
        if item.name in skip or (only and item.name not in only):
            continue
        instead = otherwise.get(item.name)
        settings: dict[str, Any] = {
            "default": None if instead else item.default, "help": _help(explained, item, instead)
        }  # fmt: skip
        kind = kinds_of(cls)[item.name]
        if "bool" in kind:
            settings["action"] = _Switch  # a value would take the place of the RUN that may follow
        _add_field(group, item.name, kind, settings)


def config_of(cls: type[C], arguments: argparse.Namespace) -> C:
    """Return the config that the options of :func:`add_config` give; what is None there has its default.

    Raises:
        ConfigError: a value is not allowed.
    """
    values = {name: getattr(arguments, name, None) for name in kinds_of(cls)}
    return cls.from_dict({name: value for name, value in values.items() if value is not None})


def _help(explained: Mapping[str, str], item: dataclasses.Field[Any], instead: str | None = None) -> str:
    text = explained.get(item.name, "").rstrip(".").replace("%", "%%")
    if instead is not None:
        return f"{text} (default: {instead})"
    if item.default in (None, dataclasses.MISSING):
        return text
    return f"{text} (default {str(item.default).lower() if isinstance(item.default, bool) else item.default})"


def _add_field(group: Any, field: str, kind: str, settings: dict[str, Any]) -> None:
    name = "--" + field.replace("_", "-")
    if kind.startswith("dict"):
        settings |= {"action": _Mapping, "metavar": "KEY=VALUE"}
    elif "action" not in settings:
        settings |= {"type": typed(kind), "metavar": "true|false" if "bool" in kind else _metavar(kind)}
    group.add_argument(name, dest=field, **settings)


def _metavar(kind: str) -> str:
    return {"int": "N", "float": "X", "str": "NAME", "list[int]": "N,N"}.get(kind.split(" |")[0], "VALUE")


def add_mapping(parser: argparse.ArgumentParser, name: str, *, help: str) -> None:
    """Add an option that is a mapping: ``--name.key value``."""
    parser.add_argument(name, action=_Mapping, metavar="KEY=VALUE", help=help)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON on standard output, for programs")


def words(text: str, what: str) -> list[str]:
    """Split a comma-separated list.

    Raises:
        ConfigError: it is empty.
    """
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise ConfigError(f"{what} is empty; give at least one, separated by commas")
    return list(dict.fromkeys(found))


def own_parts_told() -> str:
    """Return, for a help page, which parts are registered that are none of this package's; nothing where none are."""
    from learn2perturb.plugins import told
    from learn2perturb.registry import REGISTRIES

    lines = [
        f"  {registry.kind} {entry.name} ({entry.package or told({'module': entry.module})})"
        for registry in REGISTRIES
        for entry in registry.own()
    ]
    return "\n\nparts of your own:\n" + "\n".join(lines) if lines else ""


# --- output


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=1))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table: rich on a terminal, plain aligned text elsewhere."""
    import sys

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(visible(title)) if title else None, title_justify="left")
        for column in head:
            table.add_column(Text(visible(column)))
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        Console(file=trusted(sys.stdout)).print(table)
        return
    if title:
        print(title)
    for line in aligned([head, *rows]):
        print(line)
