"""Learned noise in a network's features: train it, attack it, and know how robust it really is.

The public names are imported when they are first used, so that ``import learn2perturb`` and ``--help`` do not wait for
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> the module that has it, or that it is
_HOMES = {
    "build_model": "learn2perturb.models",
    "list_models": "learn2perturb.models",
    "perturb": "learn2perturb.noise",
    "noise_sites": "learn2perturb.noise",
    "noise_parameters": "learn2perturb.noise",
    "remove_noise": "learn2perturb.noise",
    "noise_disabled": "learn2perturb.noise",
    "fixed_noise": "learn2perturb.noise",
    "attacks": "learn2perturb.attacks",
    "list_attacks": "learn2perturb.attacks",
    "list_defenses": "learn2perturb.defenses",
    "load_data": "learn2perturb.data",
    "train": "learn2perturb.training",
    "TrainConfig": "learn2perturb.training",
    "load": "learn2perturb.runs",
    "report": "learn2perturb.report",
    "study": "learn2perturb.experiments",
    "black_box": "learn2perturb.evaluation",
    "evaluate": "learn2perturb.evaluation",
    "EvaluateConfig": "learn2perturb.evaluation",
    "diagnose": "learn2perturb.diagnosis",
    "DiagnoseConfig": "learn2perturb.diagnosis",
    "certify": "learn2perturb.certification",
    "CertifyConfig": "learn2perturb.certification",
    "errors": "learn2perturb.errors",
}

__all__ = [
    "CertifyConfig",
    "DiagnoseConfig",
    "EvaluateConfig",
    "TrainConfig",
    "__version__",
    "attacks",
    "black_box",
    "build_model",
    "certify",
    "diagnose",
    "errors",
    "evaluate",
    "fixed_noise",
    "list_attacks",
    "list_defenses",
    "list_models",
    "load",
    "load_data",
    "noise_disabled",
    "noise_parameters",
    "noise_sites",
    "perturb",
    "remove_noise",
    "report",
    "study",
    "train",
]

if TYPE_CHECKING:
    from learn2perturb import attacks, errors
    from learn2perturb.attacks import list_attacks
    from learn2perturb.certification import CertifyConfig, certify
    from learn2perturb.data import load_data
    from learn2perturb.defenses import list_defenses
    from learn2perturb.diagnosis import DiagnoseConfig, diagnose
    from learn2perturb.evaluation import EvaluateConfig, black_box, evaluate
    from learn2perturb.experiments import study
    from learn2perturb.models import build_model, list_models
    from learn2perturb.noise import (
        fixed_noise,
        noise_disabled,
        noise_parameters,
        noise_sites,
        perturb,
        remove_noise,
    )
    from learn2perturb.report import report
    from learn2perturb.runs import load
    from learn2perturb.training import TrainConfig, train
else:  # hidden from the type checker, which would otherwise believe that every name exists

    def __getattr__(name: str):
        """Import a public name when it is first asked for, and keep it."""
        import importlib

        if name not in _HOMES:
            import difflib

            near = difflib.get_close_matches(name, __all__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        home = importlib.import_module(_HOMES[name])
        value = home if _HOMES[name] == f"{__name__}.{name}" else getattr(home, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names, imported already or not."""
        return sorted({*globals(), *__all__})
