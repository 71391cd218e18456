"""Put noise into a network, take it out, switch it, replay it. The network's own state-dict keys never change."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from learn2perturb.checks import check_choice
from learn2perturb.engine.random import derive_seed
from learn2perturb.engine.weights import advice, maker
from learn2perturb.errors import NoiseError, SiteError, UnknownNameError
from learn2perturb.noise import sites as site_rules
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.laws import Perturbation, VariationalWeight, WeightPerturbation, noise_law
from learn2perturb.noise.places import FEATURES, drop_hook
from learn2perturb.registry import MODELS, NOISES
from learn2perturb.terminal import say

LAYERS = (*site_rules.CONVOLUTIONS, nn.Linear)


def _default_sites(registered: str) -> Any:
    """Return the sites that a registered network names; None where it names none."""
    return MODELS.entry(registered).said("sites") if registered in MODELS else None


def _load_plain_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a checkpoint without any noise load strictly: the noise keeps the values that it has."""
    own: dict[str, Any] = {}
    for site, noise in named_noise(module, every_name=True):
        above = f"{prefix}{site}." if site else prefix  # the network itself can be the site
        own |= {f"{above}{noise.path}.{key}": value for key, value in noise.state_dict().items()}
        for plain, now in noise.moved.items():
            if above + plain in state_dict and above + now not in state_dict:
                state_dict[above + now] = state_dict.pop(above + plain)
    if not any(key in state_dict for key in own):
        state_dict.update(own)


def _is_compiled(network: nn.Module) -> bool:
    # By what torch.compile leaves on a module: naming its class would import the compiler, which takes seconds.
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in network.modules()
    )


def add_noise(
    network: nn.Module,
    law: str,
    *,
    place: str = "output",
    input_shape: tuple[int, ...] = (3, 32, 32),
    sites: site_rules.Sites | None = None,
    **settings: Any,
) -> nn.Module:
    """Insert the noise law called ``law`` into ``network``, in place, and return it.

    Args:
        network: any module that maps images to logits; plain, not compiled.
        law: a registered name, see :func:`register_noise`: ``feature`` (additive), ``weight`` (relative to the spread),
            ``variational``, ``multiplicative``, or one of your own.
        place: ``output`` or ``input`` of the sites, or the name of their parameter: ``weight``.
        input_shape: shape of one image; for noise on features only.
        sites: as for :func:`perturb`; on a parameter, by default every convolution and linear layer.
        settings: what the law takes, such as ``init`` and ``granularity``.

    Raises:
        UnknownNameError: there is no such law, or it has no such setting.
        SiteError: a site does not exist, is called other than once, has no such parameter, or is perturbed already.
        InputError: the network does not take images of ``input_shape``.
        ConfigError: a setting has a value that is not allowed.
    """
    kind = noise_law(law)
    # A module built on values that are refused must be refused before anything is inserted.
    known = {name for cls in kind.__mro__ for name in _arguments(cls)} - {"self", "shape", "site", "place"}
    for name in settings:
        if name not in known:
            raise UnknownNameError.of(f"setting of noise {law!r}:", name, known)
    kind((1,), site="", place=place, **settings)
    if place in FEATURES:
        return _insert_on_features(network, law, place, input_shape, sites, settings)
    return _insert_on_weights(network, law, sites, LAYERS, (place,), settings)


def _arguments(kind: type) -> list[str]:
    """Return the names of the arguments that a class's own ``__init__`` spells out."""
    own = vars(kind).get("__init__")
    return list(inspect.signature(own).parameters) if own is not None and issubclass(kind, NoiseModule) else []


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
    relative: bool = False,
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
        relative: theta is in units of the features' own standard deviation, taken over the whole batch (PNI).

    Raises:
        SiteError: a site does not exist, is called other than once, gives no tensor, or is perturbed already.
        InputError: the network does not take images of ``input_shape``.
        ConfigError: another argument has a value that is not allowed.
    """
    check_choice("place", place, FEATURES)
    return add_noise(
        network, Perturbation.kind, place=place, input_shape=input_shape, sites=sites, granularity=granularity,
        sharing=sharing, distribution=distribution, init=init, minimum=minimum, learned=learned, relative=relative,
    )  # fmt: skip


def perturb_images(network: nn.Module, sigma: float, *, input_shape: tuple[int, ...] = (3, 32, 32)) -> nn.Module:
    """Insert noise of a fixed size on the images themselves, ``x + sigma eps``, in place; return ``network``.

    It is the input of the network as a whole, whatever layers read it: nothing goes around it.

    Args:
        network: any module that maps images to logits; plain, not compiled.
        sigma: standard deviation, in units of the pixels.
        input_shape: shape of one image.

    Raises:
        SiteError: the network has noise there already.
        ConfigError: sigma is not a number, or below 0.
    """
    _check_module(network)
    if _is_compiled(network):
        raise NoiseError("the network is compiled, and hooks added now would go unnoticed; perturb it, then compile it")
    spec = {
        "kind": Perturbation.kind, "feature_shape": tuple(input_shape), "site": "", "place": "input", "init": sigma,
        "minimum": 0.0, "granularity": "layer", "learned": False,
    }  # fmt: skip
    return insert(network, [spec])


def _insert_on_features(
    network: nn.Module,
    law: str,
    place: str,
    input_shape: tuple[int, ...],
    sites: site_rules.Sites | None,
    settings: dict[str, Any],
) -> nn.Module:
    """Insert noise on what the chosen submodules give, or take; by default those that the registry knows, else a guess.

    One pass shows which submodules are called once and what shape their features have.
    """
    if not isinstance(network, nn.Module):
        raise SiteError(f"network is a {type(network).__name__}; noise goes into a torch.nn.Module")
    if _is_compiled(network):
        raise NoiseError("the network is compiled, and hooks added now would go unnoticed; perturb it, then compile it")
    with noise_disabled(network):
        seen = site_rules.probe(network, input_shape)
    registered = getattr(network, "registered_name", None)
    if sites is not None:
        chosen = site_rules.select(network, seen, sites)
    elif isinstance(registered, str) and (sites_of := _default_sites(registered)) is not None:
        chosen = site_rules.select(network, seen, sites_of)
    else:
        chosen = site_rules.guess(seen)
        say(f"perturb: no sites given; chose {len(chosen)}: {', '.join(chosen)}")
    shapes = {name: site_rules.check(name, seen, place) for name in chosen}
    specs = [
        {"kind": law, "feature_shape": shape, "site": name, "place": place, "channel_dim": channel_dim} | settings
        for name, (shape, channel_dim) in shapes.items()
    ]
    return insert(network, specs)


def perturb_weights(
    network: nn.Module, *, sites: site_rules.Sites | None = None, granularity: str = "layer", init: float = 0.25
) -> nn.Module:
    """Insert PNI's weight noise ``w + alpha * eta``, ``eta ~ N(0, std(w)^2)``, into ``network``, in place; return it.

    Args:
        network: any module; plain, not compiled.
        sites: as for :func:`perturb`. Default: every convolution and linear layer.
        granularity: alpha per ``layer``, output ``channel`` or ``element`` of the weight.
        init: first value of alpha, in units of the weight's standard deviation.

    Raises:
        SiteError: a site does not exist, has no weight, or is perturbed already.
        ConfigError: another argument has a value that is not allowed.
    """
    settings = {"granularity": granularity, "init": init}
    return _insert_on_weights(network, WeightPerturbation.kind, sites, LAYERS, ("weight",), settings)


def vary_weights(
    network: nn.Module, *, sites: site_rules.Sites | None = None, init: float = 0.1, prior: float = 0.1
) -> nn.Module:
    """Make weights and biases of ``network`` Gaussian posteriors (Adv-BNN), ``mu + exp(s) * eps``, in place; return it.

    Args:
        network: any module; plain, not compiled. Its parameters become the means.
        sites: as for :func:`perturb`. Default: every convolution, linear layer, and norm with affine parameters.
        init: first standard deviation, exp(s).
        prior: standard deviation sigma_0 of the prior N(0, sigma_0^2).

    Raises:
        SiteError: a site does not exist, has no weight, or is perturbed already.
        ConfigError: another argument has a value that is not allowed.
    """
    types, settings = (*LAYERS, *site_rules.NORMS), {"init": init, "prior": prior}
    return _insert_on_weights(network, VariationalWeight.kind, sites, types, ("weight", "bias"), settings)


def _insert_on_weights(
    network: nn.Module,
    law: str,
    sites: site_rules.Sites | None,
    types: tuple[type[nn.Module], ...],
    tensors: tuple[str, ...],
    settings: dict[str, Any],
) -> nn.Module:
    """Insert noise on ``tensors`` of the chosen layers: by default, of all layers of ``types`` that have any."""
    _check_module(network)
    if _is_compiled(network):
        raise NoiseError("the network is compiled, and a weight perturbed now may go unnoticed; perturb, then compile")
    layers = dict(site_rules.submodules(network))
    able = [
        name
        for name, layer in layers.items()
        if isinstance(layer, types) and (_own(layer, tensors) or any(maker(layer, tensor) for tensor in tensors))
    ]
    chosen = able if sites is None else site_rules.select(network, able, sites)
    if not chosen:
        raise SiteError("no layer with weights to perturb was found; name the sites: sites='encoder.*'")
    specs: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for name in chosen:
        own = _own(layers[name], tensors)
        _check_own(name, layers[name], tensors)
        for tensor, parameter in own.items():
            other = first.setdefault(id(parameter), name)
            if other != name and law == VariationalWeight.kind:
                raise SiteError(
                    f"sites {other!r} and {name!r} share one {tensor}, and a posterior would be drawn twice and its KL "
                    "counted twice; untie them: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())"
                )
            spec = {"kind": law, "site": name, "tensor": tensor, "shape": list(parameter.shape)} | settings
            if tensor == "weight" and getattr(layers[name], "transposed", False):
                spec["channel_dim"] = 1
            specs.append(spec)
    return insert(network, specs)


def _check_own(name: str, layer: nn.Module, tensors: tuple[str, ...]) -> None:
    """Refuse a layer one of whose ``tensors`` is not its own: the noise would miss it, or be overwritten.

    Raises:
        SiteError: one is computed, not made yet, or there is none.
    """
    who = f"site {name!r} ({parametrize.type_before_parametrizations(layer).__name__})"
    for tensor in tensors:
        made = maker(layer, tensor)
        if made and any(isinstance(one, NoiseModule) for one in _chain(layer, tensor)):
            raise SiteError(f"{who} is perturbed already; call remove_noise(network) first")
        if made:
            raise SiteError(
                f"{who} gets its {tensor} from {made}, which weight noise does not go with; make it a parameter first: "
                f"{advice(layer, tensor)}, or name other sites"
            )
    own = _own(layer, tensors)
    if not own:
        raise SiteError(f"{who} has no {' or '.join(tensors)}; choose another layer")
    if any(is_lazy(parameter) for parameter in own.values()):
        raise SiteError(f"{who} has no weights yet; run one pass of the network first: network(images)")


def _chain(layer: nn.Module, tensor: str) -> Iterable[nn.Module]:
    if not parametrize.is_parametrized(layer, tensor):
        return ()
    chain: parametrize.ParametrizationList = layer.parametrizations[tensor]  # type: ignore[index, assignment]
    return chain


def _own(layer: nn.Module, tensors: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Return those of ``tensors`` that ``layer`` has as parameters, not made by a parametrisation or another layer."""
    found = {tensor: layer._parameters.get(tensor) for tensor in tensors}
    return {tensor: own for tensor, own in found.items() if own is not None}


def insert(network: nn.Module, specs: list[dict[str, Any]]) -> nn.Module:
    """Insert the noise that :func:`noise_spec` described, in place; what a checkpoint is rebuilt from.

    Raises:
        SiteError: a site does not exist in this network.
    """
    names = dict(network.named_modules())
    made = []
    for spec in specs:  # all are checked before any is inserted, so that a failure leaves the network as it was
        if spec["site"] not in names:
            raise SiteError(f"the noise was made for a network with a submodule {spec['site']!r}, which this one lacks")
        kind = spec.get("kind")
        if not isinstance(kind, str) or kind not in NOISES:
            raise NoiseError(
                f"noise of kind {kind!r} is unknown; known: {', '.join(NOISES.names('*'))}; import the module that "
                "registers it, or update learn2perturb"
            )
        noise = noise_law(kind).from_spec({key: value for key, value in spec.items() if key not in ("kind", "enabled")})
        noise.enabled = spec.get("enabled", True)  # off in a checkpoint from before a noise delay had passed
        reason = noise.refusal(names[noise.site])
        if reason is not None:
            raise SiteError(f"site {noise.site!r} {reason}")
        made.append(noise)
    for noise in made:
        parent = names[noise.site]
        near = next(parent.parameters(), next(network.parameters(), None))
        noise.to(near.device if near is not None else None).attach(parent)
    drop_hook(network._load_state_dict_pre_hooks, _load_plain_checkpoint)
    network.register_load_state_dict_pre_hook(_load_plain_checkpoint)
    return network


def _check_module(network: object) -> None:
    if not isinstance(network, nn.Module):
        raise NoiseError(f"network is a {type(network).__name__}; only a torch.nn.Module can hold noise")


def named_noise(network: nn.Module, *, every_name: bool = False) -> list[tuple[str, NoiseModule]]:
    """Return the noise modules of ``network`` and the submodules they perturb, as these are named in it now.

    A submodule with several names has its first one, or with ``every_name`` an entry for each.

    Raises:
        NoiseError: it is no module.
    """
    _check_module(network)
    names = network.named_modules(remove_duplicate=not every_name)
    found = [(name, module) for name, module in names if isinstance(module, NoiseModule)]
    return [(name.removesuffix(module.path).rstrip("."), module) for name, module in found]


def noise_modules(network: nn.Module) -> list[NoiseModule]:
    """Return the noise modules of ``network`` in the order of its submodules.

    Raises:
        NoiseError: it is no module.
    """
    return [module for _, module in named_noise(network)]


def noise_sites(network: nn.Module) -> list[str]:
    """Return the names of the perturbed submodules, each once.

    Raises:
        NoiseError: ``network`` is no module.
    """
    return list(dict.fromkeys(site for site, _ in named_noise(network)))


def noise_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the learned parameters of the noise (the thetas), each once."""
    return [parameter for module in noise_modules(network) for parameter in module.noise_parameters()]


def noise_spec(network: nn.Module) -> list[dict[str, Any]]:
    """Describe the noise of ``network`` in plain JSON values, for :func:`insert`; sites as they are named in it now."""
    return [module.spec() | {"site": site} for site, module in named_noise(network)]


def is_stochastic(model: Any) -> bool:
    """Tell whether ``model`` draws noise of ours that is switched on and not replayed."""
    if not isinstance(model, nn.Module):
        return False
    return any(module.enabled and module.replay is None for module in noise_modules(model))


def remove_noise(network: nn.Module) -> nn.Module:
    """Take all noise out of ``network``, in place, and return it: the plain network with the same weights.

    Of a law that keeps a part with its noise off (RPF), the weights are those of the network with its noise off.

    Raises:
        NoiseError: the network is compiled; its graph would go on drawing noise. Or its noise holds learned weights.
    """
    if _is_compiled(network):
        raise NoiseError("the network is compiled; remove the noise from the plain one, or use noise_disabled(model)")
    for site, module in named_noise(network):
        if module.keeps and module.where.of_features:
            raise NoiseError(
                f"the noise at {site!r} ({module.kind}) holds weights that were learned with the network, which would "
                "be another one without them; use noise_disabled(model)"
            )
    return take_out(network)


def take_out(network: nn.Module) -> nn.Module:
    """Take all noise out of ``network``, whatever it holds, in place, and return it."""
    for site, module in named_noise(network):
        # A graph that torch.compile made of this very network reads the flag, so switch before removing.
        module.enabled = False
        module.detach(network.get_submodule(site))
    drop_hook(network._load_state_dict_pre_hooks, _load_plain_checkpoint)
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
        # Networks perturbed one by one and then joined have sites of equal names: each but the first has its own seed.
        seen: Counter[tuple[str, str]] = Counter()
        for module in modules:
            place = (module.site, module.path)
            module.replay = derive_seed(seed, "twin", seen[place]) if seen[place] else seed
            seen[place] += 1
        try:
            yield network
        finally:
            for module in modules:
                module.forget()
