"""The code of a part of the user's: what changes what it does changes its fingerprint, and nothing else does."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest

from learn2perturb.definitions import code_of, home_of, title_of

MODULE = '''
"""Transforms of mine."""
import math
from mine_beside import strength
import mine_whole

LEVEL = 3
TABLE = {}
TABLE["a"] = 1


def helper(x):
    return x + LEVEL


def lookup():
    return TABLE["a"]


def decorated(function):
    def inner(x):
        return function(x) * 1
    return inner


class Base:
    rate = 1.0

    def scaled(self, x):
        return self.rate * x


class Mine(Base):
    """Mine."""

    def __init__(self, size=1):
        self.size = size

    def __call__(self, x):
        return self.scaled(helper(x)) + strength(x) + lookup()


def flip(x):
    """Turn it."""
    return helper(x) + mine_whole.times(x)


@decorated
def wrapped(x):
    return math.floor(x)


def unused(x):
    return 0


def made(size):
    def inner(x):
        return x + size
    return inner


small = lambda x: x + 1
large = lambda x: x + 2
'''
BESIDE = (
    "def strength(x):\n    return limit(x)\n\n\ndef limit(x):\n    return min(x, 1)\n\n\ndef other():\n    return 5\n"
)
WHOLE = "def times(x):\n    return 2 * x\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Give a function that writes the modules, some text in them replaced, and imports them anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(old: str = "", new: str = ""):
        texts = {"mine_main": MODULE, "mine_beside": BESIDE, "mine_whole": WHOLE}
        assert any(old in text for text in texts.values())
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("mine_main")

    return write


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("flip", "return helper(x) + mine", "return helper(x) - mine"),
        ("flip", "LEVEL = 3", "LEVEL = 4"),
        ("flip", "x + LEVEL", "x - LEVEL"),
        ("flip", "2 * x", "3 * x"),
        ("Mine", "rate = 1.0", "rate = 2.0"),
        ("Mine", "min(x, 1)", "max(x, 1)"),
        ("Mine", "size=1", "size=2"),
        ("Mine", 'TABLE["a"] = 1', 'TABLE["a"] = 2'),
        ("wrapped", "function(x) * 1", "function(x) * 2"),
        ("wrapped", "math.floor", "math.ceil"),
        ("small", "x + 1\nlarge", "x - 1\nlarge"),
    ],
)
def test_a_changed_definition_or_what_it_uses_is_another(name, old, new, written):
    before = code_of(getattr(written(), name))
    assert before is not None
    assert code_of(getattr(written(old, new), name)) != before


@pytest.mark.parametrize("name", ["flip", "Mine", "wrapped"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Turn it."""', '"""Turn it over."""'),
        ("import math\n", "import math  # rounds\n\n\n"),
        ("return 0", "return 1"),
        ("return 5", "return 6"),
        ("return x + LEVEL", "return (x\n        + LEVEL)"),
    ],
)
def test_comments_layout_and_what_it_does_not_use_change_nothing(name, old, new, written):
    before = code_of(getattr(written(), name))
    assert code_of(getattr(written(old, new), name)) == before


def test_what_an_object_is_made_with_is_part_of_it(written):
    module = written()
    found = [
        module.Mine, module.Mine(1).scaled, functools.partial(module.flip, 1), functools.partial(module.flip, 2),
        module.made(1), module.made(2), module.small, module.large, module.flip,
    ]  # fmt: skip
    codes = [code_of(one) for one in found]
    assert None not in codes and len(set(codes)) == len(codes)
    assert code_of(functools.partial(module.flip, 1)) == codes[2]
    assert (home_of(found[2]), title_of(found[2])) == ("mine_main", "flip")


def test_a_file_edited_while_it_is_in_use_is_what_was_imported(written, tmp_path):
    module = written()
    before = code_of(module.flip)
    (tmp_path / "mine_main.py").write_text(MODULE.replace("helper(x) +", "helper(x) -"))
    assert code_of(module.flip) == before


def test_what_has_no_text_is_known_by_what_it_compiled_to(tmp_path):
    def shell(text: str):
        space: dict = {"__name__": "__main__"}
        exec(text, space)
        return space["flip"]

    one, other = (shell(f"def flip(x):\n    return x + {number}\n") for number in (1, 2))
    assert code_of(one) not in (None, code_of(other))
    assert code_of(one) == code_of(shell("def flip(x):\n    return x + 1\n"))
    assert code_of(len) is None
