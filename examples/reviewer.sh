#!/usr/bin/env bash
# The reviewer's path: a stranger's file of weights with keys of DataParallel, a foreign random network that gives a
# dict, a claim, and the page on it. About a minute on two cores; the numbers mean nothing.
#   examples/reviewer.sh [FOLDER]
set -euo pipefail
read -ra l2p <<< "${L2P:-learn2perturb}"
python=${PYTHON:-python}
mkdir -p "${1:-runs/reviewer}" && cd "${1:-runs/reviewer}"

# What the stranger sent: the code of the network, and its weights.
cat > stranger.py << 'PY'
import torch
from torch import nn


class Randomised(nn.Module):
    """Adds noise to the images, and gives a dict."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return {"logits": self.body(x + 0.1 * torch.randn_like(x)), "images": x}


def build():
    return Randomised()
PY
"$python" - << 'PY'
import torch
from stranger import build

import learn2perturb as l2p

torch.manual_seed(0)
network, data = build(), l2p.load_data("digits", "train")
optimizer = torch.optim.Adam(network.parameters(), 1e-2)
for _ in range(60):
    loss = torch.nn.functional.cross_entropy(network(data.images / 255)["logits"], data.labels)
    optimizer.zero_grad(), loss.backward(), optimizer.step()
torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 60}, "stranger.pt")
PY

network=(--model stranger:build --weights stranger.pt --output logits --dataset digits)
"${l2p[@]}" evaluate "${network[@]}" --attacks pgd7,eot-pgd7 --eot 5 --eps 0.1 --draws 3 --limit 40 --out evaluation.json
"${l2p[@]}" diagnose "${network[@]}" --quick --limit 8 --claim "85 % under pgd20 with 0.1" --out diagnosis.json
"${l2p[@]}" report evaluation.json diagnosis.json --out page.html
