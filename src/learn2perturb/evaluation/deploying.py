"""Programs for other runtimes: a network with its noise, traced once, written, loaded again and compared."""

from __future__ import annotations

import importlib
import io
import json
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from learn2perturb.engine.modes import in_mode, own_modes
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import ConfigError, MissingDependencyError
from learn2perturb.noise import is_stochastic
from learn2perturb.records import atomic_write

SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx"}
# Of logits of a program without noise from the network's, as a share of the largest: kernels round in another order.
_CLOSE = 1e-3
# Of mean logits over draws, in standard errors: beyond what one of a few hundred numbers reaches by chance.
_FAR = 6.0
_IMAGES, _DRAWS = 4, 32

Runs = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Deployed:
    """A program that was written, and how it compares with the network.

    Attributes:
        path: its file.
        stochastic: whether it draws noise, fresh at each call.
        difference: without noise the largest difference of a logit; with noise that of a mean logit over draws, in
            standard errors.
    """

    path: Path
    stochastic: bool
    difference: float

    def __str__(self) -> str:
        if self.stochastic:
            return f"draws its noise anew; mean logits within {self.difference:.1f} standard errors of the network's"
        return f"logits within {self.difference:.1g} of the network's"


def deploy(
    model: nn.Module, path: Path, kind: str, *, input_shape: tuple[int, ...], facts: Mapping[str, Any] | None = None
) -> Deployed:
    """Write ``model`` as a program of ``kind`` (``torch-export`` or ``onnx``); load it again and compare it.

    The batch is of any size. Noise that is on is drawn in the program, anew at each call.

    Args:
        model: from images (N, C, H, W) in [0, 1] to logits; a ``Predictor`` is one.
        path: of the file.
        kind: of the program.
        input_shape: of one image.
        facts: plain values that are kept in the file.

    Raises:
        ConfigError: the network cannot be traced, or the program does not do what the network does; nothing is written.
        MissingDependencyError: the packages of the format are missing.
    """
    text = json.dumps(dict(facts or {}), sort_keys=True)
    write = _torch_export if kind == "torch-export" else _onnx
    with own_modes(), isolated_rng(), in_mode(model, False), torch.no_grad():
        torch.manual_seed(0)
        example = torch.rand(_IMAGES, *input_shape)
        content, program = write(model.cpu(), example, text)
        stochastic = is_stochastic(model)
        difference = _compared(model, program, example, kind, stochastic=stochastic)
    return Deployed(atomic_write(path, content), stochastic, difference)


def _torch_export(model: nn.Module, example: Tensor, text: str) -> tuple[bytes, Runs]:
    program = _traced(model, example)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"learn2perturb.json": text})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations are not the user's concern
            return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # what cannot be traced fails in any way
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise ConfigError(
            f"the network cannot be traced with batches of any size: {reason}; make its forward() a function of "
            "tensors alone, or export safetensors"
        ) from None


def _onnx(model: nn.Module, example: Tensor, text: str) -> tuple[bytes, Runs]:
    runtime = _package("onnxruntime")
    _package("onnxscript")
    program = _traced(model, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
            )  # fmt: skip
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise ConfigError(f"the network cannot be written as ONNX: {reason}; use torch-export") from None
    assert written is not None
    written.model.metadata_props["learn2perturb"] = text
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "network.onnx"
        written.save(place, external_data=False)
        content = place.read_bytes()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (found,) = session.run(None, {"images": x.numpy()})
        return torch.from_numpy(np.asarray(found))

    return content, run


def _package(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"ONNX needs {name} ({error}): pip install 'learn2perturb[onnx]'") from None


def _compared(model: nn.Module, program: Runs, x: Tensor, kind: str, *, stochastic: bool) -> float:
    """Return how far the program is from the network, on batches of two sizes.

    Raises:
        ConfigError: too far, or its noise is not fresh.
    """
    for images in (x, x[:1], torch.cat([x, x, x[:1]])):
        there = program(images)
        if tuple(there.shape) != tuple(model(images).shape):
            shape = tuple(there.shape)
            raise ConfigError(f"the program of {kind} gives {shape} for {len(images)} images; use safetensors")
    if not stochastic:
        here = model(x)
        difference = float((program(x) - here).abs().max())
        if not difference <= _CLOSE * max(float(here.abs().max()), 1.0):
            raise ConfigError(f"the program of {kind} differs from the network by {difference:.3g}; use safetensors")
        return difference
    # The same image in several rows: draws must differ over calls, and over rows where the network's do.
    repeated = x.repeat(_DRAWS, 1, 1, 1)
    here, there = model(repeated).view(_DRAWS, len(x), -1), program(repeated).view(_DRAWS, len(x), -1)
    if torch.equal(program(x), program(x)) or (bool((here.std(0) > 0).any()) and not bool((there.std(0) > 0).any())):
        raise ConfigError(f"the program of {kind} does not draw its noise anew; use safetensors")
    here = torch.stack([model(x) for _ in range(_DRAWS)]).double()
    there = torch.stack([program(x) for _ in range(_DRAWS)]).double()
    error = ((here.var(0) + there.var(0)) / _DRAWS).sqrt().clamp_min(1e-9)
    difference = float(((here.mean(0) - there.mean(0)).abs() / error).nan_to_num(0.0).max())
    if not difference <= _FAR:
        raise ConfigError(
            f"the mean logits of the program of {kind} are {difference:.1f} standard errors from the network's; use "
            "safetensors"
        )
    return difference
