"""Parts of a set that stand for the whole: in a fixed random order, balanced over the classes where labels are known.

A part of what is held here is always taken by :func:`balanced_rows`. The order of a loader is up to the user, so a part
of that is looked at instead: :func:`warn_of_subset` says when its classes cannot be those of the set.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

# Chance at which a part drawn at random would look as strange as this one: below it, the warning is given.
_CHANCE = 1e-3


def balanced_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows (N,) of a set in a fixed random order, of which every beginning has the classes of the set.

    A beginning of n images has, up to rounding, n N_c / N of class c. The order follows from the labels alone, so that
    two networks are scored on the same images, whatever the seed, the machine and the versions of libraries.
    """
    chance = _mixed(len(labels))
    by_class = np.lexsort((chance, labels))
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    place = (rank + 0.5) / np.repeat(counts, counts)
    return by_class[np.lexsort((chance[by_class], place))]


def balanced_rows(labels: Tensor | None, size: int, n: int) -> Tensor:
    """Return ``n`` rows (n,) of ``size``, the beginning of :func:`balanced_order`; without labels, drawn at random."""
    known = np.zeros(size, dtype=np.int64) if labels is None else labels.cpu().numpy()
    return torch.from_numpy(balanced_order(known)[:n])


def known_labels(data: Any) -> Tensor | None:
    """Return the labels (N,) of a data set that says them without reading its images, else None.

    They are the last of a ``TensorDataset``, or ``targets`` or ``labels``, as torchvision has them.
    """
    if isinstance(data, Subset):
        whole = known_labels(data.dataset)
        return None if whole is None else whole[torch.as_tensor(list(data.indices), dtype=torch.int64)]
    if isinstance(data, TensorDataset):
        found: Any = data.tensors[-1] if len(data.tensors) == 2 else None
    else:
        found = getattr(data, "targets", getattr(data, "labels", None))
    try:
        labels = torch.as_tensor(found).cpu()
        size = len(data)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole_numbers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    return labels.to(torch.int64) if whole_numbers and tuple(labels.shape) == (size,) else None


def warn_of_subset(source: Any, labels: Tensor, num_classes: int) -> list[str]:
    """Warn, and return the words, if ``labels`` (n,) of a part of ``source`` cannot stand for the whole of it.

    Nothing is said of a whole set, nor of a part that was taken here, nor of one that chance explains.
    """
    whole = getattr(source, "part_of", None)
    if whole is None or not len(labels):
        return []
    reason = _strange(labels.cpu().numpy(), num_classes, getattr(source, "known_labels", None))
    if reason is None:
        return []
    text = (
        f"the first {len(labels)} of {whole} images of your data {reason}: numbers of them say little about the set; "
        "shuffle it once with a fixed seed, or use all images"
    )
    warnings.warn(text, stacklevel=3)
    return [text]


def _strange(labels: NDArray[np.int64], num_classes: int, known: Tensor | None) -> str | None:
    """Return what is strange about labels if they are taken as drawn at random from their set."""
    n = len(labels)
    counts = np.bincount(labels, minlength=num_classes)
    classes, distinct = len(counts), int((counts > 0).sum())
    if known is not None:
        return _unlike(counts, np.bincount(known.numpy(), minlength=classes))
    # Union bound over the choices of the classes that were seen, all being equally frequent.
    log_chance = _log_choose(classes, distinct) + n * math.log(distinct / classes)
    if log_chance < math.log(_CHANCE):
        return f"hold {distinct} of {classes} classes"
    # Shuffled labels change from image to image; sorted ones come in runs (Wald and Wolfowitz 1940).
    share = counts / n
    stay = float((share**2).sum())
    changes = int((labels[1:] != labels[:-1]).sum())
    expected, spread = (n - 1) * (1 - stay), math.sqrt((n - 1) * stay * (1 - stay))
    return "come sorted by class" if distinct > 1 and changes < expected - 4 * spread - 1 else None


def _unlike(counts: NDArray[np.int64], whole: NDArray[np.int64]) -> str | None:
    """Return which class is far more or less frequent in the part than in the whole, by exact binomial tails."""
    from scipy.stats import binom

    n, share = counts.sum(), whole / whole.sum()
    tails = np.minimum(binom.sf(counts - 1, n, share), binom.cdf(counts, n, share))
    worst = int(tails.argmin())
    if tails[worst] * len(counts) >= _CHANCE:
        return None
    return f"are of class {worst} for {counts[worst] / n:.0%} and the whole set for {share[worst]:.0%}"


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _mixed(n: int) -> NDArray[np.uint64]:
    """Return ``n`` fixed random numbers: splitmix64 of 0, 1, ...; the stream of a library may change."""
    with np.errstate(over="ignore"):
        z = (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
