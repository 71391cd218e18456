"""The words of the field: no text of the project falls back into a dialect that only its authors understand."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What is not said -> what is. A key of stored checkpoints, "gear" in quotes, stays: old runs are read by it.
INSTEAD = {
    r"(?<![a-z\"'`])gear(?!box)": "execution mode",
    r"(?<![a-z])mend(s|ed|ing)?(?![a-z])": "fix",
    r"(?<![a-z])reckon": "estimate",
    r"\bto\s+be\s+had\b": "available",
    r"\b(one's|his) own\b": "custom",
    r"(?<![a-z])textbook": "baseline",
    r"\bthe floor\b|floor_share": "roofline",
}
SUFFIXES = (".py", ".md", ".yaml", ".toml")
# The log tells what was said when; this file has to name the words.
EXEMPT = ("docs/log.md", "tests/test_words.py")


def pages() -> Iterator[pathlib.Path]:
    """Yield the files whose words are kept."""
    for folder in ("src", "docs", "tests", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.relative_to(ROOT).as_posix() not in EXEMPT:
                yield path
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml"))


def text_of(path: pathlib.Path) -> str:
    """Return the text, of the changelog only what is not released: history stays as it was written."""
    text = path.read_text(encoding="utf-8")
    return text.partition("\n## [0.1.0]")[0] if path.name == "CHANGELOG.md" else text


def dialect(text: str) -> list[str]:
    """Return a line for each word that has a better one."""
    return [
        f"line {text.count(chr(10), 0, found.start()) + 1}: {found[0]!r}; say {word!r}"
        for pattern, word in INSTEAD.items()
        for found in re.finditer(pattern, text, re.IGNORECASE)
    ]


def test_every_text_speaks_the_words_of_the_field():
    texts = {path.relative_to(ROOT).as_posix(): text_of(path) for path in pages()}
    assert len(texts) > 400, "the folders have moved"
    found = {name: lines for name, text in texts.items() if (lines := dialect(text))}
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "the gears that run", "def geared_call(", "class Gear:", "_MEND = ''", "self._mend()", "mended by size",
        "reckoned from", "what is not to\nbe had here", "a law of one's own", "textbook code", "below the floor",
    ],
)  # fmt: skip
def test_the_dialect_is_recognised(text):
    assert len(dialect(text)) == 1


@pytest.mark.parametrize(
    "text", ['state["gear"]', "we recommend it", "torch.floor(x)", "an amended law", "a module of its own", "dimension"]
)
def test_plain_words_are_left_alone(text):
    assert dialect(text) == []
