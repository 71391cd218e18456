"""Is the robustness real? Checks, their evidence, and a verdict (Athalye et al. 2018 and beyond)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.lazy import lazily

if TYPE_CHECKING:
    from learn2perturb.diagnosis.blackbox import SOURCES
    from learn2perturb.diagnosis.budget import BUDGETS, FULL, QUICK, Budget
    from learn2perturb.diagnosis.checks import CHECKS, CheckSpec, register_check
    from learn2perturb.diagnosis.claim import Claim
    from learn2perturb.diagnosis.comparing import DiagnosisComparison, compare_diagnoses
    from learn2perturb.diagnosis.config import DiagnoseConfig
    from learn2perturb.diagnosis.diagnosing import diagnose
    from learn2perturb.diagnosis.record import Check, Curve, Diagnosis, Judged, Measurement, Point
    from learn2perturb.diagnosis.trial import Trial

__all__ = [
    "BUDGETS",
    "CHECKS",
    "FULL",
    "QUICK",
    "SOURCES",
    "Budget",
    "Check",
    "CheckSpec",
    "Claim",
    "Curve",
    "DiagnoseConfig",
    "Diagnosis",
    "DiagnosisComparison",
    "Judged",
    "Measurement",
    "Point",
    "Trial",
    "compare_diagnoses",
    "diagnose",
    "register_check",
]

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("BUDGETS", "FULL", "QUICK", "Budget"), "budget"),
        **dict.fromkeys(("Check", "Curve", "Diagnosis", "Judged", "Measurement", "Point"), "record"),
        **dict.fromkeys(("DiagnosisComparison", "compare_diagnoses"), "comparing"),
        **dict.fromkeys(("CHECKS", "CheckSpec", "register_check"), "checks"),
        "SOURCES": "blackbox",
        "Claim": "claim",
        "DiagnoseConfig": "config",
        "Trial": "trial",
        "diagnose": "diagnosing",
    },
)
