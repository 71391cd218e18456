"""Networks of other libraries and of the user's own: built by name, normalised inside, their logits picked out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from learn2perturb.engine.libraries import library
from learn2perturb.errors import CheckpointError, ConfigError, InputError, UnknownNameError
from learn2perturb.models.normalize import normalization_layer
from learn2perturb.models.weights import fit_weights
from learn2perturb.naming import PRETRAINED, NetworkName, made_by

# Options of timm.create_model that are not the network's: what they say follows from the name and the data.
_NO_OPTIONS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes", "in_chans",
    "features_only", "weights", "weights_backbone", "img_size",
)  # fmt: skip


@final
class Foreign(nn.Module):
    """A network that is not of this package, on images in [0, 1], giving logits: ``pick(network(normalize(x)))``.

    Args:
        network: the network as it is.
        normalize: maps images in [0, 1] to what it takes.
        output: which of several answers is the logits, see :func:`picked`; None where it gives a tensor.
    """

    def __init__(self, network: nn.Module, normalize: nn.Module, output: str | None = None) -> None:
        super().__init__()
        self.normalize, self.network, self.output = normalize, network, output
        self.published_classes: int | None = None  # of the weights that its library publishes, where it has those

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W)."""
        answer = self.network(self.normalize(x))
        return answer if self.output is None else picked(answer, self.output)


def picked(answer: Any, output: str) -> Tensor:
    """Return one of several things that a network gives: an entry of a dict, a field, or an element by its number.

    A tensor is itself, since many networks give several things in train mode only.

    Raises:
        InputError: there is no such thing.
    """
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, Mapping):
        known, found = [str(key) for key in answer], answer.get(output)
    elif isinstance(answer, Sequence) and output.lstrip("-").isdigit():
        known, place = [str(number) for number in range(len(answer))], int(output)
        found = answer[place] if -len(answer) <= place < len(answer) else None
    else:
        known, found = _fields(answer), getattr(answer, output, None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"output is {output!r}, and the network gives a {type(answer).__name__} with "
            f"{', '.join(known) or 'nothing that has a name'}; name the one that is the logits"
        )
    return found


def _fields(answer: Any) -> list[str]:
    """Return the names of what an answer consists of, of a plain tuple the numbers."""
    if hasattr(answer, "_fields"):
        return list(answer._fields)
    if isinstance(answer, Sequence):
        return [str(number) for number in range(len(answer))]
    return [name for name in getattr(answer, "__dict__", ()) if not name.startswith("_")]


def build_foreign(
    name: NetworkName,
    num_classes: int,
    *,
    input_shape: Sequence[int],
    normalization: Any = "paper",
    output: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network of timm or torchvision, or by the user's function; see :func:`learn2perturb.build_model`.

    ``normalization`` ``"paper"`` is the network's own: what its library trained it with; a function of the user's
    normalises itself.

    Raises:
        UnknownNameError: the library has no such network.
        ConfigError: an option that is not allowed.
        MissingDependencyError: the library is not installed.
        CheckpointError: published weights are asked for and cannot be fetched.
    """
    if name.kind == "hub":
        raise ConfigError(f"{name.text} is a trained network, not one to build; load it: load({name.text!r})")
    for option in options:
        if option in _NO_OPTIONS or name.kind == "function":
            raise ConfigError(f"{name.text} takes no option {option!r}: it follows from its name and the data")
    if name.kind == "function":
        network, own, classes = made_by(name.text), None, None
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"{name.text} gives a {type(network).__name__}; to train it, it must be a torch.nn.Module"
            )
    else:
        shape = channels, _, _ = tuple(int(size) for size in input_shape)
        make = _of_timm if name.kind == "timm" else _of_torchvision
        network, statistics, classes = make(name, num_classes, shape, options)
        own = None if statistics is None else tuple(_per_channel(values, channels) for values in statistics)
    if normalization == "paper":
        normalization = own
    if name.kind == "function" and normalization is None and output is None:
        return network
    whole = Foreign(network, normalization_layer(normalization, int(input_shape[0])), output)
    whole.training = network.training
    whole.published_classes = classes if name.pretrained else None
    return whole


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return statistics of colour images for images of so many channels: the mean where that is not three."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


# A network, mean and std that it was trained with, and the number of classes of its published weights.
_Made = tuple[nn.Module, tuple[Sequence[float], Sequence[float]] | None, int | None]


def _of_timm(name: NetworkName, num_classes: int, shape: tuple[int, ...], options: dict[str, Any]) -> _Made:
    timm = library("timm")
    if not timm.is_model(name.name):
        raise UnknownNameError.of("network of timm", name.name, timm.list_models())
    facts = timm.get_pretrained_cfg(name.name)
    sized = {"img_size": shape[1:]} if facts is not None and facts.fixed_input_size else {}
    wanted = {"num_classes": num_classes, "in_chans": shape[0], "pretrained": name.pretrained, **sized, **options}
    network = _fetched(name, lambda: timm.create_model(name.name, **wanted))
    return (network, None, None) if facts is None else (network, (facts.mean, facts.std), facts.num_classes)


def _of_torchvision(name: NetworkName, num_classes: int, shape: tuple[int, ...], options: dict[str, Any]) -> _Made:
    models = library("torchvision.models")
    known = models.list_models(module=models)
    if name.name not in known:
        raise UnknownNameError.of("network of torchvision", name.name, known)
    if shape[0] != 3:
        raise ConfigError(f"{name.text} takes images of 3 channels, and these have {shape[0]}; take one of timm")
    offered = models.get_model_weights(name.name)
    published = offered.DEFAULT if len(offered) else None
    network = _made(name, lambda: models.get_model(name.name, weights=None, num_classes=num_classes, **options))
    if name.pretrained:
        if published is None:
            raise CheckpointError(f"torchvision publishes no weights of {name.name}; leave out {PRETRAINED}")
        load = torch.hub.load_state_dict_from_url
        state = _fetched(name, lambda: load(published.url, weights_only=True, check_hash=True, map_location="cpu"))
        fit_weights(network, state, name.text + PRETRAINED, new_head=True)
    if published is None:
        return network, None, None
    transforms = published.transforms()
    return network, (transforms.mean, transforms.std), len(published.meta["categories"])


def _made(name: NetworkName, make: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that will change: not the user's concern
            return make()
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name.text} cannot be built so: {reason}; change its options or the images") from None


def _fetched(name: NetworkName, make: Callable[[], Any]) -> Any:
    """Return what ``make`` gives, which may ask the network for weights."""
    if not name.pretrained:
        return _made(name, make)
    try:
        return _made(name, make)
    except ConfigError:
        raise
    except Exception as error:  # each library, and what it fetches by, has errors of its own
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(
            f"the published weights of {name.text} cannot be fetched ({reason}); fetch them once with a network, or "
            "give a file of weights (--weights FILE)"
        ) from None
