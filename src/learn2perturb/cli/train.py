"""``learn2perturb train``: train a network with a defense into a run folder."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from learn2perturb.cli.networks import add_output
from learn2perturb.cli.options import add_fields, add_json, print_json, print_table
from learn2perturb.cli.planning import Plan
from learn2perturb.defenses.settings import Settings
from learn2perturb.naming import network_name
from learn2perturb.registry import DEFENSES
from learn2perturb.training.config import TrainConfig, read_config
from learn2perturb.values import converted, kinds_of

DESCRIPTION = (
    "Train a network with a defense. Settings come from --config FILE, then from options; a recipe fills the rest.\n"
    "The same command again resumes an unfinished run, bit for bit."
)
EXAMPLE = "learn2perturb train --dataset cifar10 --model resnet20 --recipe fast --epochs 6 --options.gamma 1e-3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, such as a run's config.yaml")
    parser.add_argument("--out", metavar="DIR", help="run folder (default runs/DATASET-MODEL-DEFENSE-RECIPE-seedN)")
    add_output(parser)
    add_json(parser)
    shared = list(kinds_of(Settings))
    add_fields(parser, TrainConfig, title="what is trained", skip=shared)
    add_fields(parser, Settings, title="settings that the recipe fills where they are not given")


def build_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return the config: the file's settings, overridden by the options given.

    Raises:
        ConfigError: a setting is unknown or not allowed.
    """
    kinds = kinds_of(TrainConfig)
    given = {name: value for name, value in vars(arguments).items() if name in kinds}
    if arguments.output is not None:
        given["model_options"] = {**given.get("model_options", {}), "output": arguments.output}
    values: dict[str, Any] = {}
    if arguments.config:
        values = converted(read_config(Path(arguments.config)), kinds, f"config {arguments.config!r}: ")
        for name in ("options", "model_options"):
            if name in given:
                given[name] = {**(values.get(name) or {}), **given[name]}
    return TrainConfig.from_dict({**values, **given})


def default_folder(config: TrainConfig) -> Path:
    """Return the run folder of a config that names none."""
    model = re.sub(r"[^\w.=+-]+", "-", config.model)
    return Path("runs") / f"{config.dataset}-{model}-{config.defense}-{config.recipe}-seed{config.seed}"


def command(*words: object) -> str:
    """Return a command that can be typed."""
    return shlex.join(map(str, words))


def run(arguments: argparse.Namespace) -> int:
    """Train; print the last metrics and the next command."""
    config = build_config(arguments)
    folder = Path(arguments.out) if arguments.out else default_folder(config)
    if not arguments.json:
        print(f"run folder: {folder}", flush=True)
    return _train(config, folder, as_json=arguments.json)


def plan(arguments: argparse.Namespace) -> Plan:
    """Return what would be done: every setting, filled by the recipe, and whether a run goes on.

    Raises:
        ConfigError: a setting is not allowed, by itself or with the defense, or the folder holds another run.
    """
    from learn2perturb.training.folder import check_folder
    from learn2perturb.training.metrics import read_metrics

    config = _with_options(build_config(arguments)).resolve()
    config.built_defense()
    folder = Path(arguments.out) if arguments.out else default_folder(config)
    check_folder(folder, config)
    done = len(read_metrics(folder)) if (folder / "config.yaml").is_file() else 0
    where = f"goes on after epoch {done} in" if done else "goes into"
    left = max(0, (config.epochs or 0) - done)
    return Plan(
        config.to_dict(),
        (f"train {config.describe()}", f"{left} epochs of {config.epochs}", f"the run {where} {folder}"),
    )


def _train(config: TrainConfig, folder: Path, *, as_json: bool) -> int:
    from learn2perturb.training.loop import train
    from learn2perturb.training.metrics import read_metrics

    config = _with_options(config)
    before = len(read_metrics(folder)) if (folder / "config.yaml").is_file() else 0
    result = train(config, out=folder)
    finished_before = 0 < before == len(result.metrics)
    last = result.metrics[-1] if result.metrics else {}
    following = command("learn2perturb", "evaluate", folder, *_own_network(config))
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "finished_before": finished_before,
                "config": result.config.to_dict(),
                "metrics": last,
                "next": following,
            }
        )
        return 0
    if finished_before:
        print(f"{folder} is finished already: {before} epochs. To train anew, give another --out or --seed.")
    else:
        print(f"trained {result.config.describe()} into {folder}")
    if last:
        print()
        print_table(("metric", "last epoch"), _summary(last))
    print(f"\nnext: {following}")
    return 0


def _with_options(config: TrainConfig) -> TrainConfig:
    """Return the config with the options of its defense as that defense takes them: numbers, not texts."""
    defense = DEFENSES.entry(config.defense).load()
    return replace(config, options=converted(config.options, kinds_of(defense), "options."))


def _own_network(config: TrainConfig) -> list[str]:
    """Return the options that a verb needs to build the network of a run, where its file may not say how."""
    if network_name(config.model).kind != "function":
        return []
    output = config.model_options.get("output")
    return ["--model", config.model, *([] if output is None else ["--output", output])]


def _summary(last: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the final table, in words."""
    rows = [("epochs", str(last["epoch"] + 1)), ("training loss", f"{last['loss']:.4f}")]
    for key, name in (("clean_accuracy", "training accuracy, clean"), ("adversarial_accuracy", "..., under PGD")):
        if key in last:
            rows.append((name, f"{last[key]:.1%}"))
    for kind in ("test", "validation"):
        count = last.get(f"{kind}_n")
        for key, name in ((f"{kind}_clean", "clean"), (f"{kind}_pgd", "under the training PGD")):
            if key in last:
                rows.append((f"{kind} accuracy, {name}, {count} images, one draw", f"{last[key]:.1%}"))
    for key, name in (
        ("theta_mean", "theta, mean"),
        ("theta_schedule", "theta if only the regulariser moved it"),
        ("theta_departure", "theta's departure from that (largest RMS of a site)"),
        ("theta_slope_ratio", "slope of the loss / slope of the regulariser"),
        ("alpha_mean", "|alpha|, mean"),
        ("sigma_mean", "standard deviation of a weight, mean"),
    ):
        if key in last:
            rows.append((name, f"{last[key]:.4g}"))
    rows.append(("images a second", f"{last['images_per_second']:.0f}"))
    return rows
