"""Certified radii: the first noise module, randomised smoothing, PixelDP; the risk gap; their records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learn2perturb.certification.certifying import certify
    from learn2perturb.certification.config import CertifyConfig
    from learn2perturb.certification.gap import RiskGap
    from learn2perturb.certification.record import Certification
    from learn2perturb.certification.renyi import risk_gap

__all__ = ["Certification", "CertifyConfig", "RiskGap", "certify", "risk_gap"]

# Imported when first asked for: a record is read without importing torch.
_LAZY = {
    "Certification": "record", "CertifyConfig": "config", "RiskGap": "gap", "certify": "certifying",
    "risk_gap": "renyi",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
