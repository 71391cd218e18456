"""``certify --method renyi``: the gap between clean and adversarial risk that the first noise module guarantees.

Pinot et al., Theoretical evidence for adversarial robustness through randomization, NeurIPS 2019,
https://arxiv.org/abs/1902.01148, theorem 3: if the answers to two images of the ball have a Renyi divergence of at most
epsilon, the risk of a draw grows by ``1 - exp(-epsilon) E exp(-H)`` at most, H the entropy of the clean answers. They
are a function of the first noisy features, whose divergence is known: ``S^2 |d|_2^2 / 2``, with the S of
``first_noise``.
"""

from __future__ import annotations

from typing import Any

import torch

from learn2perturb.certification.certifying import kept_votes, votes_of
from learn2perturb.certification.config import CertifyConfig
from learn2perturb.certification.first_noise import first_noise
from learn2perturb.certification.gap import RiskGap, bounds_of
from learn2perturb.configs import takes
from learn2perturb.data import check_labels, warn_of_subset
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError, NoiseError
from learn2perturb.evaluation.inputs import check_fixed
from learn2perturb.evaluation.keeping import Unfinished
from learn2perturb.evaluation.passes import Model
from learn2perturb.evaluation.target import Target
from learn2perturb.progress import Progress
from learn2perturb.records import PackedIntegers


@takes(CertifyConfig)
def risk_gap(
    model: Model,
    data: Any,
    config: CertifyConfig | None = None,
    *,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: Progress | bool | None = True,
    keep: Unfinished | None = None,
    **settings: Any,
) -> RiskGap:
    """Return the most by which the risk of a draw of ``model`` can grow in the l_inf ball of size ``eps``.

    Entropies are bounded from ``n`` draws for each image, all of them at once with chance ``1 - alpha``. What the first
    noise must be is checked as for ``certify``.

    Args:
        model: a module with Gaussian noise on features, the first of which every path crosses.
        data: what ``learn2perturb.data.make_source`` takes.
        config: all settings in one.
        settings: the fields of :class:`CertifyConfig`, of which ``n0`` plays no part; what is given replaces that of
            ``config``.
        device: where to run; by default where the model is.
        name: of the model, for the record.
        progress: as for ``certify``.
        keep: as for ``certify``.

    Raises:
        NoiseError: the bound does not hold for this model; the message says why.
        ConfigError: a setting is not allowed.
        InputError: the model is no fixed function of an image (see ``diagnose``).
        DataError: there are no images.
    """
    config = CertifyConfig.of(config, {"method": "renyi", **settings})
    if config.method != "renyi":
        raise ConfigError(f"method is {config.method!r}; risk_gap is for 'renyi', and certify for radii")
    if not isinstance(model, torch.nn.Module):
        raise NoiseError(
            f"the model is a {type(model).__name__}, and method 'renyi' must look inside a torch.nn.Module; give the "
            "module"
        )
    n, seed, batch_size = config.n, config.seed, config.batch_size
    target = Target(model, device, name)
    with target.judged(progress) as told:
        source = target.source(data, batch_size=batch_size, seed=seed, limit=config.limit)
        x, y = target.images(source)
        found = first_noise(model, x)  # before the votes: what is refused is refused in seconds
        check_fixed(model, x, seed)
        classes = target.classes(x)
        check_labels(y, classes)
        warn_of_subset(source, y, classes)
        pieces = kept_votes(keep, target, x, seed, batch_size)
        votes = votes_of(model, x, n, None, classes, batch_size, told, (0, len(x) * n), (seed, "renyi"), pieces)
    pixels, seconds = x[0].numel(), target.seconds + pieces.seconds
    bounds = bounds_of(votes, config.alpha, found.constant, config.eps * pixels**0.5)
    return RiskGap(
        constant=float(found.constant),
        exact=found.exact,
        site=found.site,
        n=n,
        alpha=config.alpha,
        eps=float(config.eps),
        pixels=pixels,
        labels=PackedIntegers.pack(y.cpu().numpy()),
        votes=PackedIntegers.pack(votes.reshape(-1)),
        num_classes=classes,
        seed=seed,
        metadata=target.metadata(data, config, execution.PLAIN, seconds=seconds, batch_size=batch_size),
        **bounds,
    )
