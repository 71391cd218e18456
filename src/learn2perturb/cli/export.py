"""``learn2perturb export``: a trained network for others: a plain state dict, and what RobustBench wants to know."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.checks import check_choice
from learn2perturb.cli.networks import add_network, build_named, settle_network
from learn2perturb.cli.options import add_json, print_json, typed, words
from learn2perturb.cli.subject import is_record, name_of
from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.evaluation.config import PREDICTORS
from learn2perturb.records import atomic_write
from learn2perturb.values import convert

if TYPE_CHECKING:
    from torch import nn

    from learn2perturb.evaluation import Evaluation

DESCRIPTION = (
    "Write a trained network in the forms that others read: its state dict as safetensors, a RobustBench model-info\n"
    "file filled from the run and its evaluation records (null, with a note, where they do not say), and programs for\n"
    "other runtimes (torch-export, onnx): batches of any size, noise drawn anew at each call, compared when written."
)
EXAMPLE = "learn2perturb export runs/digits --format robustbench,safetensors --out exported"
USUAL, PROGRAMS = ("robustbench", "safetensors"), ("torch-export", "onnx")
FORMATS = (*USUAL, *PROGRAMS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add_network(parser)
    add("--num-classes", type=typed("int"), metavar="N", help="classes of --model, where no run says so")
    add("--input-shape", metavar="C,H,W", help="one image of --model, where no run says so: 3,32,32")
    usual = ",".join(USUAL)
    add("--format", metavar="NAMES", help=f"of {', '.join(FORMATS)} (default {usual}; safetensors of --model)")
    add(
        "--predictor", default="single", metavar="NAME",
        help=f"what a program answers by: {', '.join(PREDICTORS)} (default single)",
    )  # fmt: skip
    add("--members", type=typed("int"), default=10, metavar="M", help="passes of that predictor (default 10)")
    add("--out", metavar="DIR", help="folder of the files (default RUN/export)")
    add(
        "--evaluation", action="append", default=[], metavar="FILE",
        help="an evaluation record, may be repeated (default: those in RUN/evaluation)",
    )  # fmt: skip
    add("--without-noise", action="store_true", help="export the plain network, without its noise")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the files and name them."""
    settle_network(arguments)
    formats = words(arguments.format or ("safetensors" if arguments.named else ",".join(USUAL)), "--format")
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError.of("export format", name, FORMATS)

    check_choice("--predictor", arguments.predictor, PREDICTORS)
    if arguments.named:
        return _named(arguments, formats)

    from learn2perturb.runs.checkpoint import read_model
    from learn2perturb.runs.files import locate

    header = read_model(locate(arguments.run))[1]
    name = name_of(arguments.run)
    out = _folder(arguments)
    evaluations, notes = _evaluations(arguments) if "robustbench" in formats else ([], [])
    written: dict[str, str] = {}
    if "safetensors" in formats:
        content = _state(arguments.run, without_noise=arguments.without_noise)
        written["safetensors"] = str(atomic_write(out / f"{name}.safetensors", content))
    if "robustbench" in formats:
        from learn2perturb.evaluation.robustbench import model_info

        weights = _weights(arguments.run, without_noise=arguments.without_noise)
        found = model_info(header, evaluations, weights=weights, noise=not arguments.without_noise)
        written["robustbench"] = str(atomic_write(out / f"{name}.json", json.dumps(found.info, indent=2) + "\n"))
        notes += found.notes
    if any(form in PROGRAMS for form in formats):
        from learn2perturb.runs.loading import load

        shape = _shape(arguments) or tuple(header.get("input_shape") or ())
        if not shape:
            raise ConfigError(f"{arguments.run} does not say of which images it is; give --input-shape C,H,W")
        own = None
        if arguments.model is not None:
            own = build_named(arguments, arguments.num_classes or len(header.get("classes") or ()) or 10, shape)
        model = load(arguments.run, model=own)
        notes += _programs(arguments, model, header, shape, out / name, formats, written)
    return _told(arguments, written, notes)


def _told(arguments: argparse.Namespace, written: dict[str, str], notes: list[str]) -> int:
    if arguments.json:
        print_json({"files": written, "notes": notes})
        return 0
    for kind, path in written.items():
        print(f"{kind}: {path}")
    for note in notes:
        print(f"note: {note}")
    return 0


def _named(arguments: argparse.Namespace, formats: list[str]) -> int:
    """Write a network that is no run."""
    from safetensors.torch import save

    if "robustbench" in formats:
        raise ConfigError("robustbench is of a run and its records; leave it out of --format")
    shape = _shape(arguments)
    if shape is None or arguments.num_classes is None:
        raise ConfigError(f"{arguments.run} is no run that says so; give --input-shape C,H,W and --num-classes N")
    model = build_named(arguments, arguments.num_classes, shape)
    out = (Path(arguments.out) if arguments.out else Path("export")) / name_of(arguments.run)
    written: dict[str, str] = {}
    if "safetensors" in formats:
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        path = out.with_name(f"{out.name}.safetensors")
        written["safetensors"] = str(atomic_write(path, save(state, {"format": "pt"})))
    notes = _programs(arguments, model, {}, shape, out, formats, written)
    return _told(arguments, written, notes)


def _shape(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    """Return what ``--input-shape`` says.

    Raises:
        ConfigError: it is no shape of an image.
    """
    if arguments.input_shape is None:
        return None
    sizes = convert("list[int]", arguments.input_shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigError(f"--input-shape is {arguments.input_shape!r}; write channels, height, width: 3,32,32")
    return tuple(sizes)


def _programs(
    arguments: argparse.Namespace,
    model: nn.Module,
    header: Mapping[str, Any],
    shape: tuple[int, ...],
    place: Path,
    formats: list[str],
    written: dict[str, str],
) -> list[str]:
    """Write the programs that are asked for, and add them to ``written``; return how they compare."""
    from learn2perturb.evaluation import Predictor
    from learn2perturb.evaluation.deploying import SUFFIXES, deploy
    from learn2perturb.noise import remove_noise

    if arguments.without_noise:
        model = remove_noise(model)
    if arguments.predictor != "single":
        model = Predictor(model, arguments.predictor, arguments.members)
    facts = {
        "network": header.get("registered_name"), "defense": header.get("defense"), "dataset": header.get("dataset"),
        "classes": header.get("classes"), "input_shape": list(shape), "noise": not arguments.without_noise,
        "predictor": arguments.predictor, "members": 1 if arguments.predictor == "single" else arguments.members,
    }  # fmt: skip
    notes = []
    for kind in PROGRAMS:
        if kind in formats:
            path = place.with_name(place.name + SUFFIXES[kind])
            done = deploy(model, path, kind, input_shape=shape, facts=facts)
            written[kind] = str(done.path)
            notes.append(f"{kind}: {done}")
    return notes


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.out:
        return Path(arguments.out)
    folder = Path(arguments.run)
    return folder / "export" if folder.is_dir() else Path("export")


def _state(source: str, *, without_noise: bool) -> bytes:
    """Return the state dict as safetensors; its header lets ``load`` rebuild the network, others may ignore it."""
    from safetensors.torch import save

    from learn2perturb.runs.checkpoint import read_model, sealed
    from learn2perturb.runs.files import locate
    from learn2perturb.runs.loading import load

    state, header = read_model(locate(source))
    if without_noise and header.get("noise"):
        from learn2perturb.noise import remove_noise

        state = dict(remove_noise(load(source)).state_dict())
        header["noise"] = []
    config = header.get("config")
    if config:
        config.pop("data_dir", None)  # where the data lie on one machine is nobody else's affair
    return sealed(state, header, format="pt") if header else save(state, metadata={"format": "pt"})


def _weights(source: str, *, without_noise: bool) -> dict[str, bool]:
    """Return hash of the weights -> whether the noise is on in rows that are of the exported network."""
    from learn2perturb.engine.identity import fingerprint_of_state, fingerprint_of_weights
    from learn2perturb.runs.checkpoint import read_model
    from learn2perturb.runs.files import locate
    from learn2perturb.runs.loading import load

    state, header = read_model(locate(source))
    own = fingerprint_of_state(state)
    if not (without_noise and header.get("noise")):
        return {own: True}
    from learn2perturb.noise import remove_noise

    return {own: False, fingerprint_of_weights(remove_noise(load(source))): True}


def _evaluations(arguments: argparse.Namespace) -> tuple[list[Evaluation], list[str]]:
    """Return the records to read, and notes on those in the run folder that are left out."""
    from learn2perturb.evaluation import Evaluation

    if arguments.evaluation:
        return [Evaluation.load(path) for path in arguments.evaluation], []
    found, notes = [], []
    for path in sorted((Path(arguments.run) / "evaluation").glob("*.json")):
        try:
            found.append(Evaluation.load(path))
        except CheckpointError as error:
            if not any(is_record(path, kind) for kind in ("certification", "diagnosis")):
                notes.append(f"left out: {error}")
    return found, notes
