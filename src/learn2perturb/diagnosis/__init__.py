"""Is the robustness real? Ten checks, their evidence, and a verdict (Athalye et al. 2018 and beyond)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learn2perturb.diagnosis.budget import BUDGETS, FULL, QUICK, Budget
from learn2perturb.diagnosis.claim import Claim
from learn2perturb.diagnosis.record import CHECKS, Check, Curve, Diagnosis, Judged, Measurement, Point
from learn2perturb.diagnosis.trial import Trial

if TYPE_CHECKING:
    from learn2perturb.diagnosis.blackbox import SOURCES
    from learn2perturb.diagnosis.comparing import DiagnosisComparison, compare_diagnoses
    from learn2perturb.diagnosis.diagnosing import diagnose

__all__ = [
    "BUDGETS",
    "CHECKS",
    "FULL",
    "QUICK",
    "SOURCES",
    "Budget",
    "Check",
    "Claim",
    "Curve",
    "Diagnosis",
    "DiagnosisComparison",
    "Judged",
    "Measurement",
    "Point",
    "Trial",
    "compare_diagnoses",
    "diagnose",
]

_LAZY = {
    "SOURCES": "blackbox",
    "DiagnosisComparison": "comparing",
    "compare_diagnoses": "comparing",
    "diagnose": "diagnosing",
}


def __getattr__(name: str) -> Any:
    # Lazy: a record is read and printed without importing torch.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
