"""Zero mean, unit variance, and the right law: in the plain path, the seeded one and the fused one."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from learn2perturb.engine import fused
from learn2perturb.errors import UnknownNameError
from learn2perturb.noise.distributions import DISTRIBUTIONS, check_distribution, draw, draw_seeded

COUNT = 200_000
LAWS = {
    "gaussian": stats.norm,
    "laplace": stats.laplace(scale=0.5**0.5),
    "uniform": stats.uniform(loc=-(3**0.5), scale=2 * 3**0.5),
}


def plain(name):
    return draw(name, (COUNT // 50, 50), torch.device("cpu"))


def seeded(name):
    return draw_seeded(name, (COUNT,), 7)


def counted(name):
    key = torch.tensor([123456789, -987654321], dtype=torch.int32)
    return fused.draws(COUNT // 50, 50, key, fused.quantile_table(name))


def test_every_distribution_has_a_law_here():
    assert set(LAWS) == set(DISTRIBUTIONS)
    assert len(DISTRIBUTIONS) == 3


@pytest.mark.parametrize("path", [plain, seeded, counted])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_their_law_with_unit_variance(name, path):
    numbers = path(name).flatten().double().numpy()
    kurtosis = stats.kurtosis(numbers, fisher=False)
    assert abs(numbers.mean()) < 5 / COUNT**0.5
    assert abs(numbers.var() - 1) < 5 * ((kurtosis - 1) / COUNT) ** 0.5
    assert stats.kstest(numbers, LAWS[name].cdf).pvalue > 1e-4


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_table_has_mean_0_and_variance_1(name):
    table = fused.quantile_table(name).double()
    assert len(table) == 65_536
    assert abs(table.mean().item()) < 1e-7
    assert table.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_the_laplace_map_is_finite_at_the_ends_of_the_unit_interval():
    from learn2perturb.noise.distributions import _laplace

    values = _laplace(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert torch.isfinite(values).all()
    assert values[0] < -10
    assert values[1] == 0
    assert values[2] > 10


def test_an_unknown_distribution_names_its_neighbours():
    with pytest.raises(UnknownNameError, match="did you mean 'laplace'"):
        check_distribution("laplce")
