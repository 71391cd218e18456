"""From which checkpoint a run goes on, whether it is a run of the same things, and what its metrics were there."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learn2perturb.defenses import Stage
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.runs.checkpoint import DamagedError, read_model, read_resume, set_aside
from learn2perturb.runs.files import MODEL
from learn2perturb.training.folder import METRICS
from learn2perturb.training.metrics import parse_metrics

# Schedules that do not depend on how many epochs there are to be.
UNPLANNED = ("step", "constant")
Say = Callable[[str], object]
# A checkpoint, its resume state and its state dict.
Whole = tuple[Path, dict[str, Any], dict[str, Any]]
# What a run must have in common with the checkpoint that it goes on from, and what it is called if it has not.
_SAME = {"data": "other data, or the same made into others by a transform", "structure": "a network of other layers"}
_FIX = "give the same again, or another --out"


def newest_whole(out: Path, found: list[Path], say: Say) -> Whole:
    """Return the newest checkpoint that is not damaged, its resume state and state dict; say which are passed over.

    Raises:
        CheckpointError: none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(found):
        try:
            resume, (state, header) = read_resume(checkpoint), read_model(checkpoint / MODEL)
        except DamagedError as error:
            damaged.append((checkpoint, str(error).split(";")[0]))
            continue
        # Runs of before say it in the header only.
        resume.setdefault("epochs", (header.get("config") or {}).get("epochs"))
        for place, line in damaged:
            set_aside(place)
            say(f"{line}; going on from the one before, {checkpoint}")
        return checkpoint, resume, state
    raise CheckpointError(
        f"no checkpoint of {out} can be read: {damaged[0][1]}; give another --out, or delete its "
        "folder checkpoints to start again"
    )


def check_same(
    out: Path,
    resume: Mapping[str, Any],
    now: Mapping[str, Any],
    identity: Mapping[str, str],
    *,
    finished: bool,
    say: Say,
) -> None:
    """Refuse a checkpoint of other data or another network than were given.

    Args:
        out: the run folder.
        resume: of the checkpoint.
        now: ``batches``, ``gear`` (the execution mode) and ``compiled`` as they would be.
        identity: of the data and the network that were given.
        finished: whether nothing is left to train.
        say: tells what will differ and is no reason to refuse.

    Raises:
        CheckpointError: it is of others.
    """
    if resume["batches"] != now["batches"]:
        raise CheckpointError(
            f"{out} was trained with {resume['batches']} batches an epoch, these data give {now['batches']}; {_FIX}"
        )
    if resume["gear"] != now["gear"]:
        raise CheckpointError(
            f"{out} was trained in execution mode {resume['gear']!r} and this would be {now['gear']!r}; "
            f"set engine={resume['gear']!r}, or another --out"
        )
    before = resume.get("identity")  # runs of before have none
    if isinstance(before, dict):
        if ("structure" in before) != ("structure" in identity):
            kinds = ("one of this package's", "one that was given")
            there, here = kinds if "structure" in identity else kinds[::-1]
            raise CheckpointError(f"{out} holds a run of another network ({there} there, {here} now); {_FIX}")
        for part, what in _SAME.items():
            if part in before and part in identity and before[part] != identity[part]:
                prints = f"fingerprint {before[part]} there, {identity[part]} now"
                raise CheckpointError(f"{out} was trained on {what} ({prints}); {_FIX}")
        if before.get("start") != identity.get("start"):
            began = f"{out} began from other weights than those of the network given"
            if finished:
                fix = f"learn2perturb.load({str(out)!r}) gives its network, another --out trains yours"
                raise CheckpointError(f"{began}, and is finished; {fix}")
            say(f"{began}, which its checkpoint replaces")
    compiled = resume.get("compiled", now["compiled"])
    if compiled != now["compiled"] and not finished:
        first, then = ("compiled", "uncompiled") if compiled else ("uncompiled", "compiled")
        say(f"{out} was trained {first} and goes on {then}: its draws are others from here on")


def check_code(out: Path, resume: Mapping[str, Any], codes: Mapping[str, str]) -> None:
    """Refuse to go on where the code of a part of the user's own is another than it was.

    Raises:
        CheckpointError: it is.
    """
    before = resume.get("code")  # runs of before have none
    if not isinstance(before, dict):
        return
    for part in sorted(codes.keys() & before.keys()):
        if before[part] != codes[part]:
            raise CheckpointError(
                f"{out} was trained with other code of {part} (fingerprint {before[part]} there, {codes[part]} now); "
                "restore it, or give another --out"
            )


def check_stages(before: Sequence[Stage], now: Sequence[Stage]) -> None:
    """Refuse more epochs where a defense shares them out among stages that have been trained already.

    Raises:
        ConfigError: a stage before the last one would have been of another length.
    """
    if [stage.epochs for stage in before[:-1]] != [stage.epochs for stage in now[: len(before) - 1]]:
        raise ConfigError(
            "the defense shares its epochs out among stages, so more of them make another training; give another --out"
        )


def metrics_text(out: Path, resume: Mapping[str, Any], say: Say) -> bytes:
    """Return what ``metrics.jsonl`` held at a checkpoint; say it where the file does not hold that any more."""
    path = out / METRICS
    there = path.read_bytes() if path.is_file() else b""
    if "metrics" in resume:
        text = zlib.decompress(resume["metrics"].numpy().tobytes())
        if not there.startswith(text):
            say(f"{path} is not what was written; it is put right from the checkpoint")
        return text
    # A run of before: its checkpoints do not hold the text.
    text = there[: resume["metrics_bytes"]]
    lines, wrong = parse_metrics(text)
    if wrong is None and len(text) == resume["metrics_bytes"]:
        return text
    say(
        f"{path} is damaged or cut off, and its checkpoint, of an older version, cannot put it right: {len(lines)} "
        "whole lines are kept, those after them are missing"
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
