"""No false pass and no false alarm on defenses from the literature, at the quick budget."""

from __future__ import annotations

import inspect

import pytest
import torch

from learn2perturb.data import load_data
from tests.literature import honest, masked, randomised
from tests.literature.judged import judged
from tests.literature.zoo import HONEST, MASKED, RANDOM, ZOO, by_name

# Cheap ones that need no training but that of one network; all of the zoo is slow.
HANDFUL = (
    pytest.param("bit depth, 4 bits", marks=pytest.mark.slow),
    pytest.param("decoy: linear", marks=pytest.mark.slow),
    pytest.param("noise with one seed", marks=pytest.mark.slow),
    "undefended",
)


def test_the_zoo_has_its_size_and_its_kinds():
    assert len(ZOO) >= 30
    assert len({entry.name for entry in ZOO}) == len(ZOO)
    for kind, entries in (("masked", MASKED), ("random", RANDOM), ("honest", HONEST)):
        assert {entry.kind for entry in entries} == {kind}
        assert len(entries) >= 10


@pytest.mark.parametrize("module", [masked, randomised, honest])
def test_every_defense_says_where_it_is_from(module):
    for name, value in vars(module).items():
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("name", HANDFUL)
def test_a_handful_is_judged_rightly(name):
    found = judged(by_name(name), names=("undefended",), limit=100)
    assert not found.wrong, f"{found.wrong}: {found.found or found.refusal}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_the_whole_zoo_is_judged_rightly(entry):
    found = judged(entry)
    assert not found.wrong, f"{found.wrong}: {found.found or found.refusal}"


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_defense_classifies_the_digits(entry):
    """A defense that has lost its accuracy shows nothing by losing it under attack."""
    digits = load_data("digits", "test")
    with torch.no_grad():
        right = entry.model()(digits.images.float() / 255).argmax(dim=1) == digits.labels
    assert float(right.float().mean()) > 0.6
