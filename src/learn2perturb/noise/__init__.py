"""What perturbs: noise on features and on weights, and how it gets into any network."""

from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.distributions import DISTRIBUTIONS
from learn2perturb.noise.feature import Perturbation
from learn2perturb.noise.inject import (
    fixed_noise,
    insert,
    is_stochastic,
    named_noise,
    noise_disabled,
    noise_modules,
    noise_parameters,
    noise_sites,
    noise_spec,
    perturb,
    perturb_weights,
    remove_noise,
    set_noise,
    vary_weights,
)
from learn2perturb.noise.quiet import NoiseFree
from learn2perturb.noise.weight import VariationalWeight, WeightPerturbation, kl_divergence

__all__ = [
    "DISTRIBUTIONS",
    "NoiseFree",
    "NoiseModule",
    "Perturbation",
    "VariationalWeight",
    "WeightPerturbation",
    "fixed_noise",
    "insert",
    "is_stochastic",
    "kl_divergence",
    "named_noise",
    "noise_disabled",
    "noise_modules",
    "noise_parameters",
    "noise_sites",
    "noise_spec",
    "perturb",
    "perturb_weights",
    "remove_noise",
    "set_noise",
    "vary_weights",
]
