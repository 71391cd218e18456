"""``certify``: radii within which no attack at all changes a majority vote, with probability 1 - alpha an image."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learn2perturb.certification.bounds import gaussian_dp_radius, laplace_radius, vote_bounds
from learn2perturb.certification.config import GAPS, CertifyConfig
from learn2perturb.certification.first_noise import check_draws, check_first_noise, first_noise
from learn2perturb.certification.record import Certification, largest_radius, lower_bound, radius_of
from learn2perturb.configs import takes
from learn2perturb.data import check_labels, warn_of_subset
from learn2perturb.engine import execution
from learn2perturb.engine.random import kept_generators, put_back_generators, seed_everything
from learn2perturb.engine.ranks import current
from learn2perturb.engine.rows import sharded
from learn2perturb.errors import ConfigError, NoiseError
from learn2perturb.evaluation.inputs import check_fixed
from learn2perturb.evaluation.keeping import Unfinished
from learn2perturb.evaluation.passes import Model, checked_logits
from learn2perturb.evaluation.pieces import NOTHING, Pieces
from learn2perturb.evaluation.target import Target
from learn2perturb.noise.sensitivity import checked_convolution, sensitivity
from learn2perturb.progress import Progress
from learn2perturb.records import PackedIntegers

_LEGS = 1000  # parts of the votes, each of which can be kept


@takes(CertifyConfig)
def certify(
    model: Model,
    data: Any,
    config: CertifyConfig | None = None,
    *,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: Progress | bool | None = True,
    keep: Unfinished | None = None,
    **settings: Any,
) -> Certification:
    """Certify the majority vote of ``model`` at every image: an l2 radius, or an abstention.

    The class is chosen by ``n0`` draws and certified by ``n`` others (Clopper-Pearson); each image's certificate is
    wrong with probability ``alpha`` at most.

    Args:
        model: any callable from images to logits for ``smoothing``; a module with noise for the other methods.
        data: what ``learn2perturb.data.make_source`` takes.
        config: all settings in one.
        settings: the fields of :class:`CertifyConfig`; what is given replaces that of ``config``.
        device: where to run; by default where the model is.
        name: of the model, for the record.
        progress: show a bar, or plain lines off a terminal; or what is called with (passes done, passes in all, what is
            going on).
        keep: where votes are kept, so that the same call goes on with them: of a module whose draws follow from seeds,
            in one process.

    Raises:
        NoiseError: the certificate does not hold for this model; the message says why.
        ConfigError: a setting is not allowed.
        InputError: the model is no fixed function of an image (see ``diagnose``).
        DataError: there are no images.
    """
    config = CertifyConfig.of(config, settings)
    if config.chosen in GAPS:
        raise ConfigError(
            f"method {config.chosen!r} bounds a risk and gives no radii: use learn2perturb.certification.risk_gap"
        )
    n0, n, alpha, sigma, method = config.n0, config.n, config.alpha, config.sigma, config.chosen
    seed, batch_size = config.seed, config.batch_size
    target = Target(model, device, name)
    with target.judged(progress) as told:
        source = target.source(data, batch_size=batch_size, seed=seed, limit=config.limit)
        x, y = target.images(source)
        target.check_alike(config, {})
        # Before anything else looks at the model: what is refused here is refused in seconds, not after the votes.
        constant, site, exact, mechanism = _constant(model, x, method, sigma)
        check_fixed(model, x, seed)
        classes = target.classes(x)
        check_labels(y, classes)
        warn_of_subset(source, y, classes)
        noise = sigma if method == "smoothing" else None
        total = len(x) * (n0 + n)
        pieces = kept_votes(keep, target, x, seed, batch_size)
        chosen, votes = (
            votes_of(model, x, draws, noise, classes, batch_size, told, span, (seed, stream), pieces)
            for draws, span, stream in ((n0, (0, total), "choose"), (n, (len(x) * n0, total), "certify"))
        )
        chosen = chosen.argmax(axis=1)
    counts = votes[np.arange(len(votes)), chosen]
    if method == "pixeldp":
        p_low, others = vote_bounds(votes, alpha, top=chosen)
        rule = laplace_radius if mechanism == "laplace" else gaussian_dp_radius
        radii = rule(p_low, others, sigma=1.0, sensitivity=constant)
        largest = float(rule(*vote_bounds(_unanimous(n, classes), alpha, top=[0]), sigma=1.0, sensitivity=constant)[0])
    else:
        p_low = lower_bound(counts, n, alpha)
        radii = radius_of(p_low, constant)
        largest = largest_radius(n, alpha, constant)
    more: dict[str, Any] = {"seconds": target.seconds + pieces.seconds, "batch_size": batch_size}
    return Certification(
        method=method,
        norm="l1" if mechanism == "laplace" else "l2",
        constant=float(constant),
        exact=exact,
        site=site,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        eps=float(config.eps),
        pixels=x[0].numel(),
        largest=largest,
        labels=PackedIntegers.pack(y.cpu().numpy()),
        predictions=PackedIntegers.pack(np.where(radii > 0, chosen, -1)),
        votes=PackedIntegers.pack(counts),
        radii=tuple(float(radius) for radius in radii),
        num_classes=classes,
        seed=seed,
        metadata=target.metadata(data, replace(config, method=method), execution.PLAIN, **more),
    )


@takes(CertifyConfig)
def expected_seconds(model: Model, data: Any, config: CertifyConfig | None = None, **settings: Any) -> float:
    """Return about how many seconds the votes of a certificate, or of a bound of the risk, take: from one pass.

    Args:
        model: as of :func:`certify`.
        data: as of :func:`certify`.
        config: all settings in one.
        settings: the fields of :class:`CertifyConfig`; what is given replaces that of ``config``.
    """
    config = CertifyConfig.of(config, settings)
    target = Target(model)
    with target.judged(False), torch.no_grad():
        source = target.source(data, batch_size=config.batch_size, seed=config.seed, limit=config.limit)
        x = target.images(source)[0]
        passes = len(x) * (config.n + (0 if config.chosen in GAPS else config.n0))
        rows = x[torch.arange(min(config.batch_size, passes), device=x.device) % len(x)]
        took = []
        for _ in range(2):  # the first prepares what it needs
            start = time.perf_counter()
            _predicted(model, rows, config.sigma)
            took.append(time.perf_counter() - start)
    return passes * min(took) / len(rows)


def _constant(model: Model, x: Tensor, method: str, sigma: float | None) -> tuple[float, str | None, bool, str]:
    """Return what the radius is divided by, the site, whether the constant is exact, and the kind of noise.

    Raises:
        NoiseError: the certificate does not hold for this model.
    """
    if method == "smoothing":
        check_draws(model, what="randomised smoothing")
        assert sigma is not None
        return 1 / float(sigma), None, True, "gaussian"
    if not isinstance(model, nn.Module):
        raise NoiseError(
            f"the model is a {type(model).__name__}, and method {method!r} must look inside a torch.nn.Module; give "
            "the module, or use method='smoothing' with a sigma"
        )
    if method == "first_noise":
        found = first_noise(model, x)
        return found.constant, found.site, found.exact, "gaussian"
    found_noise = check_draws(model, what="PixelDP's certificate")
    if len(found_noise) != 1 or found_noise[0][1].theta.numel() != 1 or found_noise[0][1].place != "output":
        raise NoiseError(
            f"PixelDP's certificate is for one noise layer with one scale, on the output of the first convolution, and "
            f"this model has {len(found_noise)}; use method='first_noise', or train with defense pixeldp"
        )
    site, noise = found_noise[0]
    norm = "l2" if noise.distribution == "gaussian" else "l1"
    check_first_noise(model, x, distributions=("gaussian", "laplace"))
    bound = float(sensitivity(model, checked_convolution(model.get_submodule(site), site), norm))
    return bound / float(noise.theta.detach()), site, False, noise.distribution


def _unanimous(n: int, classes: int) -> NDArray[np.int64]:
    votes = np.zeros((1, classes), dtype=np.int64)
    votes[0, 0] = n
    return votes


def kept_votes(keep: Unfinished | None, target: Target, x: Tensor, seed: int, batch_size: int) -> Pieces:
    """Return the votes on images ``x`` that were counted before, and say so; nothing where none are kept."""
    if keep is None:
        return NOTHING
    reason = target.unkept(x, seed)
    if not reason and target.device.type not in ("cpu", "cuda"):
        reason = f"the random generator of {target.device} cannot be put back"
    return keep.pieces(("votes", target.identity(seed, batch_size, execution.PLAIN)), reason)


def _predicted(model: Model, rows: Tensor, sigma: float | None) -> Tensor:
    """Return the classes of one pass over ``rows``, with the noise of smoothing on them where there is a ``sigma``."""
    if sigma is not None:
        rows = rows + sigma * torch.empty_like(rows).normal_()
    return checked_logits(model, rows).argmax(dim=1)


def votes_of(
    model: Model,
    x: Tensor,
    draws: int,
    sigma: float | None,
    classes: int,
    batch_size: int,
    progress: Progress,
    span: tuple[int, int],
    stream: tuple[int, str],
    pieces: Pieces = NOTHING,
) -> NDArray[np.int64]:
    """Return how often each class was predicted for each image, (N, classes), in ``draws`` passes with fresh draws.

    The passes follow each other in one ``stream`` of draws, named by what seeds it, so that what is kept of some of
    them is their votes and where the stream was after them.
    """
    before, total = span
    starts = range(0, len(x) * draws, batch_size)
    legs = min(_LEGS, len(starts))

    def counted(leg: int) -> tuple[Tensor, dict[str, Any]]:
        counts = torch.zeros(len(x) * classes, dtype=torch.int64, device=x.device)
        for start in starts[leg * len(starts) // legs : (leg + 1) * len(starts) // legs]:
            stop = min(start + batch_size, len(x) * draws)
            # Rows of several images share a pass: their draws are independent, and small n fills the batch too.
            share = current().share(stop - start)
            images = share.of(torch.arange(start, stop, device=x.device) // draws)
            rows = x[images]
            with sharded(share):
                predicted = _predicted(model, rows, sigma)
            if share.counted:
                counts += torch.bincount(images * classes + predicted, minlength=len(counts))
            progress(before + stop, total, "votes")
        return counts, kept_generators() if pieces.folder else {}

    counts = torch.zeros(len(x) * classes, dtype=torch.int64, device=x.device)
    seed_everything(*stream)
    with torch.no_grad():
        for (votes, generators), kept in pieces.run(counted, legs, (stream, draws, sigma), x.device):
            counts += votes
            if kept:
                put_back_generators(generators)
    return current().sum(counts).view(len(x), classes).cpu().numpy()
