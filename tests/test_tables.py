"""Tables of text: no line is wider than it may be, and no character of any cell is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from learn2perturb.tables import aligned, terminal_width

CELLS = st.text(alphabet="ab1,=:/.-+_ [", max_size=40).map(lambda text: " ".join(text.split()))


@given(
    st.integers(1, 6).flatmap(
        lambda columns: st.lists(st.lists(CELLS, min_size=columns, max_size=columns), min_size=1, max_size=4)
    ),
    st.integers(24, 90),
)
@settings(max_examples=150, deadline=None)
def test_lines_fit_and_nothing_is_lost(rows, width):
    lines = aligned(rows, width=width)
    assert all(len(line) <= width for line in lines), lines
    assume(all(any(row) for row in rows))  # a row without a word is an empty line, as between two parts
    letters = lambda texts: sorted("".join(texts).replace(" ", "").replace("-", ""))  # noqa: E731
    parts = sum(bool(re.fullmatch(r"-+(  -+)*", line) or not line) for line in lines)
    repeated = [row[0] for row in rows for _ in range(lines.count(""))]  # the first column is before every part
    if parts == 1 or all(row[0] for row in rows):
        assert letters(lines) == letters([cell for row in rows for cell in row] + repeated)


def test_a_table_that_fits_is_as_it_was():
    assert aligned([("a", "long name"), ("1", "x")], right=(True, False), width=80) == [
        "a  long name", "-  ---------", "1  x",
    ]  # fmt: skip


def test_wide_cells_are_wrapped_at_words_and_numbers_stay_whole():
    name = "strong=pgd:steps=50,step_size=0.00784314,eot=20,eot_average=probability"
    lines = aligned([("attack", "eps", "interval"), (name, "8/255", "[97.10, 99.30]")], width=40)
    assert max(map(len, lines)) <= 40
    assert lines[0].split() == ["attack", "eps", "interval"]
    for number in ("0.00784314", "8/255", "97.10", "99.30", "50", "20"):
        assert any(re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", line) for line in lines), number


def test_a_head_goes_on_two_lines_before_a_number_does():
    lines = aligned([("a", "worst of 10"), ("79.90 +- 0.12", "9")], width=22)
    assert lines == ["a              worst", "               of 10", "-------------  -----", "79.90 +- 0.12  9"]


@pytest.mark.parametrize(
    "together",
    ["1 of 4", "seed 2", "38.12 ± 0.40", "290.2 days", "[37.20, 39.04]", "38 % [24, 41]", "+2.10 points [1.02, 3.20]"],
)
def test_what_is_read_as_one_number_is_on_one_line(together):
    rows = [
        ("run", "accuracy of 10 scorings", "records that are there", "what was found"),
        ("resnet18, learn2perturb_r, one of many", together, together, f"the first is better: {together}, as seen"),
        ("b", "1", "2", "c"),
    ]
    for width in range(20 + len(together), 100):
        lines = aligned(rows, width=width)
        assert max(map(len, lines)) <= width
        assert "\n".join(lines).count(together) == 3, lines


def test_a_head_is_broken_at_words_and_the_widest_column_alone_gives_way():
    rows = [("run", "network", "training", "records", "evaluation")]
    rows += [(f"resnet20, {one}, seed 2", "to be trained", "290.2 days", "1 of 4", "115.5 min")
             for one in ("none", "learn2perturb_r")]  # fmt: skip
    assert aligned(rows, width=80) == [
        "run                         network        training    records  evaluation",
        "--------------------------  -------------  ----------  -------  ----------",
        "resnet20, none, seed 2      to be trained  290.2 days  1 of 4   115.5 min",
        "resnet20, learn2perturb_r,  to be trained  290.2 days  1 of 4   115.5 min",
        "seed 2",
    ]


def test_settings_are_broken_after_a_comma_rather_than_in_a_name():
    assert aligned([("attack", "n"), ("strong=pgd:steps=50,step_size=0.007,eot=20", "5")], width=32) == [
        "attack                  n", "----------------------  -", "strong=pgd:steps=50,    5",
        "step_size=0.007,eot=20",
    ]  # fmt: skip


def test_many_columns_go_below_with_the_first_one_before_them():
    rows = [("run", *(f"attack number {n}" for n in range(9))), ("mine", *(f"{10.0 + n:.2f}" for n in range(9)))]
    lines = aligned(rows, width=40)
    assert max(map(len, lines)) <= 40
    assert sum(line.startswith("mine") for line in lines) == lines.count("") + 1 >= 2
    assert all(f"{10.0 + n:.2f}" in " ".join(lines) for n in range(9))


@pytest.mark.parametrize(("said", "width"), [("120", 120), ("80", 80), ("5", 20), ("no", 80)])
def test_the_width_is_what_columns_says(said, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", said)
    assert terminal_width() == width
