"""``learn2perturb evaluate``: attack a trained network, score it with fresh draws, keep the record."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.checks import check_choice, check_count
from learn2perturb.cli.images import add_kept_images, check_images_asked, keeper, saved_images
from learn2perturb.cli.networks import add_network
from learn2perturb.cli.options import Parser, add_config, add_json, config_of, print_json, print_table, typed, words
from learn2perturb.cli.planning import Plan
from learn2perturb.cli.saving import FAILURE, SUCCESS, place_of, saved
from learn2perturb.cli.subject import (
    add_images,
    check_subject,
    load_subject,
    new_record,
    records_of,
    save_record,
)
from learn2perturb.defenses.settings import NORMS
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.presets import (
    AVERAGES,
    DEFAULT_ATTACKS,
    EOT_DRAWS,
    PRESETS,
    has_usual_step,
    named_row,
    preset,
    written_attack,
)
from learn2perturb.runs.trained import own_eps, own_norm, own_predictor

if TYPE_CHECKING:
    from learn2perturb.attacks import Attack
    from learn2perturb.evaluation import Evaluation

DESCRIPTION = (
    "Attack a trained network and score it with repeated fresh draws of its noise; every row has an interval.\n"
    "Several RUNs are evaluated one after the other, and shown side by side."
)
EXAMPLE = "learn2perturb evaluate runs/cifar10-resnet20-learn2perturb-fast-seed0 --attacks fgsm,pgd20 --limit 1000"


def add_arguments(parser: Parser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add_network(parser)
    parser.several = "runs"
    add("--attacks", metavar="NAMES", help=f"of {', '.join(PRESETS)} (default {DEFAULT_ATTACKS}; none for clean only)")
    add(
        "--attack", action="append", default=[], metavar="[ROW=]NAME:KEY=VALUE,...",
        help="an attack in full, or one of those with other settings (pgd20:restarts=5), may be repeated; ROW names "
        "its row: strong=pgd:steps=50,step_size=2/255,eot=20",
    )  # fmt: skip
    add(
        "--eot",
        type=typed("int"),
        default=EOT_DRAWS,
        metavar="K",
        help=f"draws of eot presets (default {EOT_DRAWS})",
    )
    add(
        "--eot-average", metavar="WHAT",
        help=f"what eot presets average over their draws: {', '.join(AVERAGES)} (default loss)",
    )  # fmt: skip
    add(
        "--eot-draws", metavar="HOW",
        help="draws of PGD presets: fresh in each step (default), or held through all of them",
    )  # fmt: skip
    add(
        "--norm",
        metavar="NAME",
        help="norm of the attacks that know it: linf, l2 (default: that of the run's training)",
    )
    add(
        "--bpda", metavar="GLOB",
        help="submodules whose gradient is replaced by the identity's in attacks by gradients: quantise, pre.*",
    )  # fmt: skip
    add_config(
        parser, EvaluateConfig, title="how it is attacked and scored",
        otherwise={
            "predictor": "the defense's own", "members": f"the defense's own, else {EvaluateConfig.members}",
            "eps": "the run's",
        },
    )  # fmt: skip
    add_images(parser)
    add_kept_images(parser)
    add("--out", metavar="FILE", help="the record (default RUN/evaluation/SPLIT-seedN.json)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate each run; print the tables, save the records."""
    each = _each(arguments)
    told = []
    for number, one in enumerate(each):
        if number and not one.json:
            print()
        told.append(_evaluate(one))
    found = [summary for _, summary in told]
    if arguments.json:
        print_json(found if len(each) > 1 else found[0])
    elif len(each) > 1:
        print()
        print_table(*_side_by_side(found))
    return max(code for code, _ in told)


def _each(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments for each of the runs that are named, all checked before any work.

    Raises:
        ConfigError: an option is of one network, and several are named.
    """
    runs = list(dict.fromkeys([arguments.run, *arguments.runs]))
    own = next((name for name in ("out", "model", "weights") if getattr(arguments, name) is not None), None)
    if len(runs) > 1 and own is not None:
        raise ConfigError(f"--{own} is of one network, and {len(runs)} are named; evaluate them one by one")
    each = [argparse.Namespace(**vars(arguments) | {"run": one}) for one in runs]
    if len(each) > 1:
        from learn2perturb.runs.files import locate

        for one in each:
            settled = argparse.Namespace(**vars(one))
            check_subject(settled)
            record_path(one)
            if not settled.named:
                locate(settled.run)
    return each


def _side_by_side(found: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return head and rows of a table: a run a line, what each attack leaves it; ``off``: with its noise off."""
    names = [[(row["attack"] + ("" if row["noise"] else " off"), row) for row in one["rows"]] for one in found]
    columns = list(dict.fromkeys(name for rows in names for name, _ in rows))
    lines = []
    for one, rows in zip(found, names, strict=True):
        by_name = {name: f"{100 * row['accuracy']:.2f}" for name, row in reversed(rows)}
        lines.append((Path(one["model"]).name, *(by_name.get(column, "") for column in columns)))
    return ("accuracy %", *columns), lines


def _evaluate(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Evaluate one network; print its table, save its record; return the exit code and what a program would read."""
    specs = attack_specs(arguments)
    asked = config_of(EvaluateConfig, arguments)
    check_subject(arguments)
    check_choice("norm", arguments.norm, NORMS, optional=True)
    check_images_asked(arguments)

    from learn2perturb.attacks.spec import attacks_of_size
    from learn2perturb.engine.devices import choose_device
    from learn2perturb.evaluation import Unfinished, evaluate
    from learn2perturb.records import check_writable

    device = choose_device(arguments.device)
    out = record_path(arguments)
    subject = load_subject(arguments)
    model, data = subject.model, subject.data
    sizes = sizes_of(asked)
    norm = arguments.norm or own_norm(subject.config)
    written = {row for row, attack in map(named_row, arguments.attack) if not has_usual_step(attack)}
    attacks = attacks_of_size(
        specs, partial(own_eps, subject.config), norm=norm, asked=sizes, usual_steps=set(specs) - written
    )
    attacks, notes = without_doubles(model, attacks)
    notes += short_attacks(attacks, sizes)
    if arguments.norm is None and norm != "linf":
        notes.append(f"attacks are in {norm}, the norm of the run's training; --norm linf attacks it in l_inf")
    if arguments.bpda is not None:
        attacks = through(model, attacks, arguments.bpda)
    config, told = with_predictors(asked, arguments, subject.header)
    notes += told
    check_writable(out)
    keep, images = Unfinished(out.parent), keeper(arguments)
    result = evaluate(model, data, attacks, config, device=device, name=subject.name, keep=keep, images=images)
    result = replace(result, metadata=result.metadata | {"command": ["learn2perturb", *arguments.command]})
    notes += unconverged(result)
    record = saved(lambda: save_record(result, arguments, records_of(arguments.run), "evaluation"))
    files = [] if images is None or images.found is None else saved_images(images.found, arguments, record)
    code = FAILURE if record is None or None in files else SUCCESS
    if code == SUCCESS:
        keep.clear()
    read = {
        "record": place_of(record), "model": subject.name, "data": data.name, "rows": summary(result), "notes": notes,
        "images": [place_of(path) for path in files],
    }  # fmt: skip
    if arguments.json:
        return code, read
    print(f"{subject.name} on {data.name} ({arguments.split}), seed {config.seed}\n")
    print(result)
    for note in notes:
        print(f"note: {note}")
    if record is not None:
        print(f"\nrecord: {record}")
    for path in filter(None, files):
        print(f"images: {path}")
    return code, read


def plan(arguments: argparse.Namespace) -> Plan:
    """Return what would be done: the rows, the settings, and where the record goes."""
    specs, config = attack_specs(arguments), config_of(EvaluateConfig, arguments)
    records = [record_path(one) for one in _each(arguments)]
    check_subject(arguments)
    attacks = {row: {"attack": name, **settings} for row, (name, settings) in specs.items()}
    rows = ", ".join([*(["clean"] if config.clean else []), *specs])
    return Plan(
        config.to_dict() | {"attacks": attacks},
        (
            f"evaluate {', '.join([str(arguments.run), *arguments.runs])}, split {arguments.split}",
            f"rows: {rows}",
            *(f"record: {path}" for path in records),
        ),
    )


def attack_specs(arguments: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return row name -> (registered attack, settings), presets first.

    Raises:
        ConfigError: an attack is unknown or written wrongly.
    """
    named = arguments.attacks
    if named is None:
        named = "none" if arguments.attack else DEFAULT_ATTACKS
    check_count("eot", arguments.eot)
    how = {"average": arguments.eot_average, "draws": arguments.eot_draws}
    names = [name for name in words(named, "--attacks") if name != "none"]
    for name in names:
        if ":" in name or "=" in name:
            raise ConfigError(
                f"--attacks takes names alone, got {name!r}; an attack with settings is one --attack of its own: "
                "--attacks fgsm,pgd20 --attack pgd20:restarts=5"
            )
    specs = {name: preset(name, arguments.eot, **how) for name in names}
    for text in arguments.attack:
        row, attack = named_row(text)
        name, settings = written_attack(attack, arguments.eot, **how)
        if row in specs:
            raise ConfigError(f"two attacks are named {row!r}; give each row a name of its own: NAME=pgd:steps=50")
        if "eps" in settings and arguments.eps is not None:
            raise ConfigError(f"attack {text!r} has an eps of its own and --eps is given too; give one of them")
        specs[row] = (name, settings)
    return specs


def record_path(arguments: argparse.Namespace) -> Path:
    """Return where the record goes; a name of our own choice never replaces a record.

    Raises:
        CheckpointError: ``--out`` is something else than a record of an evaluation.
    """
    return new_record(arguments, records_of(arguments.run), "evaluation")


def sizes_of(config: EvaluateConfig) -> list[float]:
    """Return the sizes that are asked for, none where the attacks have their own."""
    return [] if config.eps is None else config.eps if isinstance(config.eps, list) else [config.eps]


def with_predictors(
    config: EvaluateConfig, arguments: argparse.Namespace, header: Mapping[str, Any]
) -> tuple[EvaluateConfig, list[str]]:
    """Return the config with predictor and passes, and what to tell: by default as the defense of the run predicts."""
    own, passes = own_predictor(header)
    if arguments.members is None and passes:
        config = replace(config, members=passes)
    if arguments.predictor is not None or own == "single":
        return config, []
    note = (
        f"predictor {own} of {config.members} passes, as the paper of {header.get('defense')} predicts, and every "
        "attack is on that; --predictor single scores single draws"
    )
    return replace(config, predictor=own), [note]


def without_doubles(model: Any, attacks: dict[str, Attack]) -> tuple[dict[str, Attack], list[str]]:
    """Leave out an EOT attack that, on a network without noise, equals another one of the table; say so."""
    from learn2perturb.noise import is_stochastic

    if is_stochastic(model):
        return attacks, []
    kept: dict[str, Attack] = {}
    notes = []
    for name, attack in attacks.items():
        twin = next((other for other in attacks if other != name and attacks[other] == replace(attack, eot=1)), None)
        if attack.eot > 1 and twin is not None:
            notes.append(f"{name} is left out: without noise it is the same as {twin}")
        else:
            kept[name] = attack
    return kept, notes


def short_attacks(attacks: Mapping[str, Attack], sizes: list[float]) -> list[str]:
    """Say which attacks cannot reach the edge of their ball with all their steps: they look too weak."""
    notes = []
    for name, attack in attacks.items():
        reach = getattr(attack, "steps", 1) * getattr(attack, "step_size", float("inf"))
        largest = max(sizes) if sizes and attack.sized else attack.eps
        if reach < largest < float("inf"):
            notes.append(f"the steps of {name} reach {reach:.3g} in all, less than eps {largest:.3g}")
    return notes


def through(model: Any, attacks: Mapping[str, Attack], modules: str) -> dict[str, Attack]:
    """Return the attacks, those by gradients with the gradient of ``modules`` replaced (BPDA), and named so.

    Raises:
        ConfigError: the model has no such submodule, or no attack takes gradients.
    """
    from learn2perturb.attacks import BPDA, bpda

    with bpda(model, modules):  # refused before anything is computed
        pass
    if not any(attack.needs_gradient for attack in attacks.values()):
        raise ConfigError(f"--bpda {modules} replaces gradients, and no attack takes any; add one such as pgd20")
    found: dict[str, Attack] = {}
    for name, attack in attacks.items():
        if attack.needs_gradient:
            found[f"{name}+bpda"] = BPDA(attack=attack, modules=modules)
        else:
            found[name] = attack
    return found


def unconverged(result: Evaluation) -> list[str]:
    """Say of which rows the search for the least norm had not converged, and on how many images."""
    notes = []
    for row in result.rows:
        rising, falling = row.c_rising or 0, row.loss_falling or 0
        if rising or falling:
            notes.append(
                f"{row.label}: no constant was large enough for {rising / row.n:.1%} of the images, and the objective "
                f"of {falling / row.n:.1%} was still falling: more effort finds more; cw-strong makes it"
            )
    return notes


def summary(result: Evaluation) -> list[dict[str, Any]]:
    """Return the rows without the raw bits, which are in the record."""
    return [
        {
            "attack": row.attack, "eps": row.eps, "noise": row.noise, "stochastic": row.stochastic,
            "predictor": row.predictor, "members": row.members, "n": row.n, "draws": row.draws,
            "accuracy": row.accuracy, "std": row.std, "interval": [row.interval.low, row.interval.high],
            "worst_of": {str(count): value for count, value in row.worst_of.items()},
        }
        for row in result.rows
    ]  # fmt: skip
