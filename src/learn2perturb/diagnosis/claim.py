"""A claim is a number: an accuracy, under which attack, in which ball, by which predictor. Knows no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, final

from learn2perturb.checks import MOST, check_choice, check_count, check_size
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation.config import PREDICTORS, EvaluateConfig
from learn2perturb.evaluation.result import format_eps
from learn2perturb.registry import ATTACKS

Rule = Literal["single", "vote", "mean_probability", "mean_logits"]
NORMS = {"linf": "l_inf", "l2": "l2"}
ANY = "any"
EXAMPLE = "51 % under pgd20 with 8/255"
FORM = (
    "write ACCURACY [under ATTACK] [l_inf or l2] [with EPS] [by vote, mean probability, mean logits of M] "
    f"[of N images], such as {EXAMPLE!r}"
)
# Other names of registered attacks -> name, settings.
_SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "aa": ("autoattack", {}),
    "apgd_ce": ("apgd", {}),
    "apgd_dlr": ("apgd", {"loss": "dlr"}),
}
_PGD = re.compile(r"(?:eot_?)?pgd_?(\d{1,6})?")

_VALUE = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_SIZE = rf"(?:{_VALUE})(?:\s*/\s*(?:{_VALUE}))?"
_COUNT = r"\d[\d,]{0,17}"
_IMAGES = r"(?:images|examples)"
_BETWEEN = " \t\n,;."
_ACCURACY = re.compile(rf"\s*({_VALUE})\s*(%|per\s?cent\b)?(?:\s+(?:robust\s+)?accuracy\b|\s+left\b)?", re.IGNORECASE)
# What a clause says -> how it is written. The first that fits counts.
_CLAUSES = {
    kind: re.compile(pattern, re.IGNORECASE)
    for kind, pattern in {
        "predictor": r"by\s+(?:an?\s+|the\s+)?(?:majority\s+)?(single|vote|mean[\s_-]probability|mean[\s_-]logits)"
        rf"(?:\s+draws?\b)?(?:\s+(?:of|over)\s+({_COUNT})\b(?!\s*{_IMAGES})(?:\s+(?:draws|passes)\b)?)?",
        "n": rf"(?:of|on)\s+({_COUNT})\s*{_IMAGES}\b",
        "norm": r"(?:(?:under|in|at|with)\s+)?(?:norm\s*=?\s*)?(l_?inf|l_?∞|l_?2)(?!\w)",
        "eps": rf"(?:(?:with|at)\s+)?(?:eps(?:ilon)?\s*=?\s*)?({_SIZE})(?![\w.])",
        "attack": r"(?:(?:under|against)\s+)?(?!(?:by|of|on|in|at|with|under|against)\b)"
        r"(any(?:\s+attack)?\b|auto\sattack\b|[a-z][\w.+-]*(?::\S+)?)",
    }.items()
}


@final
@dataclass(frozen=True)
class Claim:
    """What is claimed of a model. What is None is not said: as diagnosed.

    Attributes:
        accuracy: that is left, a share in (0, 1].
        attack: ``any``, or one as the command line names it: ``pgd20``, ``autoattack``, ``pgd:steps=50,restarts=5``.
        norm: ``linf`` or ``l2``.
        eps: radius of the ball, [0, 1] pixel scale.
        predictor: ``single`` draw, ``vote``, ``mean_probability`` or ``mean_logits``.
        members: passes that make one answer of an ensemble.
        n: images.

    Raises:
        ConfigError: a value is not allowed.
        UnknownNameError: there is no such attack.
    """

    accuracy: float
    attack: str = ANY
    norm: str | None = None
    eps: float | None = None
    predictor: str | None = None
    members: int | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        value = self.accuracy
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(f"the claimed accuracy is {value!r}, must be a share in (0, 1]; write 0.51 or '51 %'")
        object.__setattr__(self, "accuracy", float(value))
        check_choice("norm of the claim", self.norm, tuple(NORMS), optional=True)
        check_choice("predictor of the claim", self.predictor, PREDICTORS, optional=True)
        check_count("members of the claim", self.members, optional=True)
        check_count("images of the claim", self.n, optional=True)
        if self.eps is not None:
            check_size("eps of the claim", self.eps, norm=self.norm or "linf")
            object.__setattr__(self, "eps", float(self.eps))
        if self.norm == "l2" and self.eps is None:
            raise ConfigError("the claim names l2 without a size; write 'l2 0.5'")
        if self.members is not None and self.members > 1 and self.predictor in (None, "single"):
            raise ConfigError(f"the claim is of {self.members} draws but of no ensemble; write 'by vote of 10'")
        named(self.attack)

    @classmethod
    def of(cls, claim: str | float | Claim) -> Claim:
        """Return the claim that a text or a share says.

        Raises:
            ConfigError: it says none.
            UnknownNameError: it names an unknown attack.
        """
        if isinstance(claim, Claim):
            return claim
        if isinstance(claim, str):
            return _read(claim)
        if isinstance(claim, bool) or not isinstance(claim, int | float):
            raise ConfigError(f"claim is a {type(claim).__name__}; give a text such as {EXAMPLE!r}, or a share")
        return cls(claim)

    @property
    def ensemble(self) -> bool:
        """Whether several passes make one answer."""
        return self.predictor not in (None, "single")

    @property
    def predicted(self) -> str:
        """``vote of 10``, or ``single draws``."""
        return f"{(self.predictor or '').replace('_', ' ')} of {self.members}" if self.ensemble else "single draws"

    def settled(self, *, norm: str, eps: float, n: int) -> Claim:
        """Return the claim with what it does not say filled in from what was diagnosed."""
        members = (self.members or EvaluateConfig.members) if self.ensemble else 1
        return dataclasses.replace(
            self, norm=norm, eps=eps, n=n, predictor=self.predictor or "single", members=members
        )  # fmt: skip

    def __str__(self) -> str:
        words = [f"{100 * self.accuracy:.10g} %"]
        words += [f"under {self.attack}"] if self.attack != ANY else ["under any attack"]
        words += [NORMS[self.norm]] if self.norm is not None else []
        words += [f"with {format_eps(self.eps)}"] if self.eps is not None else []
        if self.ensemble:
            words.append(f"by {(self.predictor or '').replace('_', ' ')}")
            words += [f"of {self.members}"] if self.members is not None else []
        return " ".join([*words, *([f"of {self.n} images"] if self.n is not None else [])])


def named(attack: str) -> tuple[str, dict[str, Any]]:
    """Return the registered name and the settings of an attack as a claim names it; ``any`` is itself.

    Raises:
        UnknownNameError: no attack has that name.
        ConfigError: its settings are written wrongly, or it needs what a text cannot give.
    """
    name, _, rest = attack.partition(":")
    name = name.strip().lower().replace("-", "_")
    if name == ANY and not rest:
        return ANY, {}
    settings = _settings(attack, rest)
    steps = _PGD.fullmatch(name)
    if steps is not None:
        return "pgd", {**({"steps": int(steps[1])} if steps[1] else {}), **settings}
    name, given = _SHORT.get(name, (name, {}))
    if name not in ATTACKS:
        raise UnknownNameError.of("attack of the claim", name, [ANY, "pgd20", *_SHORT, *_allowed()])
    needs = ATTACKS.entry(name).said("needs")
    if needs:
        raise ConfigError(
            f"the claim names the attack {name}, which needs {' and '.join(needs)}; name one of {', '.join(_allowed())}"
        )
    return name, given | settings


def _allowed() -> list[str]:
    return [entry.name for entry in ATTACKS if not entry.said("needs")]


def _settings(attack: str, rest: str) -> dict[str, Any]:
    """Read ``steps=20,step_size=2/255``."""
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier() or not value.strip():
            raise ConfigError(f"attack {attack!r} of the claim: {item!r} is no KEY=VALUE; write pgd:steps=20")
        found[key.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.isdecimal():
        return int(text) if len(text) <= len(str(MOST)) else text
    if re.fullmatch(_SIZE, text, re.IGNORECASE):
        return _size(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _size(text: str) -> float:
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except ZeroDivisionError:
        return math.inf  # which is refused as a size


def _read(text: str) -> Claim:
    """Read a claim as it is written."""
    start = _ACCURACY.match(text)
    if start is None:
        raise ConfigError(f"claim {text!r} does not begin with an accuracy; {FORM}")
    if re.match(r",\d", text[start.end() :]):
        raise ConfigError(f"claim {text!r}: write the accuracy with a point, such as 51.5 %")
    accuracy = _share(text, start[1], percent=start[2] is not None)
    found: dict[str, Any] = {}
    rest = re.sub(r"[()]", " ", text[start.end() :]).strip(_BETWEEN)
    while rest:
        kind, match = _clause(text, rest)
        if kind in found:
            raise ConfigError(f"claim {text!r} says two things of its {kind}; {FORM}")
        found[kind] = match
        rest = rest[match.end() :].lstrip(_BETWEEN)
    attack, own = _attack(found)
    norm, eps = _norm(found), _size(found["eps"][1]) if "eps" in found else None
    for name, value, other in (("norm", norm, own.get("norm")), ("eps", eps, own.get("eps"))):
        if value is not None and other is not None and value != other:
            raise ConfigError(f"claim {text!r} says two things of its {name}, {other} and {value}; give one")
    predictor, members = _predictor(found)
    return Claim(
        accuracy=accuracy,
        attack=attack,
        norm=norm if norm is not None else own.get("norm"),
        eps=eps if eps is not None else own.get("eps"),
        predictor=predictor,
        members=members,
        n=_count(found["n"][1]) if "n" in found else None,
    )


def _share(text: str, number: str, *, percent: bool) -> float:
    value = float(number)
    if percent:
        # The nearest share of a short decimal, as it would be typed: 51.2 % is 0.512, not 0.5120000000000001.
        value = float(f"{value / 100:.15g}")
    elif number.isdecimal():  # 1 is 1 % to one reader and all to another
        raise ConfigError(f"claim {text!r}: {number} is no share in (0, 1]; write '{number} %' or 0.51")
    if not 0 < value <= 1:
        raise ConfigError(f"claim {text!r}: the accuracy must be more than 0 % and at most 100 %; {FORM}")
    return value


def _clause(text: str, rest: str) -> tuple[str, re.Match[str]]:
    for kind, pattern in _CLAUSES.items():
        match = pattern.match(rest)
        if match is not None:
            return kind, match
    raise ConfigError(f"claim {text!r}: {rest!r} is not understood; {FORM}")


def _attack(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the attack as it was named, less the norm and the eps of it, which are the claim's."""
    if "attack" not in found:
        return ANY, {}
    text = re.sub(r"\s+", "", found["attack"][1].lower()).rstrip(",;.")
    if text in ("anyattack", "any"):
        return ANY, {}
    head, _, rest = text.partition(":")
    parts = rest.split(",")
    kept = [part for part in parts if part.partition("=")[0] not in ("norm", "eps")]
    own = {key: value for key, value in named(text)[1].items() if key in ("norm", "eps")}
    return head + (":" + ",".join(kept) if any(kept) else ""), own


def _norm(found: dict[str, Any]) -> str | None:
    if "norm" not in found:
        return None
    return "l2" if found["norm"][1].endswith("2") else "linf"


def _predictor(found: dict[str, Any]) -> tuple[str | None, int | None]:
    if "predictor" not in found:
        return None, None
    rule, members = found["predictor"].groups()
    return re.sub(r"[\s-]", "_", rule.lower()), None if members is None else _count(members)


def _count(text: str) -> int:
    return int(text.replace(",", ""))
