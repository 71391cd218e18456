"""The state as a few files that can be carried off a machine and back: cut to size, checked, never half there.

One zip archive in parts of at most ``PART`` bytes. Weights and momenta are stored with the bytes of their numbers
sorted by significance, which halves what sign and exponent take. A checkpoint too large to be carried at full
precision is rounded (see ``rounding.py``), in the archive only; the manifest says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper_scale.rounding import rounded_model, rounded_resume
from benchmarks.paper_scale.state import WEIGHT_BITS, State
from learn2perturb.errors import CheckpointError
from learn2perturb.records import atomic_write
from learn2perturb.runs.checkpoint import MODEL, RESUME, checkpoints

PART = 15 * 2**20
MOST = 60 * 2**20
LARGE_CHECKPOINT = 40 * 2**20
MOMENTUM_BITS = 16
_SORTED = ".sorted"
_NUMBERS = (".safetensors", ".pt")
_PART = re.compile(r"state-(\d+)-([0-9a-f]{12})\.(\d+)-of-(\d+)")


def pack(state: State, out: Path, *, leave: Sequence[str] = (), cache: bool = False, part: int = PART) -> list[Path]:
    """Write the state into ``out`` and remove what an earlier call has written there; return the files.

    Args:
        leave: runs whose weights and checkpoints are left out; their metrics and records are not.
        cache: also pack compiled kernels.
        part: most bytes of a file.
    """
    manifest: dict[str, Any] = {"positions": {}, "rounded": []}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for run in sorted(path.name for path in (state.folder / "runs").glob("*")):
            position, contents = _run(state, run, run in leave, manifest["rounded"])
            manifest["positions"][run] = position
            for name, content in contents.items():
                _add(archive, name, content)
        for path in _others(state, cache):
            _add(archive, path.relative_to(state.folder).as_posix(), path.read_bytes())
        archive.writestr("manifest.json", json.dumps(manifest))
    content = buffer.getvalue()
    old = [path for path in out.glob("state-*") if _PART.fullmatch(path.name)] if out.is_dir() else []
    label = f"state-{time.time_ns() // 1_000_000}-{hashlib.sha256(content).hexdigest()[:12]}"
    pieces = [content[start : start + part] for start in range(0, len(content), part)]
    written = [
        atomic_write(out / f"{label}.{number}-of-{len(pieces)}", piece) for number, piece in enumerate(pieces, start=1)
    ]
    for path in old:
        path.unlink(missing_ok=True)
    return written


def unpack(folder: Path, state: State) -> list[str]:
    """Add what ``folder`` holds to the state; return the runs that were brought forward.

    A run that is further here than there stays as it is, and so does every record that is here.

    Raises:
        CheckpointError: there is no whole archive, or it is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(_joined(folder))) as archive:
        positions: dict[str, int] = json.loads(archive.read("manifest.json"))["positions"]
        forward = [run for run, position in positions.items() if position > state.position(run)]
        # Metrics before checkpoints, which say how much of them counts; what marks a run as finished last.
        names = sorted(archive.namelist(), key=lambda name: ("checkpoints" in name, name.endswith("finished.json")))
        for name in names:
            parts = Path(name).parts
            if name == "manifest.json" or ".." in parts or Path(name).is_absolute():
                continue
            target = state.folder / name.removesuffix(_SORTED)
            if parts[0] == "slices.jsonl":
                _merge(target, archive.read(name))
            elif parts[0] == "runs":
                # The weights of a finished run that were left elsewhere may come later.
                if parts[1] in forward or (not target.exists() and state.position(parts[1]) <= positions[parts[1]]):
                    atomic_write(target, _restored(name, archive.read(name)))
            elif not target.exists():
                atomic_write(target, _restored(name, archive.read(name)))
    return forward


def _others(state: State, cache: bool) -> Iterator[Path]:
    """Give the files that belong to no training."""
    left = {"runs", "locks", "logs"} | (set() if cache else {"cache"})
    for path in sorted(state.folder.rglob("*")):
        if path.is_file() and path.suffix != ".tmp" and path.relative_to(state.folder).parts[0] not in left:
            yield path


def _run(state: State, run: str, light: bool, rounded: list[str]) -> tuple[int, dict[str, bytes]]:
    """Return how far a run is and the files that say so, the newest checkpoint only; ``light`` is without weights.

    A training that goes on meanwhile replaces its checkpoints: then look again.
    """
    for _ in range(10):
        position = state.position(run)
        found = [] if state.is_finished(run) else checkpoints(state.run(run))[-1:]
        # The metrics last: those beyond the checkpoint are cut off by who resumes, none may lack.
        paths = [path for folder in found for path in (folder / MODEL, folder / RESUME)]
        paths += [path for path in sorted(state.run(run).glob("*")) if path.is_file() and path.suffix != ".tmp"]
        if found and int(found[0].name) != position:
            continue
        try:
            small = not found or sum(path.stat().st_size for path in paths[:2]) <= LARGE_CHECKPOINT
            contents = {}
            for path in paths:
                if light and path.suffix in _NUMBERS:
                    continue
                name = path.relative_to(state.folder).as_posix()
                if path.parent in found and not small:
                    rounded.append(name)
                    model = path.name == MODEL
                    content = rounded_model(path, WEIGHT_BITS) if model else _rounded_resume(path)
                else:
                    content = path.read_bytes()
                contents[name] = content
        except (FileNotFoundError, CheckpointError):
            continue
        return position, contents
    raise CheckpointError(f"the files of {run} change faster than they can be read; pack between two slices")


def _rounded_resume(path: Path) -> bytes:
    return rounded_resume(path, WEIGHT_BITS, MOMENTUM_BITS)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    if not name.endswith(_NUMBERS):
        archive.writestr(name, content, compresslevel=6)
        return
    whole = len(content) // 4 * 4
    planes = np.frombuffer(content[:whole], dtype=np.uint8).reshape(-1, 4).T
    archive.writestr(name + _SORTED, planes.tobytes() + content[whole:])


def _restored(name: str, content: bytes) -> bytes:
    if not name.endswith(_SORTED):
        return content
    whole = len(content) // 4 * 4
    return np.frombuffer(content[:whole], dtype=np.uint8).reshape(4, -1).T.tobytes() + content[whole:]


def _merge(target: Path, lines: bytes) -> None:
    """Add lines that are not there yet, in order of time: each begins with its date."""
    before = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
    atomic_write(target, "".join(line + "\n" for line in sorted({*before, *lines.decode().splitlines()})))


def _joined(folder: Path) -> bytes:
    """Return the newest archive of which every part is in ``folder``."""
    found: dict[tuple[int, str], dict[int, Path]] = {}
    whole: dict[tuple[int, str], int] = {}
    for path in folder.glob("state-*"):
        match = _PART.fullmatch(path.name)
        if match:
            key = int(match[1]), match[2]
            found.setdefault(key, {})[int(match[3])] = path
            whole[key] = int(match[4])
    for key in sorted(found, reverse=True):
        if len(found[key]) == whole[key]:
            content = b"".join(found[key][number].read_bytes() for number in sorted(found[key]))
            if hashlib.sha256(content).hexdigest()[:12] != key[1]:
                raise CheckpointError(f"the parts state-{key[0]}-{key[1]} in {folder} are damaged; carry them again")
            return content
    there = ", ".join(sorted(path.name for parts in found.values() for path in parts.values())) or "no part"
    raise CheckpointError(f"{folder} holds no whole archive (it has {there}); give the folder that `pack` wrote, whole")
