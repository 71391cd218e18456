"""Bring a trained network back: from a run folder, a ``.safetensors`` file, the zoo, or the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learn2perturb import zoo
from learn2perturb.engine.identity import fingerprint_of_state
from learn2perturb.errors import CheckpointError, MissingDependencyError
from learn2perturb.models import build_model
from learn2perturb.models.weights import fit_weights
from learn2perturb.naming import HUB, network_name
from learn2perturb.noise import insert, noise_modules
from learn2perturb.noise.inject import take_out
from learn2perturb.plugins import PARTS
from learn2perturb.reading import MOST_SETTINGS, parse_json, read_bytes, reading
from learn2perturb.registry import MODELS, NOISES
from learn2perturb.runs.checkpoint import check_noise, read_model
from learn2perturb.runs.files import FOLDER, MODEL, from_hub, locate


def load(source: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Return the network of a run folder, a ``.safetensors`` file, ``zoo:NAME`` or ``hf-hub:owner/name``.

    It is in eval mode, its noise is on.

    Args:
        source: where it is.
        model: an instance of the network, if it is not one of this package; its noise is inserted as it was trained.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it does not fit the network.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise CheckpointError(f"model is a {type(model).__name__}; give an instance of the network, a torch.nn.Module")
    path = locate(source)
    state, header = read_model(path)
    _check_parts(path, header)
    if not header and (model is not None or str(source).startswith(HUB)):
        model = _of_timm(str(source)) if model is None else model
        fit_weights(model, state, str(path))
        _remember(model, state, None)
        return model.eval()
    if model is None:
        if not header:
            raise CheckpointError(f"{path} does not say of which network it is; give one: load(path, model=network)")
        if header.get("registered_name") is None:
            raise CheckpointError(
                f"{path} is of a network of your own; give an instance: load({str(source)!r}, model=network), or with a "
                "verb --model module:function"
            )
        with reading(f"the network of {path} cannot be built", "use another checkpoint", CheckpointError):
            model = _built(header, sum(value.numel() for value in state.values()))
    inserted = bool(header.get("noise")) and not noise_modules(model)
    try:
        if inserted:
            insert(model, header["noise"])
        if header.get("noise"):
            check_noise(path, model, state)
        model.load_state_dict(state)
    except CheckpointError:
        if inserted:
            take_out(model)
        raise
    except Exception as error:  # a damaged header may describe any noise
        if inserted:
            take_out(model)
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} does not fit: {reason}; give the network it was trained with") from None
    _remember(model, state, _step(path, header))
    return model.eval()


def _remember(model: nn.Module, state: dict[str, Any], step: int | None) -> None:
    """Let records say which step and which file these weights are of, as long as they stay as they are."""
    own = model.state_dict()
    cast = any(isinstance(value, Tensor) and value.dtype != own[key].dtype for key, value in state.items() if key in own)
    weights = fingerprint_of_state(own)
    model.trained = (step, weights, fingerprint_of_state(state) if cast else weights)  # type: ignore[assignment]


def _check_parts(path: Path, header: dict[str, Any]) -> None:
    """Refuse a network with parts of the user's own that nothing has registered here.

    Raises:
        CheckpointError: its noise or network is of a module that is not imported.
    """
    for part in header.get(PARTS) or []:
        if not isinstance(part, dict):
            raise CheckpointError(f"{path} is damaged: its parts hold other things than objects; use another checkpoint")
        kind, name = part.get("kind"), part.get("name")
        registry = next((one for one in (NOISES, MODELS) if one.kind == kind), None)
        if registry is not None and name not in registry:
            place = part.get("package") or part.get("file") or part.get("module")
            raise CheckpointError(
                f"{path} uses the {kind} {name!r}, which is registered by {place}; import it first: "
                f"--import {part.get('module')}"
            )


def _of_timm(source: str) -> nn.Module:
    """Return the network of a repository of timm on the hub, whose ``config.json`` names it, with its first weights.

    Raises:
        CheckpointError: the repository is of another library.
    """
    path = from_hub(source.removeprefix(HUB), "config.json")
    fix = f"give a function that builds it: --model module:function --weights {MODEL}"
    with reading(f"{source} says not of which network it is", fix, CheckpointError):
        config = parse_json(read_bytes(path, MOST_SETTINGS))
        facts = config.get("pretrained_cfg") or config
        name, size = config["architecture"], facts["input_size"]
        statistics = (facts["mean"], facts["std"])
        return build_model(f"timm:{name}", config["num_classes"], input_shape=size, normalization=statistics)


def _step(path: Path, header: dict[str, Any]) -> int | None:
    """Return the training step of the weights; a run of before says it in the name of its checkpoint only."""
    step = header.get("step")
    if step is None and path.name == MODEL and path.parent.parent.name == FOLDER and path.parent.name.isdecimal():
        step = int(path.parent.name)
    return step


def _built(header: dict[str, Any], weights: int) -> nn.Module:
    """Return the network that a header names, unless it is larger than what the file holds: first built without memory.

    Raises:
        CheckpointError: it is; a header of a few bytes could ask for any amount of memory.
    """
    name, arguments = header["registered_name"], _arguments(header)
    named = network_name(name)
    if named.kind in ("function", "hub") or named.pretrained or "weights" in arguments:
        raise CheckpointError(f"the header names {name!r}, which a file may not; give an instance: load(path, model=...)")
    with torch.device("meta"):
        sketch = build_model(name, **arguments)
    wanted = sum(value.numel() for value in sketch.state_dict().values())
    if wanted > weights:
        raise CheckpointError(
            f"the header asks for a {name} of {wanted:,} weights and the file holds {weights:,}; use another checkpoint"
        )
    return build_model(name, **arguments)


def _arguments(header: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``build_model``, with the tuples that JSON made lists."""

    def tupled(value: Any) -> Any:
        return tuple(tupled(item) for item in value) if isinstance(value, list) else value

    arguments = header.get("build_arguments") or {}
    return {key: tupled(value) for key, value in arguments.items()}
