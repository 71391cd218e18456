"""The settings of ``certify``, one source for Python, the command line and the record. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from learn2perturb.checks import check_count, check_size
from learn2perturb.configs import Config
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.config import check_seed
from learn2perturb.sizes import LINF_EPS

METHODS = ("first_noise", "smoothing", "pixeldp")
GAPS = ("renyi",)  # no radii, but how much the risk can grow


@final
@dataclass(frozen=True, kw_only=True)
class CertifyConfig(Config):
    """How the majority vote of a noisy network is certified.

    Args:
        n0: draws that choose the class.
        n: draws that certify it.
        alpha: chance of a wrong certificate, for each image.
        method: ``first_noise`` (Gaussian noise inside, R = Phi^-1(p_low) / S), ``smoothing`` (Cohen et al. 2019,
            noise of ``sigma`` on the image, R = sigma Phi^-1(p_low)), ``pixeldp`` (Lecuyer et al. 2018), ``renyi`` (no
            radius, but how much the risk of a draw can grow; Pinot et al. 2019), or ``auto``: ``smoothing`` where sigma
            is given, else ``first_noise``.
        sigma: standard deviation of the smoothing noise, [0, 1] pixel scale, such as 0.25.
        eps: l_inf size at which the record says whether the certificate is vacuous.
        limit: certify so many images only, balanced over the classes (the first ones of a loader of yours).
        batch_size: images in one pass.
        seed: of all draws.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    method: str = "auto"
    sigma: float | None = None
    eps: float = LINF_EPS
    limit: int | None = None
    batch_size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n0", "n", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("limit", self.limit, optional=True)
        check_size("eps", self.eps, zero=True)
        _ = self.chosen
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, float) or not 0 < self.alpha < 1:
            raise ConfigError(f"alpha is {self.alpha!r}, must be a number in (0, 1); 0.001 is usual")
        check_seed(self.seed)

    @property
    def chosen(self) -> str:
        """The method; what ``auto`` stands for depends on sigma."""
        method, sigma = self.method, self.sigma
        if method not in ("auto", *METHODS, *GAPS):
            raise ConfigError(f"method is {method!r}; allowed: auto, {', '.join((*METHODS, *GAPS))}")
        if method == "auto":
            method = "first_noise" if sigma is None else "smoothing"
        if method == "smoothing":
            number = isinstance(sigma, int | float) and not isinstance(sigma, bool)
            if not number or not 0 < float(sigma or 0) < float("inf"):
                raise ConfigError(
                    f"sigma is {sigma!r}; smoothing needs one above 0, in [0, 1] pixel scale, such as 0.25"
                )
        elif sigma is not None:
            raise ConfigError(f"sigma is {sigma!r} but method {method!r} has the noise of the model; leave sigma out")
        return method
