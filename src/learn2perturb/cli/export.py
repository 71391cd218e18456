"""``learn2perturb export``: a trained network for others: a plain state dict, and what RobustBench wants to know."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from learn2perturb.cli.options import add_json, print_json, words
from learn2perturb.cli.subject import is_record
from learn2perturb.errors import CheckpointError, UnknownNameError
from learn2perturb.records import atomic_write

if TYPE_CHECKING:
    from learn2perturb.evaluation import Evaluation

DESCRIPTION = (
    "Write a trained network in the forms that others read: its state dict as safetensors, and a RobustBench\n"
    "model-info file filled from the run and its evaluation records (null, with a note, where they do not say)."
)
EXAMPLE = "learn2perturb export runs/digits --format robustbench,safetensors --out exported"
FORMATS = ("robustbench", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, a .safetensors file, zoo:NAME, or hf-hub:owner/name")
    add("--format", default=",".join(FORMATS), metavar="NAMES", help=f"of {', '.join(FORMATS)} (default: all)")
    add("--out", metavar="DIR", help="folder of the files (default RUN/export)")
    add(
        "--evaluation", action="append", default=[], metavar="FILE",
        help="an evaluation record, may be repeated (default: those in RUN/evaluation)",
    )  # fmt: skip
    add("--without-noise", action="store_true", help="export the plain network, without its noise")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the files and name them."""
    formats = words(arguments.format, "--format")
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError.of("export format", name, FORMATS)

    from learn2perturb.runs.checkpoint import read_model
    from learn2perturb.runs.loading import locate

    header = read_model(locate(arguments.run))[1]
    name = Path(arguments.run.rpartition(":")[2]).resolve().name.removesuffix(".safetensors")
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
    if arguments.json:
        print_json({"files": written, "notes": notes})
        return 0
    for kind, path in written.items():
        print(f"{kind}: {path}")
    for note in notes:
        print(f"note: {note}")
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.out:
        return Path(arguments.out)
    folder = Path(arguments.run)
    return folder / "export" if folder.is_dir() else Path("export")


def _state(source: str, *, without_noise: bool) -> bytes:
    """Return the state dict as safetensors; its header lets ``load`` rebuild the network, others may ignore it."""
    from safetensors.torch import save

    from learn2perturb.runs.checkpoint import read_model, sealed
    from learn2perturb.runs.loading import load, locate

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
    from learn2perturb.runs.loading import load, locate

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
