"""Tables as aligned text that fit the terminal: cells are wrapped, then columns go below; no character is lost.

Knows no torch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence

WIDTH = 80  # of what is no terminal and says nothing of its width
_GAP = "  "
# Where a cell may go on in a line below: at a space, and after what joins words; never inside a number.
_SPACE = re.compile(r"(?<= )")
_SETTINGS = re.compile(r"(?<=[,:+/|])(?=[^\d\s-])")
_PLACES = re.compile(r"(?<=[,:=+/_|])(?=[^\d\s-])|(?<=[a-z])(?=-[a-z])")
# Words that are read as one: a number with its deviation, unit and interval, "1 of 4", "seed 2".
_NUMBER = re.compile(r"[+-]?\d[\d.,/]*(?:e[+-]?\d+)?%?")
_JOINS = ("of", "±", "+-", "%")
_LONGEST_UNIT = 6  # letters: "points", "images"
Cells = Sequence[str]


def terminal_width() -> int:
    """Return how many columns there are: of the terminal, or as COLUMNS says, else 80."""
    return max(shutil.get_terminal_size((WIDTH, 24)).columns, 20)


def aligned(rows: Sequence[Cells], *, right: Sequence[bool] = (), width: int | None = None) -> list[str]:
    """Return rows as lines no wider than ``width``, the first row the head.

    Too wide a table has its widest cells wrapped. Where not even that is enough, its last columns follow below, each
    part with the first column before it.

    Args:
        rows: of equally many cells.
        right: for each column whether it is flush right; left where it is not said.
        width: most columns of a line; those of the terminal by default.
    """
    width = terminal_width() if width is None else width
    cells = [[str(cell) for cell in row] for row in rows]
    flush = [*right, *[False] * (len(cells[0]) - len(right))]
    parts = _parts(cells, width)
    found: list[str] = []
    for columns in parts:
        found += [""] if found else []
        found += _lines([[row[column] for column in columns] for row in cells], [flush[c] for c in columns], width)
    return found


def _parts(cells: list[list[str]], width: int) -> list[list[int]]:
    """Return the columns of each part of a table, of which every part fits."""
    least = [max(_least(row[column], _anywhere) for row in cells) for column in range(len(cells[0]))]
    first, *others = range(len(least))
    # The first column tells the rows apart: it is before every part, wrapped as far as it can be.
    parts: list[list[int]] = [[first]]
    for column in others:
        taken = sum(least[one] + len(_GAP) for one in parts[-1])
        if taken + least[column] > width and len(parts[-1]) > 1:
            parts.append([first])
        parts[-1].append(column)
    return parts


def _lines(cells: list[list[str]], flush: list[bool], width: int) -> list[str]:
    widths = _widths(cells, width)
    lines: list[str] = []
    for number, row in enumerate(cells):
        wrapped = [_wrapped(cell, room) for cell, room in zip(row, widths, strict=True)]
        for place in range(max(map(len, wrapped))):
            texts = [parts[place] if place < len(parts) else "" for parts in wrapped]
            shown = (
                text.rjust(room) if end else text.ljust(room)
                for text, room, end in zip(texts, widths, flush, strict=True)
            )  # fmt: skip
            lines.append(_GAP.join(shown).rstrip())
        if number == 0:
            lines.append(_GAP.join("-" * room for room in widths))
    return lines


def _widths(cells: list[list[str]], width: int) -> list[int]:
    """Return the width of each column: what it needs, and less of the widest ones where a line would be too long.

    Heads are wrapped first, at words; then the widest cells at words, at what joins words, and last inside of them.
    """
    columns = range(len(cells[0]))
    whole = [max(len(row[column]) for row in cells) for column in columns]
    body = [max((len(row[column]) for row in cells[1:]), default=0) for column in columns]
    room = width - len(_GAP) * (len(whole) - 1)
    widths = list(whole)
    for at in (*_FINER, _letters):
        least = [max(_least(row[column], at) for row in cells) for column in columns]
        heads = [max(least[column], min(body[column], widths[column])) for column in columns]
        for bound in (heads, least):
            _narrow(widths, bound, room)
        if sum(widths) <= room:
            break
    # Lines break at words and rarely fill a column: what is left over goes to those that need little more.
    widths = [max(len(line) for row in cells for line in _wrapped(row[column], widths[column])) for column in columns]
    for column in sorted(columns, key=lambda one: whole[one] - widths[one]):
        if sum(widths) - widths[column] + whole[column] <= room:
            widths[column] = whole[column]
    return widths


def _narrow(widths: list[int], bound: Sequence[int], room: int) -> None:
    """Take from the widest column, one at a time and none below its ``bound``, until all fit into ``room``."""
    while sum(widths) > room:
        spare = [column for column in range(len(widths)) if widths[column] > bound[column]]
        if not spare:
            return
        widths[max(spare, key=lambda column: widths[column])] -= 1


# A cell in pieces between which it may be wrapped; together they are the cell.
_Pieces = Callable[[str], list[str]]


def _between_words(cell: str) -> list[str]:
    pieces: list[str] = []
    for word in _SPACE.split(cell):
        if pieces and _is_one(pieces[-1].split(), word.strip(), within=pieces[-1]):
            pieces[-1] += word
        else:
            pieces.append(word)
    return [piece for piece in pieces if piece]


def _is_one(before: list[str], word: str, within: str) -> bool:
    """Tell whether a word and those ``before`` it are read as one."""
    if not before or not word:
        return False
    last = before[-1]
    inside = within.rfind("[") > within.rfind("]") or within.rfind("(") > within.rfind(")")
    if inside and _is_number(last.strip("[(,")) and _is_number(word.strip("]),.;")):
        return True  # both ends of an interval
    if last[-1] in ",;:":
        return False
    if word[0] in "[(" and word[1:2].isdigit():
        return any(map(_is_number, before[-2:]))  # an interval follows its number, or the unit of that
    if _is_number(last):
        return word in _JOINS or (word.rstrip(",;:.").isalpha() and len(word) <= _LONGEST_UNIT)
    return _is_number(word.rstrip(",;:.")) and (last in _JOINS or last.isalpha())


def _is_number(word: str) -> bool:
    return _NUMBER.fullmatch(word) is not None


def _between_settings(cell: str) -> list[str]:
    return [piece for word in _between_words(cell) for piece in _SETTINGS.split(word) if piece]


def _anywhere(cell: str) -> list[str]:
    return [piece for word in _between_words(cell) for piece in _PLACES.split(word) if piece]


def _spaces(cell: str) -> list[str]:
    return _SPACE.split(cell)


# From where a line is best broken to where it may be.
_FINER: tuple[_Pieces, ...] = (_between_words, _between_settings, _anywhere)


def _letters(cell: str) -> list[str]:
    return list(cell)


def _least(cell: str, at: _Pieces) -> int:
    return max((len(piece.rstrip()) for piece in at(cell)), default=0)


def _wrapped(cell: str, room: int) -> list[str]:
    """Return a cell as lines no wider than ``room``, broken at words where these fit."""
    fitting = next((at for at in (*_FINER, _spaces) if _least(cell, at) <= room), _anywhere)
    lines, line = [], ""
    for piece in fitting(cell):
        if line and len((line + piece).rstrip()) > room:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line.rstrip()) > room:
            lines.append(line[:room])
            line = line[room:]
    return [*lines, line.rstrip()]
