"""Checkpoints that are whole or absent: a folder is written aside, synced, and renamed into place.

``checkpoints/0000000782/model.safetensors`` holds the network and how to build it again, ``resume.pt`` the momenta and
the position. Loading executes nothing: safetensors, and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from learn2perturb.engine.identity import fingerprint
from learn2perturb.errors import CheckpointError
from learn2perturb.noise import named_noise, noise_spec
from learn2perturb.plugins import PARTS
from learn2perturb.reading import check_regular, parse_json, read_bytes, reading, unpacked
from learn2perturb.records import is_alive, make_folder
from learn2perturb.runs import extra
from learn2perturb.runs.files import EXTRA, FOLDER, HEADER, MODEL, MOST_TENSORS, RESUME, checkpoints

FINGERPRINT = "fingerprint"  # an entry of the header
# What a header may hold: the type of each entry that is there.
_HEADER: dict[str, type] = {
    "version": int, "registered_name": str, "build_arguments": dict, "noise": list, "config": dict,
    "input_shape": list, "defense": str, "predictor": str, "members": int, "dataset": str, "epoch": int,
    "step": int,
    FINGERPRINT: str, EXTRA: dict, PARTS: list,
}  # fmt: skip
FORMAT, RESUME_FORMAT, VERSION = "learn2perturb.model", "learn2perturb.resume", 1
RESUME_VERSION = 2  # 1 had no checksum, no text of the metrics, no identity of data and network
# What a resume state is made of; what was added later may be missing.
_RESUMED: dict[str, Any] = {
    "epoch": int, "batch": int, "stage": int, "batches": int, "gear": str, "optimizers": dict, "totals": dict,
    "seconds": (int, float), "metrics_bytes": int,
}  # fmt: skip


class DamagedError(CheckpointError):
    """A file is not as it was written; another checkpoint may serve."""


def model_bytes(model: nn.Module, metadata: dict[str, Any]) -> bytes:
    """Return ``model`` as safetensors bytes, with ``metadata`` and the description of its noise in the header.

    Raises:
        ConfigError: an extra state of it is no plain data.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "registered_name": getattr(model, "registered_name", None),
        "build_arguments": getattr(model, "build_arguments", None),
        "noise": noise_spec(model),
        **metadata,
    }
    return sealed(model.state_dict(), header)


def sealed(state: dict[str, Any], header: dict[str, Any], **others: str) -> bytes:
    """Return weights and header as safetensors bytes, with a fingerprint of both that :func:`read_model` checks.

    ``others`` are further entries of the file's own metadata.

    Raises:
        ConfigError: ``state`` holds extra state that is no plain data.
    """
    tensors, rest = extra.split(state)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    header = json.loads(json.dumps({**header, **({EXTRA: rest} if rest else {})}))
    header.pop(FINGERPRINT, None)
    header[FINGERPRINT] = _fingerprint(tensors, header)
    return save(tensors, metadata={**others, HEADER: json.dumps(header)})


def _fingerprint(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in header.items() if key != FINGERPRINT}, sort_keys=True)
    words = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return fingerprint([("", words), *((key, tensors[key]) for key in sorted(tensors))])


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dict and the header of a ``.safetensors`` file, or of one that ``xz`` has packed.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist; give a run folder or a .safetensors file")
    with reading(f"{path} is no readable safetensors file", "use another checkpoint", DamagedError):
        check_regular(path)
        with unpacked(path) as plain, safe_open(str(plain), framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise ValueError(f"it has {len(names):,} tensors, and {MOST_TENSORS:,} are the most")
            state = {key: file.get_tensor(key) for key in names}
    if text is None:
        return state, {}
    with reading(f"the header of {path} is damaged", "use another checkpoint", DamagedError):
        header = parse_json(text)
        _check_header(header)
    if (header.get("version") or 0) > VERSION:
        raise CheckpointError(f"{path} is of version {header['version']}, newer than {VERSION}; update learn2perturb")
    # Files of before have none.
    if FINGERPRINT in header and header[FINGERPRINT] != _fingerprint(state, header):
        raise DamagedError(f"{path} is damaged: its weights or header are not what was written; use another checkpoint")
    with reading(f"the header of {path} is damaged", "use another checkpoint", DamagedError):
        return extra.joined(state, header.pop(EXTRA, None) or {}), header


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


def check_noise(path: Path, network: nn.Module, state: dict[str, Any]) -> None:
    """Refuse weights that lack a part of the noise of ``network``: it would stay at its first value.

    Raises:
        CheckpointError: they do.
    """
    places = [(".".join(filter(None, (site, noise.path))), noise) for site, noise in named_noise(network)]
    wanted = [f"{place}.{key}" for place, noise in places for key in noise.state_dict()]
    missing = [key for key in wanted if key not in state]
    if missing:
        raise CheckpointError(
            f"{path} declares noise and lacks {', '.join(map(repr, missing[:3]))} among its weights; use another "
            "checkpoint"
        )


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
    parts = {MODEL: model, RESUME: resume_bytes(resume)}
    try:
        make_folder(folder)
        _clear(folder)
        aside.mkdir()
        for name, part in parts.items():
            (aside / name).write_bytes(part)
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


def _clear(folder: Path) -> None:
    """Remove what processes that have ended left half written, and what this one did."""
    for stale in folder.glob(".*.tmp"):
        owner = stale.name.split(".")[-2]
        if owner.isdigit() and (int(owner) == os.getpid() or not is_alive(int(owner))):
            shutil.rmtree(stale, ignore_errors=True)


def resume_bytes(state: dict[str, Any]) -> bytes:
    """Return a resume state as the content of ``resume.pt``: within it lies its own checksum."""
    content = _saved(state)
    outer = {
        "format": RESUME_FORMAT,
        "version": RESUME_VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "state": torch.frombuffer(bytearray(content), dtype=torch.uint8),
    }
    return _saved(outer)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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
    path = checkpoint / RESUME
    fix = f"delete the folder {checkpoint} to resume from the checkpoint before it"
    try:
        state = _loaded(read_bytes(path, os.stat(path).st_size))
        if state.get("format") != RESUME_FORMAT:
            raise DamagedError(f"{path} is no resume state; {fix}")
        if state["version"] > RESUME_VERSION:
            raise CheckpointError(
                f"{path} is of version {state['version']}, newer than {RESUME_VERSION}; update learn2perturb"
            )
        if state["version"] > 1:
            content = state["state"].numpy().tobytes()
            if hashlib.sha256(content).hexdigest() != state["sha256"]:
                raise ValueError("its checksum differs")
            state = _loaded(content)
        for key, kind in _RESUMED.items():
            if not isinstance(state[key], kind) or isinstance(state[key], bool):
                raise ValueError(f"its {key} is a {type(state[key]).__name__}")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may fail in any way
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise DamagedError(f"{path} is damaged ({reason}); {fix}") from None
    return state


def _loaded(content: bytes) -> dict[str, Any]:
    state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    return state
