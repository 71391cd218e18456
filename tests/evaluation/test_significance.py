from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.significance import TWO_SIGMA, exceeds, holm, mcnemar


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    with pytest.raises(ConfigError, match="must lie in"):
        holm([1.2])


def test_holm_keeps_the_family_wise_error():
    rng = np.random.default_rng(0)
    wrong = sum(min(holm(rng.random(15))) < 0.05 for _ in range(2000))
    assert wrong / 2000 == pytest.approx(0.05, abs=0.02)


def test_mcnemar_is_the_sign_test_of_the_disagreements():
    first = np.array([True] * 9 + [False] * 1 + [True] * 50 + [False] * 40)
    second = np.array([False] * 9 + [True] * 1 + [True] * 50 + [False] * 40)
    assert mcnemar(first, second) == pytest.approx(2 * stats.binom.cdf(1, 10, 0.5))
    assert mcnemar(first, first) == 1.0
    with pytest.raises(InputError, match="one boolean an image"):
        mcnemar(first, second[:-1])
    with pytest.raises(InputError, match="one boolean an image"):
        mcnemar(first.astype(float), second)


def test_two_sigma_is_the_level_of_two_standard_errors():
    assert exceeds(2.0, 0.0, 1.0) == pytest.approx(TWO_SIGMA)
    assert exceeds(3.0, 2.0, 1.0) == pytest.approx(stats.norm.sf(1))
    assert exceeds(0.5, 0.5, 0.0) == 1.0
    assert exceeds(0.6, 0.5, 0.0) == 0.0
