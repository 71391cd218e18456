"""Where the weights of a trained network lie, and whether a record can be of them. Knows no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from learn2perturb import zoo
from learn2perturb.digests import digest
from learn2perturb.errors import CheckpointError, MissingDependencyError
from learn2perturb.naming import HUB
from learn2perturb.reading import PACKED, check_regular, parse_json, reading, unpacked

FOLDER, MODEL, RESUME = "checkpoints", "model.safetensors", "resume.pt"
MODEL_FILES = (MODEL, MODEL + PACKED)  # what the weights of a folder may be called
HEADER, EXTRA = "learn2perturb", "extra_state"  # the entry of a file's metadata that is ours, and one within it
PLACES = f"a run folder, a .safetensors file, {zoo.PREFIX}NAME, or {HUB}owner/name"
MOST_TENSORS = 100_000  # of a file
_OWN = "__metadata__"  # the entry of safetensors among the tensors of a file
_SAME = ("defense", "model", "dataset", "seed")  # settings that no longer training of a run changes
_STEP = re.compile(r"\d{10,}")
# Types of tensors as safetensors writes them -> as torch does, and fingerprints with it.
TYPES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F16": "float16",
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


@final
@dataclass(frozen=True)
class Found:
    """What a file of weights says of itself: its fingerprint, None where nobody can tell, and its header."""

    fingerprint: str | None
    header: Mapping[str, Any]


def look(path: Path) -> Found:
    """Return what a safetensors file says of the network in it; one tensor at a time is in memory.

    The fingerprint is what :func:`~learn2perturb.engine.identity.fingerprint_of_weights` gives for the network; there
    is none of a file that is not ours, whose tensors may be called otherwise, or with types that torch does not have.

    Raises:
        CheckpointError: it is no readable safetensors file.
    """
    from safetensors import safe_open

    with reading(f"{path} is no readable safetensors file", "use another checkpoint", CheckpointError):
        check_regular(path)
        with unpacked(path) as plain:
            with safe_open(str(plain), framework="numpy") as file:  # which refuses what is damaged
                text = (file.metadata() or {}).get(HEADER)
                if len(file.keys()) > MOST_TENSORS:
                    raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
            header = {} if text is None else parse_json(text)
            extra = header.get(EXTRA) or {} if isinstance(header, dict) else None
            if not isinstance(extra, dict):
                raise ValueError("its header is no object")
            return Found(None if text is None else _fingerprint(plain, extra), header)


def _fingerprint(path: Path, extra: Mapping[str, Any]) -> str | None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(size))

        def content(name: str) -> bytes:
            start, end = tensors[name]["data_offsets"]
            file.seek(8 + size + start)
            return file.read(end - start)

        # What a module keeps beside its tensors is no weight, nor are the tensors in it (see runs.extra).
        names = sorted(name for name in tensors if name != _OWN and name.rpartition("#")[0] not in extra)
        if any(tensors[name]["dtype"] not in TYPES for name in names):
            return None
        return digest(
            (name, f"torch.{TYPES[tensors[name]['dtype']]}", tuple(tensors[name]["shape"]), content(name))
            for name in names
        )


@final
class Weights:
    """The weights of a run folder, which what lies beside them is held against; read once, when first asked for."""

    def __init__(self, run: str | os.PathLike[str]) -> None:
        self.run = Path(run)

    def misfit(self, metadata: Mapping[str, Any]) -> str | None:
        """Return why a record of these ``metadata`` is of other weights than lie here.

        None where it is of these or nobody can tell: no weights lie here, none that can be read (see ``fault``), none
        of ours, or the record names none.
        """
        weights, own = metadata.get("weights"), self._found.fingerprint
        if weights is None or own is None or own in (weights, metadata.get("file")):
            return None
        return f"it is of other weights ({weights}) than lie here ({own})"

    def stranger_to(self, config: Mapping[str, Any]) -> str | None:
        """Return why settings are of another training than the weights here, None where they are of it or may be."""
        trained = self._found.header.get("config")
        for key in _SAME:
            own = trained.get(key) if isinstance(trained, dict) else None
            if own is not None and key in config and config[key] != own:
                return f"its {key} is {config[key]!r}, and the weights here were trained with {own!r}"
        return None

    @property
    def fault(self) -> str | None:
        """Why the weights that lie here cannot be read; None where they can, or where there are none."""
        return self._looked[1]

    @property
    def _found(self) -> Found:
        return self._looked[0]

    @cached_property
    def _looked(self) -> tuple[Found, str | None]:
        fault = None
        for _ in range(2):  # a training may drop the checkpoint that was its last a moment ago
            try:
                path = locate(self.run)
            except CheckpointError:
                return Found(None, {}), None
            try:
                return look(path), None
            except CheckpointError as error:
                fault = str(error)
                if path.exists():
                    break
        return Found(None, {}), fault
