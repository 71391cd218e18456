"""The settings of ``diagnose``, one source for Python, the command line and the record. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, final

from learn2perturb.checks import check_choice, check_count, check_flag
from learn2perturb.configs import ENGINES, Config
from learn2perturb.diagnosis.budget import Budget, budget_from, budget_of
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.config import check_seed

if TYPE_CHECKING:
    from learn2perturb.diagnosis.claim import Claim


@final
@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(Config):
    """How the robustness of a model is diagnosed: everything but the model, its images and other networks.

    Args:
        budget: ``quick`` (minutes on a CPU), ``full`` (a report), or a :class:`Budget`.
        eps: radius of the ball, [0, 1] pixel scale; that of the attack, by default 8/255 in l_inf; l2 has no default.
        norm: of the ball, ``linf`` or ``l2``; that of the attack, by default ``linf``.
        claim: accuracy that is claimed, to be confirmed or refuted: a share, or a text such as
            '51 % under pgd20 with 8/255', '51 % under l2 0.5 by vote of 10 of 99 images'. Its attack, norm, eps and
            images are taken where no others are given.
        stochastic: whether the model is said to be random; if nothing is said it is found out. Say so of a foreign
            model, and draws that are missing are caught; say no of one that seeds a generator to make up a fixed
            function.
        bpda: submodules whose gradient the identity's replaces in an attack of its own, by globs of their names with
            commas between ('quantise,pre.*'): for rounding, JPEG and other transforms that stand near the identity.
        seed: of attacks, scoring and everything else.
        limit: use so many images, in place of the budget's number.
        batch_size: images in one pass; a batch is attacked hundreds of times, so that a small one shows progress.
        engine: attacks are crafted in ``plain`` or ``fast32`` (float32), ``fast`` or ``auto`` (bfloat16); by default in
            float32, in ``fast32`` where the work is long enough. Scoring is in float32, always.
    """

    budget: str | Budget = "quick"
    eps: float | None = None
    norm: str | None = None
    claim: Claim | str | float | None = None
    stochastic: bool | None = None
    bpda: str | None = None
    seed: int = 0
    limit: int | None = None
    batch_size: int = 100
    engine: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_count("batch_size", self.batch_size)
        check_count("limit", self.limit, optional=True)
        check_flag("stochastic", self.stochastic, optional=True)
        check_choice("norm", self.norm, ("linf", "l2"), optional=True)
        if self.bpda is not None and (not isinstance(self.bpda, str) or not self.bpda.strip()):
            raise ConfigError(f"bpda is {self.bpda!r}, must be globs of names of submodules such as 'quantise'")
        check_choice("engine", self.engine, ENGINES, optional=True)
        budget_of(self.budget)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values; a custom budget is a mapping of all its numbers.

        Raises:
            UnknownNameError: a key is no field.
            ConfigError: a value is not allowed.
        """
        own = values.get("budget") if isinstance(values, Mapping) else None
        return super().from_dict({**values, "budget": budget_from(own)} if isinstance(own, Mapping) else values)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values."""
        claim = self.claim
        said = claim if claim is None or isinstance(claim, str | float | int) else str(claim)
        return super(DiagnoseConfig, replace(self, claim=said)).to_dict()
