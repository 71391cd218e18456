"""How to repeat what a diagnosis found, and what to run so that what is not shown would be. Knows no torch."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from learn2perturb.diagnosis.budget import FULL
from learn2perturb.diagnosis.verdict import FEWEST_IMAGES
from learn2perturb.evaluation.result import format_eps
from learn2perturb.registry import ATTACKS

if TYPE_CHECKING:
    from learn2perturb.diagnosis.record import Check, Diagnosis, Measurement

# Settings of an attack that go without saying.
_USUAL: dict[str, Any] = {
    "norm": "linf",
    "loss": "ce",
    "targeted": False,
    "eot": 1,
    "eot_average": "loss",
    "eot_draws": "fresh",
    "random_start": True,
    "restarts": 1,
}
# An option of the command line, and the argument that is the same.
Option = tuple[str, str]
_MORE: Option = ("--full", 'budget="full"')
_IMAGES: Option = ("--limit 200", "limit=200")
_TWIN: Option = ("--noise-off module:function", "noise_off=network")
_TRAINED: Option = ("--train-sources", 'sources={"undefended": network, "pgd_at": network}')
# Checks that fail where gradients mislead: a larger budget of attacks without them is all that can be added here.
_ADAPTIVE = (
    "an attack made for this defense, since gradients mislead here: name the submodules that hide them (--bpda, "
    "bpda=), give one as attack=, or fix the model's gradients"
)


def described(measured: Measurement) -> str:
    """Return the attack with the settings that do not go without saying: ``PGD(eps=8/255, steps=50)``."""
    settings = (f"{name}={_value(value, quoted=True)}" for name, value in _unusual(measured).items())
    return f"{measured.attack}({', '.join(settings)})"


def repeated(found: Diagnosis) -> list[str]:
    """Return how to repeat what refuted the claim: the same diagnosis, and the attack by itself where that can be."""
    by = found.measurement(found.trial.found if found.trial is not None else found.lowest)
    command, name, claim = found.metadata.get("command"), _registered(by), found.claim
    ensemble = claim is not None and claim.ensemble
    if command is None:
        by_whom = f"predictor={claim.predictor!r}, members={claim.members}, " if claim is not None and ensemble else ""
        call = f"evaluate(model, data, {{'found': {described(by)}}}, {by_whom}limit={by.n}, seed={found.seed})"
        return [f"the same call with seed={found.seed}", *([call] if name else [])]
    texts = [shlex.join(command)]
    if name and found.metadata.get("run"):
        settings = ",".join(f"{key}={_value(value)}" for key, value in _unusual(by).items())
        words = ["learn2perturb", "evaluate", str(found.metadata["model"]), "--attack", f"{name}:{settings}"]
        if claim is not None and ensemble:
            words += ["--predictor", str(claim.predictor), "--members", str(claim.members)]
        texts.append(shlex.join([*words, "--limit", str(by.n), "--seed", str(found.seed)]))
    return texts


def settled(found: Diagnosis) -> list[str]:
    """Return what to run so that what is not shown would be."""
    options = dict.fromkeys(option for check in found.checks for option in _options(check, found))
    if found.measurement("clean").n < FEWEST_IMAGES:
        options[_IMAGES] = None
    misleading = any(check.status == "failed" and check.number not in (7, 8) for check in found.checks)
    texts = [_ADAPTIVE] if misleading else []
    return [*_again(found, options), *texts]


def settled_alone(check: Check, found: Diagnosis) -> list[str]:
    """Return what to run so that this one check would be shown; nothing where it is, or where nothing helps."""
    return _again(found, list(_options(check, found))) if check.status == "not shown" else []


def _again(found: Diagnosis, options: Collection[Option]) -> list[str]:
    """Return the command or call of a diagnosis with more options; nothing for none."""
    if not options:
        return []
    command = found.metadata.get("command")
    if command is None:
        return [f"the same call with {', '.join(argument for _, argument in options)}"]
    return [_extended(command, [option for option, _ in options])]


def _options(check: Check, found: Diagnosis) -> Iterable[Option]:
    """Yield what would help one check that is not passed."""
    if check.status in ("passed", "does not apply"):
        return
    if check.status == "not shown" and check.number == 6 and "the noise-off twin" in check.missing:
        yield _TWIN
    elif check.status == "not shown" and check.missing:
        yield _TRAINED
    elif found.budget.get("name") != FULL.name:
        yield _MORE


def _extended(command: Iterable[str], options: Iterable[str]) -> str:
    """Return a command with options, less those that they replace."""
    words = list(command)
    added = list(options)
    if any(option.startswith("--limit") for option in added) and "--limit" in words:
        at = words.index("--limit")
        del words[at : at + 2]
    if "--full" in added and "--quick" in words:
        words.remove("--quick")
    return " ".join([shlex.join(words), *added])


def _registered(measured: Measurement) -> str:
    """Return the name of an attack that can be run by itself, or nothing: chosen classes and mixtures cannot be."""
    if measured.parameters.get("targeted") or not measured.by_itself:
        return ""
    names = (entry.name for entry in ATTACKS if entry.target.endswith(f":{measured.attack}") and not entry.arguments)
    return next(names, "")


def _unusual(measured: Measurement) -> Mapping[str, Any]:
    return {key: value for key, value in measured.parameters.items() if _USUAL.get(key, ...) != value}


def _value(value: Any, *, quoted: bool = False) -> str:
    if isinstance(value, float):
        return format_eps(value) if value > 0 else repr(value)
    return repr(value) if quoted else str(value)
