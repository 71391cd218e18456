"""Attacks are shown by short names, no two of which are the same."""

from __future__ import annotations

import dataclasses

import pytest

import learn2perturb as l2p
from learn2perturb.attacks import FGSM, PGD, Source, Transfer
from learn2perturb.experiments.tasks import row_name
from learn2perturb.report.naming import label, short_names
from tests.report.test_report import images, noisy


def rows(**attacks):
    """Return rows whose names say all their settings, as those of studies do."""
    named = {row_name(attack): attack for attack in attacks.values()}
    return l2p.evaluate(noisy, images(8), named, draws=2, clean=False, progress=False).rows


PGD20 = PGD(0.1, 0.01, 20)


@pytest.mark.parametrize(
    ("attacks", "expected"),
    [
        ([FGSM(0.1)], ["FGSM"]),
        ([PGD20], ["PGD-20"]),
        ([dataclasses.replace(PGD20, eot=3), PGD20], ["EOT-3 PGD-20", "PGD-20"]),
        (
            [PGD20, dataclasses.replace(PGD20, loss="margin")],
            ["PGD-20", "PGD-20 (loss=margin)"],
        ),
        (
            [PGD20, dataclasses.replace(PGD20, step_size=0.05)],
            ["PGD-20 (step_size=0.01)", "PGD-20 (step_size=0.05)"],
        ),
    ],
)
def test_a_name_says_what_people_call_it_and_what_tells_it_from_the_others(attacks, expected):
    found = rows(**{str(number): attack for number, attack in enumerate(attacks)})
    names = short_names(found)
    assert [names[row.attack] for row in found] == expected
    assert [label(row, names) for row in found] == [f"{name} 0.1" for name in expected]


def test_a_transferred_attack_says_from_where():
    attack = Transfer(attack=PGD20, source=Source(noisy, "twin"))
    found = l2p.evaluate(
        noisy, images(8), {f"{row_name(PGD20)} from twin": attack}, draws=2, clean=False, progress=False
    )
    assert list(short_names(found.rows).values()) == ["PGD-20 from twin"]


@pytest.mark.parametrize("name", ["mine", "pgd20", "a: b", "strong:", "<b>:x</b>"])
def test_other_names_stay_as_they_are(name):
    found = l2p.evaluate(noisy, images(8), {name: PGD20}, draws=2, clean=False, progress=False)
    assert short_names(found.rows) == {name: name}
