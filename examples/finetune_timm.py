"""A network of timm, fine-tuned with learned noise, attacked, saved and loaded.

    pip install 'learn2perturb[hub]' && pip install --no-deps torchvision timm
    python examples/finetune_timm.py
    python examples/finetune_timm.py 'timm:resnetv2_18?pretrained' 3

The name says the network: `?pretrained` fetches its published weights, without it they are random. The network is built
with the number of classes of the data, normalises inside, and its submodules are below `network.`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import learn2perturb as l2p
from learn2perturb.evaluation import Evaluation

NAME = "timm:resnetv2_18"


def main(name: str = NAME, epochs: int = 1, **options: Any) -> Evaluation:
    """Fine-tune with noise on the main path, at a small learning rate; evaluate what was saved."""
    data = l2p.load_data("digits", "train", limit=300), l2p.load_data("digits", "test", limit=100)
    config = l2p.TrainConfig(
        defense="learn2perturb", options={"sites": "network.stages.*.blocks.*.conv2", "granularity": "channel"},
        model=name, model_options=options, recipe="fast", epochs=epochs, batch_size=50, lr=0.02,
        eps=0.1, attack_step_size=0.05, attack_steps=2, engine="plain", monitor=0, tensorboard=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        l2p.train(config, data=data, out=out)
        model = l2p.load(out)  # a network with a name is built again from it
    attack = l2p.attacks.PGD(eps=0.1, step_size=0.025, steps=5, eot=3)
    return l2p.evaluate(model, data[1], {"eot-pgd5": attack}, draws=5)


if __name__ == "__main__":
    print(main(*sys.argv[1:2], *map(int, sys.argv[2:])))
