"""The tiny trainings and evaluations that the laboratories break, and what must be the same after all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
from typing import Any

import torch

from learn2perturb.cli.main import main
from learn2perturb.runs.checkpoint import read_model, read_resume
from learn2perturb.runs.files import MODEL, checkpoints

# What the clock decides, and what says where and when something was done.
TIMED = frozenset({
    "seconds", "images_per_second", "compile_seconds", "date", "finished", "started", "metrics_bytes", "git",
    "forward_seconds", "sha256", "checksum",
})  # fmt: skip

# What of a resume state decides how the training goes on.
RESUMED = ("epoch", "batch", "stage", "gear", "optimizers", "totals", "weights", "average")

TRAIN = (
    "train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu", "--epochs=2",
    "--limit=32", "--batch-size=8", "--monitor=8", "--attack-steps=1", "--eps=0.1", "--log-every=3",
    "--checkpoint-minutes=1e-9", "--tensorboard=false",
)  # fmt: skip
EVALUATE = ("--attacks=fgsm,pgd20", "--limit=12", "--draws=2", "--device=cpu", "--batch-size=12")


def command(*words: object) -> tuple[int, str]:
    """Run the command line here; return its exit code and all that it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in words])
    return code, said.getvalue()


def train(run: pathlib.Path, *more: str) -> tuple[int, str]:
    """Train, or resume, into ``run``."""
    return command(*TRAIN, *more, "--out", run)


def digest(value: Any) -> Any:
    """Return ``value`` with tensors as hashes, and without what the clock decides."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, dict):
        return {str(key): digest(item) for key, item in value.items() if key not in TIMED}
    if isinstance(value, (list, tuple)):
        return [digest(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def trained_state(run: pathlib.Path) -> Any:
    """Return everything that a training left: weights, momenta, position, metrics."""
    newest = checkpoints(run)[-1]
    weights, header = read_model(newest / MODEL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    resume = {key: value for key, value in read_resume(newest).items() if key in RESUMED}
    return digest([newest.name, weights, header, resume, lines])


def record_state(path: pathlib.Path) -> Any:
    """Return everything that a record says."""
    return without_place(digest(json.loads(path.read_text(encoding="utf-8"))))


def without_place(record: Any) -> Any:
    """Leave out the name of the folder that a record was made in, which is in the command, too."""
    if isinstance(record.get("metadata"), dict):
        for key in ("model", "command"):
            record["metadata"].pop(key, None)
    return record
