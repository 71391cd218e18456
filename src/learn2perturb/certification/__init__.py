"""Certified radii: the first noise module, randomised smoothing, PixelDP; the record of a certification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learn2perturb.certification.certifying import certify
    from learn2perturb.certification.config import CertifyConfig
    from learn2perturb.certification.record import Certification

__all__ = ["Certification", "CertifyConfig", "certify"]

# Imported when first asked for: a record is read without importing torch.
_LAZY = {"Certification": "record", "CertifyConfig": "config", "certify": "certifying"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
