"""Which network a verb is about, where it is no run: a name, a file of weights, and which of its answers is meant."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from learn2perturb.cli.options import add_mapping
from learn2perturb.errors import ConfigError
from learn2perturb.naming import HUB, is_factory, network_name, of_library

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

NAMES = "registered name, timm:NAME or torchvision:NAME (?pretrained for its published weights), or module:function"
PLACES = "run folder, .safetensors file, zoo:NAME, hf-hub:owner/name, timm:NAME, torchvision:NAME, or module:function"


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add RUN, and the options that name a network in its place."""
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help=PLACES)
    add("--model", metavar="NAME", help=f"in place of RUN, or the network that RUN is of: {NAMES}")
    add("--weights", metavar="FILE", help="state dict of --model: .pt, .pth or .safetensors; nothing in it is executed")
    add_output(parser)
    add_mapping(parser, "--model-options", help="options of --model, such as --model-options.normalization cifar10")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``."""
    parser.add_argument(
        "--output", metavar="KEY",
        help="where the network gives several things, which is the logits: a key, a field, or a number",
    )  # fmt: skip


def settle_network(arguments: argparse.Namespace) -> None:
    """Make ``run`` what the verb is about, whether it was given as RUN or as ``--model``.

    Raises:
        ConfigError: neither or too much is given, or a name means nothing.
    """
    if arguments.run is None and arguments.model is None:
        raise ConfigError(f"no network given; give RUN ({PLACES}), or --model NAME with --weights FILE")
    if arguments.model is not None:
        network_name(arguments.model)
        if arguments.run is None and arguments.model.startswith(HUB):
            arguments.run, arguments.model = arguments.model, None
    elif is_factory(arguments.run) or of_library(arguments.run):
        arguments.run, arguments.model = None, arguments.run
    both = arguments.run is not None and arguments.model is not None
    if arguments.model is None and (arguments.weights or arguments.output or arguments.model_options):
        raise ConfigError("--weights, --output and --model-options are of a network that --model names; give --model")
    if both and arguments.weights:
        raise ConfigError(f"{arguments.run} has its weights, and --weights {arguments.weights} gives others; give one")
    arguments.named = arguments.run is None
    if arguments.named:
        _check_trained(arguments)
        arguments.run = arguments.model


def _check_trained(arguments: argparse.Namespace) -> None:
    """Refuse a network that nobody has trained: its numbers would say nothing."""
    name = network_name(arguments.model)
    if name.kind != "function" and not name.pretrained and arguments.weights is None:
        hint = f", or {arguments.model}?pretrained" if name.foreign else ""
        raise ConfigError(f"{arguments.model} is untrained as it is built; give its weights: --weights FILE{hint}")


def title_of(arguments: argparse.Namespace) -> str:
    """Return what the network is called in records: its name, and the file that its weights are of."""
    return f"{arguments.run} of {arguments.weights}" if arguments.weights else str(arguments.run)


def words_of(arguments: argparse.Namespace) -> list[str]:
    """Return the words of a command that name the network."""
    words = ["--model", arguments.model] if arguments.model is not None else []
    if not arguments.named:
        words = [arguments.run, *words]
    elif network_name(arguments.model).foreign:
        words = [arguments.model]
    for option in ("weights", "output"):
        value = getattr(arguments, option)
        words += [] if value is None else [f"--{option}", value]
    for key, value in (arguments.model_options or {}).items():
        words += [f"--model-options.{key}", str(value)]
    return words


def build_named(arguments: argparse.Namespace, classes: int, shape: Sequence[int]) -> Any:
    """Return the network that ``--model`` names, with its weights; what a function alone gives stays as it gives it.

    Raises:
        ConfigError, CheckpointError: it cannot be built, or its weights do not fit.
    """
    from learn2perturb.models import build_model, load_weights
    from learn2perturb.naming import made_by

    name = network_name(arguments.model)
    options = dict(arguments.model_options or {})
    if name.kind == "function" and not (arguments.weights or arguments.output or options):
        return made_by(name.text)
    network: nn.Module = build_model(arguments.model, classes, input_shape=shape, output=arguments.output, **options)
    if name.pretrained:
        _check_head(network, name.text, classes)
    if arguments.weights is not None:
        print(load_weights(network, arguments.weights), file=sys.stderr)
    # What is in eval mode already may hold parts that are not, on purpose: Monte Carlo dropout.
    return network.eval() if network.training else network


def _check_head(network: nn.Module, name: str, classes: int) -> None:
    """Refuse published weights whose last layer is of other classes, and would be judged as it was drawn."""
    published = getattr(network, "published_classes", None)
    if published is not None and published != classes:
        raise ConfigError(
            f"{name} was trained on {published} classes and the data have {classes}, so its last layer is random; "
            f"fine-tune it first: learn2perturb train --model {name}?pretrained"
        )
