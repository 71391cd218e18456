#!/usr/bin/env bash
# The practitioner's path: a network of timm and a folder of images of mixed sizes; fine-tuned with learned noise,
# evaluated, diagnosed, exported to ONNX, its page made. A few minutes on two cores, most of them the diagnosis; the
# numbers mean nothing.
#   examples/practitioner.sh [FOLDER]        needs: pip install 'learn2perturb[hub,onnx]' and timm (docs/networks.md)
set -euo pipefail
read -ra l2p <<< "${L2P:-learn2perturb}"
python=${PYTHON:-python}
mkdir -p "${1:-runs/practitioner}" && cd "${1:-runs/practitioner}"

# Images of your own lie in images/train/CLASS/* and images/test/CLASS/*; here they are drawn.
"$python" - << 'PY'
import pathlib
import random

from PIL import Image, ImageDraw

random.seed(0)
for split, count in (("train", 48), ("test", 16)):
    for number in range(count):
        kind = ("circle", "square")[number % 2]
        width, height = random.randint(28, 44), random.randint(28, 44)
        image = Image.new("RGB", (width, height), (random.randint(0, 60),) * 3)
        draw = ImageDraw.Draw(image).ellipse if kind == "circle" else ImageDraw.Draw(image).rectangle
        draw((6, 6, width - 7, height - 7), fill=(random.randint(150, 255),) * 3)
        folder = pathlib.Path("images", split, kind)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
PY
data=(--dataset folder --data-dir images --dataset-options.size 16)
quick=(--recipe fast --batch-size 16 --attack-steps 2 --monitor 0 --tensorboard false)

# Pretrained weights would be timm:NAME?pretrained; here the network is first trained without a defense.
"${l2p[@]}" train --model timm:test_byobnet "${data[@]}" "${quick[@]}" --defense none --epochs 3 --out plain
"${l2p[@]}" train --model timm:test_byobnet "${data[@]}" "${quick[@]}" --defense learn2perturb --epochs 2 \
  --init-from plain --freeze network.stem --options.init relative --options.init_share 0.1 \
  --optimizer adamw --lr 1e-3 --warmup-epochs 0.5 --clip-norm 1 --out hardened
"${l2p[@]}" evaluate hardened --attacks pgd7 --draws 3
"${l2p[@]}" diagnose hardened --quick --limit 4 --source undefended=plain
"${l2p[@]}" export hardened --format onnx --out deployed
"${l2p[@]}" report hardened --out page.html
