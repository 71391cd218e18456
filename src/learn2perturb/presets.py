"""Attacks by short names, and attacks in one word: ``pgd20``, ``pgd:steps=50``, ``pgd20:eot=20``. Knows no torch."""

from __future__ import annotations

import re
from typing import Any

from learn2perturb.checks import check_choice
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.registry import ATTACKS
from learn2perturb.values import guess

EOT_DRAWS = 10
# name -> (registered attack, settings); eps is set by the evaluation.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "fgsm": ("fgsm", {}),
    "pgd7": ("pgd", {"steps": 7, "step_size": 0.01}),
    "pgd20": ("pgd", {"steps": 20, "step_size": 2 / 255}),
    "pgd100": ("pgd", {"steps": 100, "step_size": 2 / 255}),
    "eot-pgd7": ("pgd", {"steps": 7, "step_size": 0.01, "eot": EOT_DRAWS}),
    "eot-pgd20": ("pgd", {"steps": 20, "step_size": 2 / 255, "eot": EOT_DRAWS}),
    "apgd-ce": ("apgd", {}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd_t", {}),
    "eot-apgd-ce": ("apgd", {"eot": EOT_DRAWS}),
    "arc": ("arc", {}),
    "square": ("square", {}),
    "spsa": ("spsa", {}),
    "surrogate": ("surrogate", {}),
    # These have sizes of their own: the least norm found, and a number of pixels.
    "cw": ("cw", {}),
    "cw-strong": ("cw", {"lr": 1e-2, "steps": 2000, "search_steps": 12}),
    "pixel1": ("few_pixel", {"eps": 1}),
    "pixel2": ("few_pixel", {"eps": 2}),
    "pixel3": ("few_pixel", {"eps": 3}),
    "autoattack": ("autoattack", {}),
    "autoattack-rand": ("autoattack_rand", {}),
}
AVERAGES = ("loss", "probability", "logits")
DRAWS = ("fresh", "held")
_ONE_STEP = ("fgsm",)  # which has no later step to hold draws for
DEFAULT_ATTACKS = "fgsm,pgd7,pgd20,eot-pgd20"


def preset(name: str, eot: int, *, average: str | None = None, draws: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return registered name and settings of a named attack.

    ``eot`` draws are averaged where it averages any, and ``average`` says what of them; ``draws`` are fresh in each
    step or held through all of them, one draw of a preset without EOT too.

    Raises:
        UnknownNameError: it is no preset.
        ConfigError: a choice is unknown, or the attack cannot hold its draws.
    """
    if name not in PRESETS:
        raise UnknownNameError.of("attack preset", name, PRESETS)
    check_choice("eot_average", average, AVERAGES, optional=True)
    check_choice("eot_draws", draws, DRAWS, optional=True)
    attack, settings = PRESETS[name]
    averages = "eot" in settings or "eot" in ATTACKS.entry(attack).arguments
    found = settings | ({"eot": eot} if "eot" in settings else {})
    if average is not None and averages:
        found["eot_average"] = average
    if draws is not None and attack == "pgd":
        found["eot_draws"] = draws
    elif draws == "held" and attack not in _ONE_STEP:
        raise ConfigError(f"eot_draws is 'held', which preset {name!r} cannot do; it is for those of PGD")
    return attack, found


def named_row(text: str) -> tuple[str, str]:
    """Read ``strong=pgd:steps=50,eot=20`` into the name of its row, and the attack; the text itself is a name, too.

    Raises:
        ConfigError: the row has no such name, or there is no attack.
    """
    head, colon, rest = text.partition(":")
    row, equals, attack = head.partition("=")
    if not equals:
        return text.replace(" ", ""), text
    row = row.strip()
    if not re.fullmatch(r"[\w.+ -]+", row) or not attack.strip():
        raise ConfigError(f"attack {text!r}: {row!r} cannot name a row; write strong=pgd:steps=50,eot=20")
    return row, attack.strip() + colon + rest


def written_attack(text: str, eot: int = EOT_DRAWS, **how: str | None) -> tuple[str, dict[str, Any]]:
    """Return registered name and settings of an attack in one word: ``pgd20``, ``pgd:steps=50`` or ``pgd20:eot=20``.

    Settings replace those of a preset; ``eot`` and ``how`` are what :func:`preset` takes.

    Raises:
        UnknownNameError: there is no such attack, and no such preset.
        ConfigError: it is not written so.
    """
    name, settings = parse_attack(text)
    if name in PRESETS:
        attack, own = preset(name, eot, **how)
        return attack, own | settings
    if name not in ATTACKS:
        raise UnknownNameError.of("attack", name, [*PRESETS, *ATTACKS.names()])
    return name, settings


def has_usual_step(text: str) -> bool:
    """Tell whether the step of an attack in one word is a preset's, made for l_inf."""
    name, settings = parse_attack(text)
    return name in PRESETS and "step_size" not in settings


def parse_attack(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``pgd:steps=20,step_size=2/255,eot=10`` into a registered name and settings.

    Raises:
        ConfigError: it is not written so.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier() or not value.strip():
            raise ConfigError(f"attack {text!r}: {item!r} is no KEY=VALUE; write pgd:steps=20,step_size=2/255")
        settings[key.strip().replace("-", "_")] = guess(value.strip())
    return name.strip(), settings
