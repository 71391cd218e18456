"""Images of a data set that a diagnosis does not judge by: what a surrogate may learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learn2perturb.data import make_source


def others(data: Any, x: Tensor, most: int, *, batch_size: int, seed: int) -> Tensor:
    """Return up to ``most`` images of ``data`` that are none of ``x``, none where there are no others."""
    source = make_source(data, batch_size=batch_size, seed=seed, device=x.device)
    if source.num_examples <= len(x):
        return x[:0]
    used = {_key(image) for image in x}
    found, count = [x[:0]], 0
    for batch, _ in source.epoch(0):
        images = batch.to(x)
        new = images[torch.tensor([_key(image) not in used for image in images], device=x.device)]
        found.append(new[: most - count])
        count += len(found[-1])
        if count >= most:
            break
    return torch.cat(found)


def _key(image: Tensor) -> bytes:
    return image.cpu().numpy().tobytes()
