"""Attacks by short names, and attacks written in one word: ``pgd20``, ``pgd:steps=50,eot=20``. Knows no torch."""

from __future__ import annotations

from typing import Any

from learn2perturb.errors import ConfigError, UnknownNameError
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
DEFAULT_ATTACKS = "fgsm,pgd7,pgd20,eot-pgd20"


def preset(name: str, eot: int) -> tuple[str, dict[str, Any]]:
    """Return registered name and settings of a named attack.

    Raises:
        UnknownNameError: it is no preset.
    """
    if name not in PRESETS:
        raise UnknownNameError.of("attack preset", name, PRESETS)
    attack, settings = PRESETS[name]
    return attack, settings | ({"eot": eot} if "eot" in settings else {})


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
