"""What perturbs: learned and fixed noise on features, and how it gets into any network."""

from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.distributions import DISTRIBUTIONS
from learn2perturb.noise.feature import Perturbation
from learn2perturb.noise.inject import (
    fixed_noise,
    insert,
    is_stochastic,
    noise_disabled,
    noise_modules,
    noise_parameters,
    noise_sites,
    noise_spec,
    perturb,
    remove_noise,
    set_noise,
)

__all__ = [
    "DISTRIBUTIONS",
    "NoiseModule",
    "Perturbation",
    "fixed_noise",
    "insert",
    "is_stochastic",
    "noise_disabled",
    "noise_modules",
    "noise_parameters",
    "noise_sites",
    "noise_spec",
    "perturb",
    "remove_noise",
    "set_noise",
]
