"""Put noise into a network, take it out, switch it, replay it. The network's own state-dict keys never change."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from learn2perturb.errors import NoiseError, SiteError
from learn2perturb.noise import sites as site_rules
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.feature import Perturbation
from learn2perturb.registry import MODELS

CHILD = "perturbation"


# Module-level functions, not closures: a network with noise can be pickled, deep-copied and compiled.
def _perturb_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.perturbation.perturb(output)  # type: ignore[operator, union-attr]


def _perturb_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.perturbation.perturb(args[0]), *args[1:])  # type: ignore[operator, union-attr]


def _keep_noise_of_plain_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a checkpoint without any noise load strictly: theta keeps the values that it has."""
    own = {
        f"{prefix}{name}.{key}": value
        for name, noise in module.named_modules()
        if isinstance(noise, NoiseModule)
        for key, value in noise.state_dict().items()
    }
    if not any(key in state_dict for key in own):
        state_dict.update(own)


def _drop_hook(hooks: dict[int, Any], function: Any) -> None:
    """Remove ``function`` from a hook table. By identity, because handles do not survive a deep copy."""
    for key, hook in list(hooks.items()):
        if hook is function or getattr(hook, "hook", None) is function:
            del hooks[key]


def _insert(network: nn.Module, noise: Perturbation) -> None:
    parent = network.get_submodule(noise.site)
    parameter = next(parent.parameters(), None)
    if parameter is None:
        parameter = next(network.parameters(), None)
    parent.add_module(CHILD, noise.to(parameter.device) if parameter is not None else noise)
    if noise.place == "output":
        parent.register_forward_hook(_perturb_output)
    else:
        parent.register_forward_pre_hook(_perturb_input)


def _is_compiled(network: nn.Module) -> bool:
    # By what torch.compile leaves on a module: naming its class would import the compiler, which takes seconds.
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )


def perturb(
    network: nn.Module,
    *,
    input_shape: tuple[int, ...] = (3, 32, 32),
    sites: site_rules.Sites | None = None,
    granularity: str = "element",
    distribution: str = "gaussian",
    sharing: str = "per_example",
    init: float = 0.25,
    minimum: float = 0.01,
    place: str = "output",
    learned: bool = True,
) -> nn.Module:
    """Insert learned noise ``h + theta * eps`` (Learn2Perturb, eqs. 3 to 5) into ``network``, in place, and return it.

    Args:
        network: any module that maps images to logits; plain, not compiled.
        input_shape: shape of one image, e.g. (3, 32, 32).
        sites: glob over submodule names (``*`` within a part, ``**`` across), list of names or globs, predicate
            ``(name, module) -> bool``, or ``@convolutions``, ``@norms``, ``@linears``. Default: the sites that the
            registry knows for this network, else a guess, which is printed.
        granularity: theta per ``element``, ``channel`` or ``layer``.
        distribution: ``gaussian``, ``laplace`` or ``uniform``, all of unit variance.
        sharing: ``per_example`` or ``per_batch`` draws.
        init: first value of theta, a standard deviation in units of the features.
        minimum: lower bound that training projects theta to.
        place: ``output`` or ``input`` of the sites.
        learned: whether theta is trained.

    Raises:
        SiteError: a site does not exist, is called other than once, gives no tensor, or is perturbed already.
        InputError: the network does not take images of ``input_shape``.
        ConfigError: another argument has a value that is not allowed.
    """
    if not isinstance(network, nn.Module):
        raise SiteError(f"network is a {type(network).__name__}; noise goes into a torch.nn.Module")
    if _is_compiled(network):
        raise NoiseError("the network is compiled, and hooks added now would go unnoticed; perturb it, then compile it")
    # A module built on values that are refused must be refused before anything is inserted.
    Perturbation(
        (1,), site="", place=place, granularity=granularity, sharing=sharing, distribution=distribution, init=init,
        minimum=minimum,
    )  # fmt: skip
    with noise_disabled(network):
        seen = site_rules.probe(network, input_shape)
    registered = getattr(network, "registered_name", None)
    if sites is not None:
        chosen = site_rules.select(network, seen, sites)
    elif isinstance(registered, str) and registered in MODELS:
        chosen = site_rules.select(network, seen, MODELS.entry(registered).facts["sites"])
    else:
        chosen = site_rules.guess(seen)
        print(f"perturb: no sites given; chose {len(chosen)}: {', '.join(chosen)}", file=sys.stderr)
    shapes = {name: site_rules.check(name, seen, place) for name in chosen}
    insert(
        network,
        [
            {
                "kind": "feature", "feature_shape": shape, "site": name, "place": place, "granularity": granularity,
                "sharing": sharing, "distribution": distribution, "init": init, "minimum": minimum,
                "learned": learned, "channel_dim": channel_dim,
            }
            for name, (shape, channel_dim) in shapes.items()
        ],
    )  # fmt: skip
    return network


def insert(network: nn.Module, specs: list[dict[str, Any]]) -> nn.Module:
    """Insert the noise that :func:`noise_spec` described, in place; what a checkpoint is rebuilt from.

    Raises:
        SiteError: a site does not exist in this network.
    """
    names = dict(network.named_modules())
    for spec in specs:  # all are checked before any is inserted, so that a failure leaves the network as it was
        if spec["site"] not in names:
            raise SiteError(f"the noise was made for a network with a submodule {spec['site']!r}, which this one lacks")
        if hasattr(names[spec["site"]], CHILD):
            raise SiteError(f"site {spec['site']!r} is perturbed already; call remove_noise(network) first")
    for spec in specs:
        arguments = {key: value for key, value in spec.items() if key not in ("kind", "enabled")}
        noise = Perturbation(tuple(arguments.pop("feature_shape")), **arguments)
        noise.enabled = spec.get("enabled", True)  # off in a checkpoint from before a noise delay had passed
        _insert(network, noise)
    _drop_hook(network._load_state_dict_pre_hooks, _keep_noise_of_plain_checkpoint)
    network.register_load_state_dict_pre_hook(_keep_noise_of_plain_checkpoint)
    return network


def _check_module(network: object) -> None:
    if not isinstance(network, nn.Module):
        raise NoiseError(f"network is a {type(network).__name__}; only a torch.nn.Module can hold noise")


def noise_modules(network: nn.Module) -> list[NoiseModule]:
    """Return the noise modules of ``network`` in the order of its submodules.

    Raises:
        NoiseError: it is no module.
    """
    _check_module(network)
    return [module for module in network.modules() if isinstance(module, NoiseModule)]


def noise_sites(network: nn.Module) -> list[str]:
    """Return the names of the perturbed submodules.

    Raises:
        NoiseError: ``network`` is no module.
    """
    _check_module(network)
    return [name.rpartition(".")[0] for name, module in network.named_modules() if isinstance(module, NoiseModule)]


def noise_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the learned parameters of the noise (the thetas), each once."""
    return [parameter for module in noise_modules(network) for parameter in module.noise_parameters()]


def noise_spec(network: nn.Module) -> list[dict[str, Any]]:
    """Describe the noise of ``network`` in plain JSON values, for :func:`insert`; sites as they are named in it now."""
    named = zip(noise_sites(network), noise_modules(network), strict=True)
    return [module.spec() | {"site": site} for site, module in named]


def is_stochastic(model: Any) -> bool:
    """Tell whether ``model`` draws noise of ours that is switched on and not replayed."""
    if not isinstance(model, nn.Module):
        return False
    return any(module.enabled and module.replay is None for module in noise_modules(model))


def remove_noise(network: nn.Module) -> nn.Module:
    """Take all noise out of ``network``, in place, and return it: the plain network with the same weights.

    Raises:
        NoiseError: the network is compiled; its graph would go on drawing noise.
    """
    if _is_compiled(network):
        raise NoiseError("the network is compiled; remove the noise from the plain one, or use noise_disabled(model)")
    for name in noise_sites(network):
        parent = network.get_submodule(name)
        # A graph that torch.compile made of this very network reads the flag, so switch before removing.
        parent.perturbation.enabled = False  # type: ignore[union-attr]
        delattr(parent, CHILD)
        _drop_hook(parent._forward_hooks, _perturb_output)
        _drop_hook(parent._forward_pre_hooks, _perturb_input)
    _drop_hook(network._load_state_dict_pre_hooks, _keep_noise_of_plain_checkpoint)
    return network


@contextlib.contextmanager
def _held(network: nn.Module, attribute: str, value: object) -> Iterator[list[NoiseModule]]:
    """Set an attribute of every noise module for the body, and give each its own back."""
    before = [(module, getattr(module, attribute)) for module in noise_modules(network)]
    try:
        for module, _ in before:
            setattr(module, attribute, value)
        yield [module for module, _ in before]
    finally:
        for module, own in before:
            setattr(module, attribute, own)


@contextlib.contextmanager
def noise_disabled(network: nn.Module) -> Iterator[nn.Module]:
    """Switch the noise off for the body; with it off the network equals the plain one bit for bit."""
    with _held(network, "enabled", False):
        yield network


def set_noise(network: nn.Module, enabled: bool) -> None:
    """Switch all noise of ``network`` on or off until further notice (training schedules use it)."""
    for module in noise_modules(network):
        module.enabled = enabled


@contextlib.contextmanager
def fixed_noise(network: nn.Module, seed: int = 0) -> Iterator[nn.Module]:
    """Replay the same draws at every pass of the body: a function of ``seed``, site and row, on every device.

    Row i of a batch gets the same noise whatever the size of the batch. For inspection and common random numbers;
    scoring a defense under it would be dishonest.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise NoiseError(f"seed is {seed!r}; fixed_noise needs a whole number")
    with _held(network, "replay", seed) as modules:
        try:
            yield network
        finally:
            for module in modules:
                if isinstance(module, Perturbation):
                    module.forget()
