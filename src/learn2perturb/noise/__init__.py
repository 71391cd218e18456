"""What perturbs: noise on features and on weights, and how it gets into any network."""

from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.correlated import CorrelatedNoise
from learn2perturb.noise.deviations import feature_deviations
from learn2perturb.noise.distributions import DISTRIBUTIONS, register_distribution
from learn2perturb.noise.gain import RandomGain
from learn2perturb.noise.inject import (
    add_noise,
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
    perturb_images,
    perturb_weights,
    remove_noise,
    set_noise,
    vary_weights,
)
from learn2perturb.noise.laws import (
    Multiplicative,
    Perturbation,
    VariationalWeight,
    WeightPerturbation,
    kl_divergence,
    register_noise,
)
from learn2perturb.noise.members import RandomMember, random_members
from learn2perturb.noise.norms import RandomNorm
from learn2perturb.noise.projection import RandomProjection
from learn2perturb.noise.quiet import NoiseFree

__all__ = [
    "DISTRIBUTIONS",
    "CorrelatedNoise",
    "Multiplicative",
    "NoiseFree",
    "NoiseModule",
    "Perturbation",
    "RandomGain",
    "RandomMember",
    "RandomNorm",
    "RandomProjection",
    "VariationalWeight",
    "WeightPerturbation",
    "add_noise",
    "feature_deviations",
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
    "perturb_images",
    "perturb_weights",
    "random_members",
    "register_distribution",
    "register_noise",
    "remove_noise",
    "set_noise",
    "vary_weights",
]
