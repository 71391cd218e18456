"""Hostile words for the options of every verb."""

from __future__ import annotations

from collections.abc import Iterator

_SHELL = ("$(touch canary)", "`touch canary`", "; touch canary", "| touch canary")
_CODE = ("__import__('os').system('touch canary')", "!!python/object/apply:os.system [touch canary]", "os:getcwd",
         "this:d", "canary_module:make")  # fmt: skip
_PATHS = ("", ".", "/", "~nobody/x", "/dev/full", "/dev/null", "/proc/self/mem", "mine", "mine/notes.txt", "a\0b",
          "x" * 5000, "\udcff\udcfe", "\x1b[31mred\x1b[0m", "a\nb", "-", "--", "run/checkpoints", "|", "zoo:../x",
          "zoo:", "hf-hub:", "zoo:\x1b[2J")  # fmt: skip
_NUMBERS = ("", "nan", "inf", "-inf", "-1", "0", "1e999", "9" * 400, "9" * 5000, "1/0", "8//255", "0x10", "1_0", "٣",
            "true", "[1]", "{}", "\x1b[31m", "\0", "1e-400", "-0.0", "1,2", "a" * 3000)  # fmt: skip
_NAMES = ("", "..", "__class__", "resnet20\x1b[31m", "a\0b", "a" * 3000, "\udcff", "{}", "%s%s%n", "None", "0", "*",
          "learn2perturb.cli.main:main", "a\nb", "|x|", "<b>")  # fmt: skip
_ATTACKS = ("pgd:", "pgd:steps", "pgd:steps=", "pgd:steps=-1", "pgd:steps=1e999", "pgd:=1", ":", "pgd:steps=1,steps=2",
            "pgd:loss=os.system", "pgd:eps=[[[[", "pgd:__class__=1", "pgd:steps={}", "pgd:seed=\0", "fgsm:eps=nan",
            "pgd:step_size=\x1b[31m", "pgd:" + "a=1," * 500, "pgd:eps=" + "9" * 5000, "pgd:" + "[" * 5000,
            "cw:steps=None", "square:steps=true", "pgd:norm=__import__('os')")  # fmt: skip

# (words before the option, option, values)
_PLACES = (
    ("train", "--config", _PATHS + _CODE), ("train", "--out", _PATHS + _SHELL), ("train", "--data-dir", _PATHS[:12]),
    ("train", "--lr", _NUMBERS), ("train", "--seed", _NUMBERS[:14]), ("train", "--model", _NAMES + _CODE),
    ("train", "--defense", _NAMES), ("train", "--options.gamma", _NUMBERS), ("train", "--options.x", _CODE),
    ("train", "--model-options.x", _CODE[:2]), ("train", "--device", _NAMES),
    ("evaluate", "RUN", _PATHS + _SHELL + _CODE), ("evaluate", "--attack", _ATTACKS), ("evaluate", "--eps", _NUMBERS),
    ("evaluate", "--attacks", _NAMES), ("evaluate", "--out", _PATHS), ("evaluate", "--draws", _NUMBERS[:14]),
    ("evaluate", "--predictor", _NAMES[:8]), ("evaluate", "--dataset", _NAMES[:8]), ("evaluate", "--data-dir", _PATHS),
    ("certify", "RUN", _PATHS + _CODE), ("certify", "--alpha", _NUMBERS), ("certify", "--sigma", _NUMBERS),
    ("certify", "--figures", _PATHS[:12]), ("certify", "--out", _PATHS),
    ("diagnose", "RUN", _PATHS[:16] + _CODE), ("diagnose", "--source", _NAMES + _CODE),
    ("compare", "RUN", _PATHS), ("compare", "--pair", _NAMES), ("compare", "--out", _PATHS[:16]),
    ("export", "RUN", _PATHS), ("export", "--out", _PATHS[:16]), ("export", "--evaluation", _PATHS),
    ("reproduce", "TABLE", _NAMES), ("reproduce", "--set", _CODE + _ATTACKS[:8]), ("list", "KIND", _NAMES),
    ("list", "PATTERN", (*_NAMES, "[" * 3000, "*" * 3000)), ("", "VERB", _NAMES + _CODE + _SHELL),
    ("bench", "WHAT", _NAMES),
)  # fmt: skip


def every(train: tuple[str, ...], evaluate: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield command lines; ``train`` and ``evaluate`` make the ones that are not refused small."""
    small = ["--limit=4", "--device=cpu"]
    bases = {
        "train": [*train, "--epochs=1", "--out=new"], "evaluate": ["evaluate", "run", *evaluate[1:], "--attacks=none"],
        "certify": ["certify", "run", "--n=20", "--n0=5", *small], "diagnose": ["diagnose", "run", *small],
        "compare": ["compare", "run", "run"], "export": ["export", "run"],
        "reproduce": ["reproduce", "table3", "run", "--set", "steps=1", "--draws=1", *small],
        "list": ["list", "models"], "bench": ["bench"],
    }  # fmt: skip
    for verb, option, values in _PLACES:
        for value in values:
            if option == "VERB":
                yield [value]
            elif option.startswith("--"):
                yield [*bases[verb], f"{option}={value}"]
            else:
                place = {"PATTERN": 2}.get(option, 1)
                base = bases[verb]
                yield [*base[:place], value, *base[place + 1 :]]
