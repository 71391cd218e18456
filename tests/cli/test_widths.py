"""Tables of every verb that prints one: no line wider than the terminal, and no number lost."""

from __future__ import annotations

import re

import pytest

from learn2perturb.cli.main import VERBS, main

TRAIN = ("train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--device=cpu", "--engine=plain",
         "--epochs=1", "--limit=16", "--monitor=0", "--tensorboard=false", "--attack-steps=1")  # fmt: skip
LONG = "a_very_long_name_of_a_row=pgd:steps=2,step_size=0.0123456789,eot=3,eot_average=probability"
JUDGE = ("--attacks", "fgsm,pgd7,eot-pgd7", "--attack", LONG, "--draws", "2", "--limit", "4")
STUDY = """
title: Widths
train: {dataset: digits, model: digits_cnn, recipe: fast, epochs: 1, limit: 16, monitor: 0, tensorboard: false,
  attack_steps: 1}
runs: {one: {defense: [pgd_at, learn2perturb]}}
evaluate: {limit: 4, draws: 2}
cells: {pgd: {attack: fgsm, eps: [0.01, 0.02, 0.03, 0.04]}}
views: {wide: {rows: [run], columns: [cell, eps], baseline: {defense: pgd_at}}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths")
    for name in ("pgd_at", "learn2perturb"):
        assert main([*TRAIN, "--defense", name, "--out", str(folder / f"a-run-of-{name}-with-a-long-name")]) == 0
    (folder / "study.yaml").write_text(STUDY)
    return folder


def lines_of_tables(text: str) -> list[str]:
    """Return the lines of the tables in ``text``: the head, the rule, and all to the next blank line."""
    lines, found = text.splitlines(), []
    for number, line in enumerate(lines):
        if re.fullmatch(r" *-+(  +-+)* *", line):
            start = next(n for n in range(number, -1, -1) if n == 0 or not lines[n - 1])
            end = next((n for n in range(number, len(lines)) if not lines[n]), len(lines))
            found += lines[start:end]
    return found


BOTH = [f"RUNS/a-run-of-{name}-with-a-long-name" for name in ("pgd_at", "learn2perturb")]
WORDS = {
    "train": [*TRAIN, "--defense=none", "--out=there"],
    "evaluate": ["evaluate", "RUNS/a-run-of-learn2perturb-with-a-long-name", *JUDGE],
    "evaluate several": ["evaluate", *BOTH, *JUDGE],
    "study": ["study", "RUNS/study.yaml", "--store", "store", "--out", "tables"],
    "study --list": ["study", "--list"],
    "study --plan": ["study", "RUNS/study.yaml", "--store", "another", "--plan"],
    "list": ["list", "defenses"],
}  # fmt: skip
NO_TABLE = {"list"}  # lines of text


@pytest.mark.parametrize("kind", WORDS)
def test_no_line_of_a_table_is_wider_than_the_terminal(kind, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RUNS", str(runs)) for word in WORDS[kind]]
    assert words[0] in VERBS
    said = {}
    for width in (80, 300) if kind.startswith("evaluate") else (80,):
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        assert main(words) == 0
        said[width] = capsys.readouterr().out
    lines = lines_of_tables(said[80])
    assert bool(lines) is (kind not in NO_TABLE)
    assert [line for line in lines if len(line) > 80] == []
    if kind.startswith("evaluate"):  # seeded: the same numbers, wherever they are
        assert numbers(said[80]) == numbers(said[300])


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", "\n".join(lines_of_tables(text)))) - {"0.0123456789"}
