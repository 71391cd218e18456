"""What a fine-tuning begins with: the weights of another training or of a file, and which of them stay as they are."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from learn2perturb.errors import ConfigError
from learn2perturb.models.weights import Fit, fit_weights, read_state
from learn2perturb.naming import HUB, ZOO
from learn2perturb.noise import noise_modules, remove_noise
from learn2perturb.noise.sites import matches
from learn2perturb.reading import SAFETENSORS
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.files import locate
from learn2perturb.runs.loading import load


def begin_from(network: nn.Module, source: str) -> tuple[Fit, Mapping[str, Tensor]]:
    """Load the weights of a run or a file into ``network``, in place, as far as they are not noise.

    Returns how they fit, and the whole state of the source, whose noise :func:`take_noise` may take.

    Raises:
        CheckpointError: there is no such source, or it does not fit.
    """
    if not _is_run(source):
        state = read_state(source)
        return fit_weights(network, state, f"weights {source}", new_head=True), state
    header = read_model(locate(source))[1]
    instance = None if header.get("registered_name") else copy.deepcopy(network)
    trained = load(source, model=instance)
    whole = dict(trained.state_dict())
    plain = remove_noise(trained).state_dict()
    return fit_weights(network, plain, source, new_head=True), whole


def _is_run(source: str) -> bool:
    """Tell whether ``source`` is a run, or a file that a run of this package has written, and no bare state dict."""
    if source.startswith((HUB, ZOO)) or Path(source).is_dir():
        return True
    return source.endswith(SAFETENSORS) and Path(source).is_file() and bool(read_model(Path(source))[1])


@torch.no_grad()
def take_noise(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Take the noise over from ``state`` where ``network`` has the same; return how many of its tensors."""
    if not noise_modules(network):
        return 0
    held = {id(value) for noise in noise_modules(network) for value in (*noise.parameters(), *noise.buffers())}
    own = {key: value for key, value in network.state_dict(keep_vars=True).items() if id(value) in held}
    if not own or any(key not in state or state[key].shape != value.shape for key, value in own.items()):
        return 0
    for key, value in own.items():
        value.copy_(state[key])
    return len(own)


def freeze(network: nn.Module, globs: Sequence[str]) -> list[nn.Module]:
    """Freeze what ``globs`` name, submodules and parameters; return the submodules, which are in eval mode now.

    Raises:
        ConfigError: a glob names nothing.
    """
    frozen: list[nn.Module] = []
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    for glob in globs:
        chosen = [modules[name] for name in modules if name and matches(name, glob)]
        single = [parameters[name] for name in parameters if matches(name, glob)]
        if not chosen and not single:
            names = [name for name in (*modules, *parameters) if name]
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.4)
            shown = near or [name for name, _ in network.named_children()][:12]
            raise ConfigError(f"freeze {glob!r} names no submodule or parameter; there are {', '.join(shown)}")
        for module in chosen:
            frozen += module.eval().requires_grad_(False).modules()
        for parameter in single:
            parameter.requires_grad_(False)
    return frozen
