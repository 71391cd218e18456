"""The list of checks: each knows its question, needs, threshold, cost and function; one more is one function."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch

from learn2perturb.cli.main import main
from learn2perturb.diagnosis import CHECKS, FULL, QUICK, CheckSpec, Diagnosis, diagnose, register_check
from learn2perturb.diagnosis.checks import FAILURES, SHARED, SHARED_BY_ALL, _found
from learn2perturb.errors import ConfigError
from tests.problems import Linear
from tests.test_configs import TINY

MINE = '''
"""A check in a file of its own."""

from learn2perturb.diagnosis import CheckSpec, register_check
from learn2perturb.diagnosis.verdict import Draft


def clean_is_right(bench, clean, number):
    """11: what is attacked is right before."""
    return Draft(number, f"{clean.accuracy:.0%} are right", evidence={"clean": clean.accuracy})


register_check(
    CheckSpec(number=11, name="clean images are right", question="is it right?", run=clean_is_right, key=("clean",))
)
'''


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.name)
def test_a_check_is_told_whole_and_its_function_asks_for_what_is_shared(check):
    assert CHECKS[check.number] is check
    assert check.question.endswith("?")
    assert check.failing in FAILURES
    assert set(check.needs) <= {"gradients", "noise"}
    for home, known in ((check.run, SHARED), (check.without_gradients, (*SHARED_BY_ALL, "reason"))):
        if home is not None:
            function = _found(home)
            assert set(inspect.signature(function).parameters) <= {*known, "number"}
            assert str(function.__doc__).startswith(f"{check.number}: ")
    assert 0 <= check.allowed < 1
    for budget in (QUICK, FULL):
        assert check.cost(budget, True) >= check.cost(budget, False) >= 0


def test_checks_are_numbered_in_order_and_thresholds_are_what_they_allow():
    assert list(CHECKS) == list(range(1, len(CHECKS) + 1))
    assert {number: check.allowed for number, check in CHECKS.items()} == {
        1: 0, 2: 0, 3: 0.01, 4: 0.01, 5: 0, 6: 0.05, 7: 0.005, 8: 0.02, 9: 0.1, 10: 0.1,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # a linear model of two images, of which much is said that is not asked here
def test_a_check_more_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "check_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("check_of_mine")
        data = (torch.rand(8, 1, 4, 4), torch.tensor([0, 1] * 4))
        found = diagnose(Linear((1, 4, 4)), data, budget=TINY, eps=0.1, progress=None)
        assert [check.number for check in found.checks] == list(CHECKS)
        mine = found.check(11)
        assert (mine.name, mine.status) == ("clean images are right", "passed")
        assert "clean images are right" in str(found)
        path = found.save(tmp_path / "record.json")
        assert Diagnosis.load(path) == found
        assert main(["list", "checks"]) == 0
        assert "clean images are right: is it right?" in capsys.readouterr().out
    finally:
        CHECKS.pop(11, None)
        sys.modules.pop("check_of_mine", None)
    elsewhere = Diagnosis.load(path)  # where nobody has registered it
    assert elsewhere == found
    assert "clean images are right" in str(elsewhere)


def test_what_no_check_can_be_is_refused():
    def asks(bench, pictures):
        """11: ."""

    with pytest.raises(ConfigError, match="asks for pictures; what is shared: bench, claimed"):
        register_check(CheckSpec(number=11, name="a", question="a?", run=asks))
    with pytest.raises(ConfigError, match="asks for clean"):
        register_check(CheckSpec(number=11, name="a", question="a?", run=lambda clean: None, needs=()))
    with pytest.raises(ConfigError, match="check 3 is no number above 10"):
        register_check(CheckSpec(number=3, name="a", question="a?", run="draws:real"))
    assert len(CHECKS) == 10
