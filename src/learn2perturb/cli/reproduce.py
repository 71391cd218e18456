"""``learn2perturb reproduce``: a table or figure of the paper, trained here or on networks that are there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from learn2perturb.cli.options import typed
from learn2perturb.cli.study import add_running, run_study, settings
from learn2perturb.cli.subject import name_of
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.naming import network_name
from learn2perturb.registry import ATTACKS
from learn2perturb.values import kinds_of

DESCRIPTION = (
    "Reproduce a table or figure of the Learn2Perturb paper (a study of `study --list`), the paper's numbers beside\n"
    "ours. Without RUN its networks are trained, at the --level given; with RUNs the same is asked of\n"
    "networks that are trained already. What the store has is never computed again."
)
EXAMPLE = "learn2perturb reproduce table6 runs/pgd_at runs/learn2perturb --limit 1000"
_OF_STUDY = ("train", "seeds", "runs", "cells", "evaluate", "views", "only", "title", "notes")
_OF_TRAINING = ("runs", "train", "seeds", "levels", "only", "sweep")  # keys of a study
_OF_MODEL = ("model", "model_options")
_LEAST = {"others": 2}  # runs that a cell with such a source needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add("table", metavar="NAME", help="table1 to table6, figure2 to figure6, eot, or another study")
    add("runs", metavar="RUN", nargs="*", help="run folders, .safetensors files, zoo:NAME, or module:function")
    add(
        "--model", metavar="NAME",
        help="train this network in place of the paper's: resnet20, timm:NAME, torchvision:NAME, module:function",
    )  # fmt: skip
    add("--dataset", metavar="NAME", help="registered data set of the RUNs (default: the run's)")
    add("--data-dir", metavar="DIR", help="folder of the data sets")
    add("--limit", type=typed("int"), metavar="N", help="N images only, balanced over the classes")
    add("--draws", type=typed("int"), metavar="N", help="scorings with fresh draws")
    add("--eot", type=typed("int"), metavar="K", help="draws that every attack averages (the paper: as its table says)")
    add("--seed", type=typed("int"), metavar="N", help="of attacks and scoring")
    add_running(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the study, or the same cells on the runs that are given; print it."""
    from learn2perturb.experiments.study_file import build_study, read_source, shipped

    if arguments.table not in shipped():
        raise UnknownNameError.of("table", arguments.table, shipped())
    name, source = read_source(arguments.table)
    given = settings(arguments.set, "--set")
    level = arguments.level
    if arguments.runs:
        if level is not None:
            raise ConfigError("--level says how networks are trained, and RUNs are trained; leave one of the two out")
        if arguments.model is not None:
            raise ConfigError("--model says what is trained, and RUNs are trained; leave one of the two out")
        source = on_runs(source, arguments.runs, {"dataset": arguments.dataset, "data_dir": arguments.data_dir})
    elif arguments.dataset is not None:
        raise ConfigError("--dataset is of RUNs; for networks that are trained give --set train.dataset=NAME")
    elif arguments.data_dir is not None:
        given["train.data_dir"] = arguments.data_dir
    if arguments.model is not None:
        source = with_model(source, arguments.model)
    for key in ("limit", "draws", "seed"):
        if getattr(arguments, key) is not None:
            given[f"evaluate.{key}"] = getattr(arguments, key)
    if arguments.eot is not None:
        given["eot"] = arguments.eot
    changes, own = split(given)
    return run_study(build_study(name, of_attacks(source, own), level, changes), arguments)


def with_model(source: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the study with every network that it trains replaced by ``model``, at every level.

    Options of the paper's networks go with them. A number of the paper stands beside its own network alone.

    Raises:
        UnknownNameError: it names no network.
        ConfigError: the study trains none.
    """
    name = network_name(model).text
    found = deepcopy(dict(source))
    trained = {run: own for run, own in found["runs"].items() if not (own and "weights" in own)}
    if not trained:
        raise ConfigError("it trains no network, so leave --model out")
    levels = [level or {} for level in (found.get("levels") or {}).values()]
    for place in (found, *levels):
        place["train"] = _without_model(place.get("train"))
        for run in trained.keys() & (place.get("runs") or {}).keys():
            place["runs"][run] = _without_model(place["runs"][run])
    for run in trained:
        # An axis of one value, as the views have a row for each network.
        found["runs"][run]["model"] = [name]
    return found


def _without_model(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (settings or {}).items() if key.partition(".")[0] not in _OF_MODEL}


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what changes the study, and what changes its attacks: ``steps=100``."""
    own = {key: value for key, value in given.items() if key.partition(".")[0] not in _OF_STUDY}
    return {key: value for key, value in given.items() if key not in own}, own


def of_attacks(source: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study with settings of its attacks replaced, of every attack that has them.

    Raises:
        ConfigError: no attack of the study has one of them.
    """
    from learn2perturb.experiments.study_file import attack_named, merged

    cells = {name: cell for name, cell in source["cells"].items() if isinstance(cell, Mapping)}
    attacks = {name: attack_named(cell["attack"])[0] for name, cell in cells.items() if cell.get("attack")}
    knows = {name: set(kinds_of(ATTACKS.entry(attack).load())) for name, attack in attacks.items()}
    unused = sorted(set(own) - set().union(*knows.values()))
    if unused:
        raise ConfigError(
            f"no attack of this study has a setting {', '.join(unused)}; they have: "
            f"{', '.join(sorted(set().union(*knows.values())))}; settings of the study are written train.epochs=3"
        )
    changed = {
        name: {("eot" if key == "eot" else f"attack.{key}"): value for key, value in own.items() if key in knows[name]}
        for name in attacks
    }
    return merged(source, {"cells": changed})


def on_runs(source: Mapping[str, Any], runs: list[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study with networks that are trained already in place of its own.

    Raises:
        ConfigError: a run is given twice, or too few are given.
    """
    doubles = sorted({run for run in runs if runs.count(run) > 1})
    if doubles:
        raise ConfigError(f"{', '.join(doubles)} is given twice; give each run once")
    cells = [cell for cell in source["cells"].values() if isinstance(cell, Mapping)]
    least = max((_LEAST.get(str(cell.get("source")), 1) for cell in cells), default=1)
    if len(runs) < least:
        raise ConfigError(f"it needs at least {least} runs, a source and a target, got {len(runs)}; give more")
    known = {key: value for key, value in facts.items() if value is not None}
    named: dict[str, Any] = {}
    for run in runs:
        name = name_of(run)
        named[name if name not in named else f"{name} ({run})"] = {"weights": run, **known}
    own = {key: value for key, value in source.items() if key not in _OF_TRAINING}
    views = {name: _by_run(view) for name, view in source.get("views", {}).items() if view.get("kind") != "history"}
    if not views:
        raise ConfigError("it shows the history of trainings, which trained networks do not hold; leave the RUNs out")
    return {**own, "runs": named, "views": views}


def _by_run(view: Mapping[str, Any]) -> dict[str, Any]:
    """Return the view with a line for each run in place of one for each defense and network."""
    words = {"defense": "run", "model": None, "source": "source.run"}
    found = {key: value for key, value in view.items() if key != "baseline"}
    for key in ("rows", "columns", "series"):
        if key in found:
            value = found[key]
            items = [words.get(item, item) for item in (value if isinstance(value, list) else [value])]
            found[key] = [item for item in items if item is not None]
    if not any("run" in found.get(key, []) for key in ("rows", "columns", "series")):
        found["series" if view.get("kind") == "curve" else "rows"] = ["run"]
    return found
