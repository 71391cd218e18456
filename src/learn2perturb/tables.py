"""Tables as aligned text that fit the terminal: cells are wrapped, then columns go below; no character is lost.

Knows no torch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

WIDTH = 80  # of what is no terminal and says nothing of its width
_GAP = "  "
# Where a cell may go on in a line below: at a space, and after what joins words; never inside a number.
_PLACES = re.compile(r"(?<=[,:=+/_|])(?=[^\d\s-])|(?<=[a-z])(?=-[a-z])")
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
    least = [max(_least(row[column]) for row in cells) for column in range(len(cells[0]))]
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
    """Return the width of each column: what it needs, and less of the widest ones where a line would be too long."""
    columns = range(len(cells[0]))
    widths = [max(len(row[column]) for row in cells) for column in columns]
    least = [max(_least(row[column]) for row in cells) for column in columns]
    body = [max((len(row[column]) for row in cells[1:]), default=0) for column in columns]
    room = width - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room:
        spare = [column for column in columns if widths[column] > least[column]]
        if not spare:  # a single word is wider than the terminal: it is cut, in the widest column
            spare = [column for column in columns if widths[column] > 1]
            if not spare:
                break
        # A head on two lines first, so that a number stays beside its deviation.
        widths[max(spare, key=lambda column: (widths[column] > body[column], widths[column]))] -= 1
    return widths


def _pieces(cell: str) -> list[str]:
    """Return a cell in pieces between which it may be wrapped; together they are the cell."""
    return [piece for word in re.split(r"(?<= )", cell) for piece in _PLACES.split(word) if piece]


def _least(cell: str) -> int:
    return max((len(piece.rstrip()) for piece in _pieces(cell)), default=0)


def _wrapped(cell: str, room: int) -> list[str]:
    """Return a cell as lines no wider than ``room``."""
    lines, line = [], ""
    for piece in _pieces(cell):
        if line and len((line + piece).rstrip()) > room:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line.rstrip()) > room:
            lines.append(line[:room])
            line = line[room:]
    return [*lines, line.rstrip()]
