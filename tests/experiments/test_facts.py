"""Published numbers: whole tables, and numbers that bear each other out but for those that are marked as suspect."""

from __future__ import annotations

import itertools
import math

import pytest

from learn2perturb import build_model
from learn2perturb.errors import UnknownNameError
from learn2perturb.experiments.facts import Facts, known, published

TABLES = {"table1": 36, "table2": 72, "table3": 25, "table4": 12, "table5": 30, "table6": 48, "eot": 3}
FIGURES = ("figure2", "figure3", "figure4", "figure5", "figure6")


def values(facts: Facts, key: str) -> list[str]:
    """Return the names at one level of a table's cells, each once."""
    place = facts.keys.index(key)
    return list(dict.fromkeys(cell[place] for cell in facts.cells))


def sound(facts: Facts, **names: str) -> float | None:
    """Return a number that is not suspect."""
    found = facts.cell(**names)
    return None if found is None or found.suspect is not None else found.mean


def test_every_table_and_figure_of_the_paper_is_there():
    assert set(known()) == {*TABLES, *FIGURES}
    for name, cells in TABLES.items():
        assert len(published(name).cells) == cells, name
    for name in FIGURES:
        assert published(name).cells == {}
        assert published(name).claims
    with pytest.raises(UnknownNameError, match="unknown table 'table7'"):
        published("table7")


@pytest.mark.parametrize("name", TABLES)
def test_numbers_are_accuracies_with_deviations_and_names_that_exist(name):
    facts = published(name)
    for cell, number in facts.cells.items():
        assert len(cell) == len(facts.keys)
        assert 0 <= number.mean <= 1
        assert number.std is None or 0 <= number.std < 0.06
    from learn2perturb.registry import DEFENSES, MODELS

    for key, registry in (("defense", DEFENSES), ("source", DEFENSES), ("network", MODELS)):
        if key in facts.keys:
            assert all(value in registry for value in values(facts, key)), key


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table5"])
def test_a_table_has_a_number_in_every_place(name):
    facts = published(name)
    assert set(facts.cells) == set(itertools.product(*(values(facts, key) for key in facts.keys)))


@pytest.mark.parametrize("name", TABLES)
def test_a_suspect_number_is_one_of_the_table(name):
    facts = published(name)
    suspect = {cell for cell, number in facts.cells.items() if number.suspect is not None}
    assert len(suspect) == {"table1": 1, "table2": 12, "table3": 2, "table4": 2, "table6": 2}.get(name, 0)


@pytest.mark.parametrize("name", ["table1", "table2", "table6"])
def test_iterating_never_helps_the_defender_but_where_a_number_is_suspect(name):
    facts = published(name)
    others = [key for key in facts.keys if key != "attack"]
    for cell in facts.cells:
        names = {key: cell[facts.keys.index(key)] for key in others}
        fgsm, pgd = (sound(facts, **names, attack=attack) for attack in ("fgsm", "pgd"))
        clean = sound(facts, **names, attack="clean")
        if fgsm is not None and pgd is not None:
            assert pgd <= fgsm, names
        if clean is not None and fgsm is not None:
            assert fgsm <= clean, names


def test_a_stronger_attack_leaves_less_but_where_a_number_is_suspect():
    three, five = published("table3"), published("table5")
    for defense in values(three, "defense"):
        found = [sound(three, kappa=kappa, defense=defense) for kappa in ("0", "0.1", "1", "2", "5")]
        left = [number for number in found if number is not None]
        assert left == sorted(left, reverse=True), defense
    for network, defense in itertools.product(values(five, "network"), values(five, "defense")):
        left = [sound(five, network=network, pixels=pixels, defense=defense) for pixels in "123"]
        assert left == sorted(left, reverse=True), (network, defense)


def test_tables_that_say_the_same_agree_but_where_a_number_is_suspect():
    one, two, four = (published(name) for name in ("table1", "table2", "table4"))
    compared = 0
    for network, attack in itertools.product(values(one, "network"), ("clean", "pgd", "fgsm")):
        names = {"network": network, "attack": attack, "defense": "learn2perturb"}
        if sound(one, **names) is not None and sound(two, **names) is not None:
            assert sound(one, **names) == sound(two, **names), names
            compared += 1
    for defense, network, attack in four.cells:
        names = {"network": network, "attack": attack, "defense": defense}
        if sound(four, **names) is not None and sound(two, **names) is not None:
            assert sound(four, **names) == pytest.approx(sound(two, **names), abs=0.0005), names
            compared += 1
    assert compared == 7 + 4


def test_a_number_of_a_name_is_found_however_it_is_written():
    three = published("table3")
    assert three.cell(kappa="1.0", defense="pni") == three.cell(kappa="1", defense="pni")
    assert three.cell(kappa="1.5", defense="pni") is None


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_networks_have_the_parameters_that_were_published(name):
    facts = published(name)
    assert list(facts.parameters) == values(facts, "network")
    for network, count in facts.parameters.items():
        if network != "resnet18":  # tests/models counts this one; it takes a second to make
            model = build_model(network)
            assert sum(math.prod(parameter.shape) for parameter in model.parameters()) == count, network
