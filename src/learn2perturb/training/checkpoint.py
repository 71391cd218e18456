"""Checkpoints that are whole or absent: a folder is written aside, synced, and renamed into place.

``checkpoints/0000000782/model.safetensors`` holds the network and how to build it again, ``resume.pt`` the momenta and
the position. Loading executes nothing: safetensors, and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from learn2perturb.engine.identity import fingerprint
from learn2perturb.errors import CheckpointError
from learn2perturb.noise import noise_spec
from learn2perturb.reading import check_regular, parse_json, reading

FOLDER, MODEL, RESUME = "checkpoints", "model.safetensors", "resume.pt"
MOST_TENSORS = 100_000
# What a header may hold: the type of each entry that is there.
_HEADER: dict[str, type] = {
    "version": int, "registered_name": str, "build_arguments": dict, "noise": list, "config": dict,
    "input_shape": list, "defense": str, "predictor": str, "members": int, "dataset": str, "epoch": int,
}  # fmt: skip
FORMAT, RESUME_FORMAT, VERSION = "learn2perturb.model", "learn2perturb.resume", 1
_KEY, _SUM = "learn2perturb", "learn2perturb_sum"
_NAME = re.compile(r"\d{10,}")  # a copy of a checkpoint, or a backup beside it, has another name


class DamagedError(CheckpointError):
    """A file is not as it was written; another checkpoint may serve."""


def _parts(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested plain data under their paths, and what is no tensor as part of a name."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(item, f"{path}/{key!r}")
    elif isinstance(value, (list, tuple)):
        yield f"{path}#{len(value)}", torch.empty(0)
        for index, item in enumerate(value):
            yield from _parts(item, f"{path}/{index}")
    else:
        yield f"{path}={value!r}", torch.empty(0)


def _seal(header: str, state: Mapping[str, Any]) -> str:
    return fingerprint([*_parts(header), *_parts({key: state[key] for key in sorted(state)})])


def model_bytes(model: nn.Module, metadata: dict[str, Any]) -> bytes:
    """Return ``model`` as safetensors bytes, with ``metadata`` and the description of its noise in the header."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "registered_name": getattr(model, "registered_name", None),
        "build_arguments": getattr(model, "build_arguments", None),
        "noise": noise_spec(model),
        **metadata,
    }
    text = json.dumps(header)
    return save(state, metadata={_KEY: text, _SUM: _seal(text, state)})


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the header of a ``.safetensors`` file.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist; give a run folder or a .safetensors file")
    with reading(f"{path} is no readable safetensors file", "use another checkpoint", DamagedError):
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise ValueError(f"it has {len(names):,} tensors, and {MOST_TENSORS:,} are the most")
            state = {key: file.get_tensor(key) for key in names}
    text = metadata.get(_KEY)
    # Files from before there was a sum have none.
    if _SUM in metadata and metadata[_SUM] != _seal(text or "", state):
        raise DamagedError(f"{path} is damaged: it is not what was written; use another checkpoint")
    if text is None:
        return state, {}
    with reading(f"the header of {path} is damaged", "use another checkpoint", DamagedError):
        header = parse_json(text)
        _check_header(header)
    if header.get("version", 0) > VERSION:
        raise CheckpointError(f"{path} is of version {header['version']}, newer than {VERSION}; update learn2perturb")
    return state, header


def _check_header(header: Any) -> None:
    """Refuse a header whose entries are of other types than :func:`model_bytes` writes."""
    if not isinstance(header, dict):
        raise ValueError(f"it is a {type(header).__name__}, not an object")
    for key, kind in _HEADER.items():
        value = header.get(key)
        if not (value is None or isinstance(value, kind)) or isinstance(value, bool):
            raise ValueError(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    shape = header.get("input_shape") or []
    if any(isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1_000_000 for size in shape):
        raise ValueError("input_shape holds other things than sizes")
    if any(not isinstance(entry, dict) for entry in header.get("noise") or []):
        raise ValueError("noise holds other things than objects")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(run: Path, step: int, model: bytes, resume: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of ``step`` and drop all but the ``keep`` newest.

    Raises:
        CheckpointError: it cannot be written; those before it are as they were.
    """
    folder = run / FOLDER
    final = folder / f"{step:010d}"
    aside = folder / f".{final.name}.{os.getpid()}.tmp"
    buffer = io.BytesIO()
    torch.save({**resume, "sum": _seal("", resume)}, buffer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()
        for name, content in ((MODEL, model), (RESUME, buffer.getvalue())):
            (aside / name).write_bytes(content)
            _sync(aside / name)
        _sync(aside)
        if final.exists() and final not in checkpoints(run):  # a part of it was deleted
            shutil.rmtree(final)
        if not final.exists():  # the same step of the same training holds the same numbers
            aside.rename(final)
            _sync(folder)
    except OSError as error:
        raise CheckpointError(f"checkpoint {final} cannot be written: {error}; free space, or another --out") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    folders = [path for path in (Path(run) / FOLDER).glob("[0-9]*") if _NAME.fullmatch(path.name)]
    whole = [path for path in folders if (path / MODEL).exists() and (path / RESUME).exists()]
    return sorted(whole, key=lambda path: int(path.name))


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that the step it is of can be saved again; nothing is deleted.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    number = 0
    while (aside := checkpoint.with_name(f"{checkpoint.name}.damaged{number or ''}")).exists():
        number += 1
    try:
        checkpoint.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} is damaged and cannot be renamed: {error}; delete it") from None


def read_resume(checkpoint: Path) -> dict[str, Any]:
    """Return the resume state of a checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(checkpoint / RESUME, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedError(f"{checkpoint / RESUME} is damaged ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != RESUME_FORMAT:
        raise DamagedError(f"{checkpoint / RESUME} is no resume state")
    if state.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{checkpoint / RESUME} is of version {state['version']}, newer than {VERSION}; update learn2perturb"
        )
    # Files from before there was a sum have none.
    if "sum" in state and state.pop("sum") != _seal("", state):
        raise DamagedError(f"{checkpoint / RESUME} is damaged: it is not what was written")
    return state


def newest(run: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Return the newest checkpoint that is whole, its weights, its resume state, and what is wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or one is of a newer version.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            resume, (state, _) = read_resume(checkpoint), read_model(checkpoint / MODEL)
        except DamagedError as error:
            damaged.append((checkpoint, str(error)))
            continue
        for path, _ in damaged:
            set_aside(path)
        return checkpoint, state, resume, [reason for _, reason in damaged]
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {run} can be read: {damaged[0][1]}; give another --out, or delete {run / FOLDER} to "
            "start again"
        )
    return None
