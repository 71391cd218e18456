"""Where the weights of a trained network lie, and whether a record can be of them. Knows no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

from learn2perturb import zoo
from learn2perturb.digests import digest
from learn2perturb.errors import CheckpointError, MissingDependencyError
from learn2perturb.naming import HUB
from learn2perturb.reading import PACKED, parse_json, reading, unpacked

FOLDER, MODEL, RESUME = "checkpoints", "model.safetensors", "resume.pt"
MODEL_FILES = (MODEL, MODEL + PACKED)  # what the weights of a folder may be called
HEADER, EXTRA = "learn2perturb", "extra_state"  # the entry of a file's metadata that is ours, and one within it
PLACES = f"a run folder, a .safetensors file, {zoo.PREFIX}NAME, or {HUB}owner/name"
_STEP = re.compile(r"\d{10,}")
# Types of tensors as safetensors writes them -> as torch does, and fingerprints with it.
_TYPES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first: folders named by a step, copies and backups left out."""
    try:
        folders = [path for path in (Path(run) / FOLDER).iterdir() if _STEP.fullmatch(path.name)]
    except OSError:
        return []
    found = [path for path in folders if (path / MODEL).is_file() and (path / RESUME).is_file()]
    return sorted(found, key=lambda path: int(path.name))


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the safetensors file that ``source`` stands for.

    Raises:
        CheckpointError: there is none.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"{source!r} is no path; give {PLACES}")
    text = os.fspath(source)
    if text.startswith(HUB):
        return from_hub(text.removeprefix(HUB))
    if text.startswith(zoo.PREFIX):
        return zoo.weights(text.removeprefix(zoo.PREFIX))
    path = Path(text)
    if path.is_dir():
        found = checkpoints(path)
        if found:
            return found[-1] / MODEL
        for name in MODEL_FILES:
            if (path / name).exists():
                return path / name
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder that has trained, or a .safetensors file")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give {PLACES}")
    return path


def from_hub(name: str, filename: str = MODEL) -> Path:
    """Return a file of the Hugging Face hub, fetched where it is not there yet.

    Raises:
        CheckpointError: it cannot be fetched.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MissingDependencyError("the hub needs huggingface_hub: pip install 'learn2perturb[hub]'") from None
    try:
        return Path(hf_hub_download(repo_id=name, filename=filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{HUB}{name} cannot be fetched ({reason}); check the name and the network") from None


def fingerprint_of_file(path: Path) -> str | None:
    """Return what :func:`~learn2perturb.engine.identity.fingerprint_of_weights` says of the network in a file of ours.

    None for a file that is none of ours, whose tensors may have other names and types than those of the network.

    Raises:
        CheckpointError: it is no readable safetensors file.
    """
    import safetensors

    with reading(f"{path} is no readable safetensors file", "use another checkpoint", CheckpointError):
        with unpacked(path) as plain:
            with safetensors.safe_open(str(plain), framework="numpy") as file:
                text = (file.metadata() or {}).get(HEADER)
            if text is None:
                return None
            tensors = dict(safetensors.deserialize(plain.read_bytes()))
        # What a module keeps beside its tensors is no weight, nor are the tensors in it (see runs.extra).
        beside = tuple(f"{name}#" for name in parse_json(text).get(EXTRA) or ())
        return digest(
            (name, f"torch.{_TYPES[one['dtype']]}", tuple(one["shape"]), one["data"])
            for name, one in sorted(tensors.items())
            if not name.startswith(beside)
        )


@final
class Weights:
    """The weights of a run folder, which records that lie in it are held against; read once, for the first of them."""

    def __init__(self, run: str | os.PathLike[str]) -> None:
        self.run = Path(run)

    def misfit(self, metadata: Mapping[str, Any]) -> str | None:
        """Return why a record of these ``metadata`` is not known to be of the weights in this folder; None where it is.

        Where nobody can tell there is nothing to say: no weights lie here, or none of ours, or the record names none.
        """
        weights = metadata.get("weights")
        if weights is None:
            return None
        try:
            own = self._fingerprint
        except CheckpointError as error:
            return f"the weights here cannot be read, so nobody knows whether it is of them: {error}"
        return None if own in (None, weights) else f"it is of other weights ({weights}) than lie here ({own})"

    @cached_property
    def _fingerprint(self) -> str | None:
        try:
            path = locate(self.run)
        except CheckpointError:
            return None
        return fingerprint_of_file(path)
