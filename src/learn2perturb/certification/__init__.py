"""Certified radii: the first noise module, randomised smoothing, PixelDP; the risk gap; their records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.lazy import lazily

if TYPE_CHECKING:
    from learn2perturb.certification.certifying import certify
    from learn2perturb.certification.config import CertifyConfig
    from learn2perturb.certification.gap import RiskGap
    from learn2perturb.certification.record import Certification
    from learn2perturb.certification.renyi import risk_gap

__all__ = ["Certification", "CertifyConfig", "RiskGap", "certify", "risk_gap"]

__getattr__ = lazily(
    __name__,
    {
        "Certification": "record",
        "CertifyConfig": "config",
        "RiskGap": "gap",
        "certify": "certifying",
        "risk_gap": "renyi",
    },
)
