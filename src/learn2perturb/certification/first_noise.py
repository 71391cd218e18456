"""The first noise module as a randomised smoothing of what comes before it: when that holds, and its constant S.

In eval mode all before the first noise is affine, ``u = A x + b + theta * eps``; everything later is post-processing
with independent noise. Then ``p_y(x + d) >= Phi(Phi^-1(p_y(x)) - S |d|_2)`` with ``S = |diag(theta)^-1 A|_2``, the
largest singular value: the smoothing of Cohen et al. 2019, of ``diag(theta)^-1 u`` in place of the image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.engine.weights import advice, copied, maker
from learn2perturb.errors import NoiseError
from learn2perturb.noise import Perturbation, named_noise

# Up to this many pixels S is exact, from the Gram matrix (pixels x pixels, 134 MB at most); beyond, it is bounded.
EXACT_PIXELS = 4096
_CHUNK = 64  # basis images in one pass
_PROBES = 8
_ROUNDING = 1e-9


@final
@dataclass(frozen=True)
class FirstNoise:
    """The site of the first noise, and S for l2 changes of the image: exact, or an upper bound."""

    site: str
    constant: float
    exact: bool


class _Reached(Exception):
    """Ends a pass at the first noise: what comes after is not asked for."""


def check_draws(model: object, *, what: str) -> list[tuple[str, Perturbation]]:
    """Return the noise of ``model`` that is switched on, by site, after checking that its votes are independent.

    Raises:
        NoiseError: noise that is replayed, shared over a batch, in the weights, or relative to the batch's features.
    """
    if not isinstance(model, nn.Module):
        return []
    found = []
    for site, module in named_noise(model):
        if not module.enabled:
            continue
        reason = ""
        if not module.where.of_features:
            reason = "is in the weights: one draw for a whole batch, and its effect depends on the image"
        elif not isinstance(module, Perturbation):
            reason = f"is of the law {module.kind!r}, and not added to features with scales of their own"
        elif module.replay is not None:
            reason = "is replayed (fixed_noise), so two votes are one"
        elif module.sharing != "per_example":
            reason = f"is shared ({module.sharing}), so the votes of a batch are not independent"
        elif getattr(module, "relative", False):
            reason = "is relative to the features of the batch, so it depends on the images"
        if reason:
            place = repr(site) if site else "the network as a whole"
            raise NoiseError(
                f"{what} does not hold for this model: the noise at {place} {reason}; use feature noise with "
                "sharing='per_example', outside of fixed_noise, or smooth the network without it: noise_disabled(model)"
            )
        assert isinstance(module, Perturbation)
        found.append((site, module))
    return found


def first_noise(model: nn.Module, x: Tensor) -> FirstNoise:
    """Check that the certificate holds for ``model`` at images like ``x`` (N, C, H, W), and return its constant.

    Raises:
        NoiseError: it does not hold, with the reason.
    """
    twin, site, x = check_first_noise(model, x)
    first = _enabled(twin)[site]
    features = _features(twin, first)
    with isolated_rng():
        seed_everything("bound")
        scale = first.theta.expand(features(x)[0].shape)
        if x[0].numel() <= EXACT_PIXELS:
            return FirstNoise(site, _largest_singular_value(features, x[0].shape, scale), True)
        return FirstNoise(site, _bound(twin, features, x[0].shape, scale, site), False)


def check_first_noise(
    model: nn.Module, x: Tensor, *, distributions: tuple[str, ...] = ("gaussian",)
) -> tuple[nn.Module, str, Tensor]:
    """Check all that the certificate rests on; return a float64 copy of the network, the site, and images for it.

    Raises:
        NoiseError: a condition does not hold, with the reason.
    """
    if not check_draws(model, what="the certificate of the first noise"):
        raise NoiseError(
            "the certificate of the first noise needs feature noise that is switched on, and this model has none; use "
            "method='smoothing' with a sigma"
        )
    with isolated_rng():
        seed_everything("first noise")
        twin = copied(model).double().requires_grad_(False).eval()
        x = x[:2].double()
        order = _order(twin, x)
        site, first = order[0]
        if order.count((site, first)) > 1:
            raise NoiseError(f"the noise at {site!r} is applied more than once in a pass; the certificate needs one")
        if first.distribution not in distributions:
            raise NoiseError(
                f"the first noise, at {site!r}, is {first.distribution}; the certificate holds for "
                f"{' or '.join(distributions)} noise only"
            )
        if not bool((first.theta > 0).all()):
            zeros = int((first.theta <= 0).sum())
            raise NoiseError(
                f"{zeros} scales of the first noise, at {site!r}, are not above 0: these features are not protected, "
                "and the radius is 0; train with a minimum above 0"
            )
        _check_bypass(twin, first, site, x)
        _check_affine(_features(twin, first), site, x)
    return twin, site, x


@contextlib.contextmanager
def _replaced(modules: list[Perturbation], what: Callable[[Perturbation, Tensor], Tensor]) -> Iterator[None]:
    """Let ``what`` stand in for the noise of these modules."""
    try:
        for module in modules:
            # On the instance, where the hook finds it first; the class is left alone.
            module.perturb = lambda h, module=module: what(module, h)  # type: ignore[method-assign, misc]
        yield
    finally:
        for module in modules:
            del module.perturb


def _enabled(network: nn.Module) -> dict[str, Perturbation]:
    found = named_noise(network)
    return {site: module for site, module in found if isinstance(module, Perturbation) and module.enabled}


def _order(network: nn.Module, x: Tensor) -> list[tuple[str, Perturbation]]:
    """Return the noise in the order in which a pass meets it."""
    modules = _enabled(network)
    sites = {module: site for site, module in modules.items()}
    met: list[tuple[str, Perturbation]] = []

    def note(module: Perturbation, h: Tensor) -> Tensor:
        met.append((sites[module], module))
        return h

    with _replaced(list(modules.values()), note), torch.no_grad():
        network(x)
    if not met:
        raise NoiseError("no noise is met in a pass, although it is switched on; is its site used in forward()?")
    return met


def _check_bypass(network: nn.Module, first: Perturbation, site: str, x: Tensor) -> None:
    """Refuse a path around the first noise: with its output held constant, the image must not matter at all.

    By the graph, which sees every differentiable path, and by values, which see the others.
    """
    held: list[Tensor] = []

    def hold(module: Perturbation, h: Tensor) -> Tensor:
        if module is not first:
            return h
        if not held:
            held.append(torch.randn_like(h[:1]))
        return held[0].expand_as(h).contiguous()

    images = torch.cat([x, torch.rand_like(x), torch.zeros_like(x[:1]), torch.ones_like(x[:1])]).requires_grad_()
    with _replaced(list(_enabled(network).values()), hold), torch.enable_grad():
        logits = network(images)
    rows = logits.detach()
    if logits.requires_grad or float((rows - rows[:1]).abs().max()) > _ROUNDING * (1 + float(rows.abs().max())):
        raise NoiseError(
            f"a path from the image to the logits goes around the first noise, at {site!r} (a shortcut, most likely), "
            "which voids the certificate; perturb a site that every path crosses, such as the first norm"
        )


def _features(network: nn.Module, first: Perturbation) -> Callable[[Tensor], Tensor]:
    """Return the function from images to what the first noise is added to, (N, *features)."""

    def features(x: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def stop(module: Perturbation, h: Tensor) -> Tensor:
            caught.append(h)
            raise _Reached

        with _replaced([first], stop), contextlib.suppress(_Reached):
            network(x)
        return caught[0]

    return features


def _check_affine(features: Callable[[Tensor], Tensor], site: str, x: Tensor) -> None:
    """Refuse what is not affine before the first noise, by chords between random images and these."""
    one, other = torch.rand(_PROBES, *x.shape[1:]).to(x), torch.rand(_PROBES, *x.shape[1:]).to(x)
    one = torch.cat([one, x])
    other = torch.cat([other, 1 - x])
    share = torch.rand(len(one), *[1] * (x.ndim - 1)).to(x)
    with torch.no_grad():
        low, high, between = features(one), features(other), features(share * one + (1 - share) * other)
    weight = share.view(-1, *[1] * (low.ndim - 1))
    error = float((weight * low + (1 - weight) * high - between).abs().max())
    if error > 1e-7 * (1 + float(between.abs().max())):
        raise NoiseError(
            f"what comes before the first noise, at {site!r}, is not affine in the image (off by {error:.2g}): an "
            "activation or a BatchNorm with batch statistics comes first; perturb before it"
        )


def _largest_singular_value(features: Callable[[Tensor], Tensor], shape: torch.Size, scale: Tensor) -> float:
    """Return ``|diag(scale)^-1 A|_2`` from the Gram matrix ``A^T diag(scale)^-2 A``, in float64.

    Exact, where power iteration would only bound it from below, which is the wrong side.
    """
    from scipy import linalg

    pixels = shape.numel()
    basis = torch.eye(pixels, dtype=torch.float64, device=scale.device).view(pixels, *shape)
    gram = torch.empty(pixels, pixels, dtype=torch.float64)
    with torch.no_grad():
        origin = features(torch.zeros_like(basis[:1]))
    for start in range(0, pixels, _CHUNK):
        images = basis[start : start + _CHUNK]
        leaf = images.clone().requires_grad_()
        with torch.enable_grad():
            columns = features(leaf)
            weighted = (columns.detach() - origin) / scale.square()
            (rows,) = torch.autograd.grad(columns, leaf, weighted)
        gram[start : start + _CHUNK] = rows.flatten(1).cpu()
    gram = (gram + gram.T) / 2
    largest = linalg.eigh(gram.numpy(), eigvals_only=True, subset_by_index=[pixels - 1, pixels - 1])[0]
    return float(largest) ** 0.5 * (1 + _ROUNDING)


def _bound(
    network: nn.Module, features: Callable[[Tensor], Tensor], shape: torch.Size, scale: Tensor, site: str
) -> float:
    """Return ``sqrt(|B|_1 |B|_inf) >= |B|_2`` for B = diag(scale)^-1 A, by one pass with absolute weights each way."""
    positive = copied(network)
    with torch.no_grad():
        for name, module in positive.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.weight is not None:
                if made := maker(module, "weight"):
                    raise NoiseError(
                        f"S cannot be bounded: the weight of {name!r} is computed by {made}, and an image has more "
                        f"than {EXACT_PIXELS} numbers; make it a parameter first: {advice(module, 'weight')}"
                    )
                module.weight.abs_()
    absolute = _features(positive, _enabled(positive)[site])
    zero = torch.zeros(1, *shape, dtype=torch.float64, device=scale.device)
    with torch.no_grad():
        tried = torch.rand(_PROBES, *shape).to(zero) * 2 - 1
        reached = (features(tried) - features(zero)).abs()
        allowed = absolute(tried.abs()) - absolute(zero)
        if not bool((reached <= allowed * (1 + _ROUNDING) + _ROUNDING).all()):
            raise NoiseError(
                f"S cannot be bounded: what comes before the first noise, at {site!r}, is more than convolutions, "
                f"linear layers and norms, and an image has more than {EXACT_PIXELS} numbers; certify smaller ones"
            )
        rows = ((absolute(torch.ones_like(zero)) - absolute(zero)) / scale).max()
    leaf = zero.requires_grad_()
    with torch.enable_grad():
        (columns,) = torch.autograd.grad(absolute(leaf), leaf, (1 / scale).unsqueeze(0))
    return float((rows * columns.max()).sqrt()) * (1 + _ROUNDING)
