"""Shell completion, by shtab: verbs, options, registered names and files.

::

    learn2perturb --print-completion bash >> ~/.bash_completion
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Mapping

from learn2perturb.cli.main import add_common
from learn2perturb.cli.options import Parser
from learn2perturb.errors import ConfigError

SHELLS = ("bash", "zsh")
SHORT = "l2p"
# Options whose values are files or folders, and the operands of the verbs.
_FILES = {"run", "runs", "records", "first", "second", "config", "out", "weights", "data_dir", "store", "figures"}


def completion(shell: str, verbs: Mapping[str, str], *, prog: str = "learn2perturb") -> str:
    """Return the script that completes the command line in ``shell``.

    Raises:
        ConfigError: there is no such shell.
    """
    import shtab

    if shell not in SHELLS:
        raise ConfigError(f"--print-completion is {shell!r}; give one of {', '.join(SHELLS)}")
    parser = argparse.ArgumentParser(prog)
    parser.add_argument("--version", action="store_true", help="the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="a script for your shell")
    tree = parser.add_subparsers(parser_class=_part)  # type: ignore[call-overload]  # typed as a class, used as a call
    for verb, summary in verbs.items():
        part = tree.add_parser(verb, help=summary)
        module = importlib.import_module(f"learn2perturb.cli.{verb}")
        module.add_arguments(part)
        add_common(part, planned=hasattr(module, "plan"))
        _hint(part)
    script = str(shtab.complete(parser, shell=shell))
    # The short name of the command is completed by the same function.
    lines = [line.replace(f" {prog}", f" {SHORT}") for line in script.splitlines() if line.startswith("complete ")]
    return "\n".join([script.rstrip(), *lines])


def _part(**settings: str) -> Parser:
    """Return the parser of a verb, asked for as argparse asks for those of sub-commands."""
    return Parser(prog=settings.get("prog"))


def _hint(parser: argparse.ArgumentParser) -> None:
    """Say which values an option may have, for the shell only: what is typed is checked elsewhere."""
    import shtab

    names = _names()
    for action in parser._actions:
        if action.dest in names and action.nargs in (None, 1):
            action.choices = list(names[action.dest])
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def _names() -> dict[str, Iterable[str]]:
    from learn2perturb.configs import ENGINES
    from learn2perturb.registry import DATASETS, DEFENSES, MODELS
    from learn2perturb.training.config import RECIPES

    return {
        "defense": DEFENSES.names(), "model": MODELS.names(), "dataset": DATASETS.names(), "recipe": RECIPES,
        "engine": ENGINES, "device": ("auto", "cpu", "cuda", "mps"), "split": ("test", "train", "validation"),
    }  # fmt: skip
