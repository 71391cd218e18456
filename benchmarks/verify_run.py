"""Check on a trained run that its noise is what it claims to be, and how far theta departs from its schedule.

    python benchmarks/verify_run.py runs/cifar10-resnet20-learn2perturb-fast-seed0 --data-dir .data

Prints four checks and a table of theta; exits 1 if a check fails. About a minute for ResNet-20 on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import LOSSES
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.files import locate
from learn2perturb.training import read_metrics

EOT = (1, 2, 4, 8, 16)


def equals_plain_network(model: nn.Module, x: torch.Tensor) -> bool:
    """Tell whether the noise-off network equals, bit for bit, a plain one that has never been perturbed."""
    plain = l2p.build_model(model.registered_name, **model.build_arguments).eval()
    own = {key: value for key, value in model.state_dict().items() if ".perturbation." not in key}
    plain.load_state_dict(own)
    with l2p.noise_disabled(model):
        return torch.equal(model(x), plain(x))


def gradient_variances(model: nn.Module, x: torch.Tensor, y: torch.Tensor, repeats: int) -> list[float]:
    """Return, for each K of ``EOT``, the variance of the averaged input gradient over ``repeats``, mean over pixels.

    Gradients are divided by their mean norm an image, so that no image dominates.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found: list[float] = []
    scale: torch.Tensor | None = None
    for draws in EOT:
        stack = torch.stack([input_gradient(model, LOSSES["ce"], x, y, eot=draws) for _ in range(repeats)])
        norms = stack.flatten(2).norm(dim=2).mean(0).clamp_min(1e-12)
        scale = norms if scale is None else scale
        found.append((stack / scale.view(1, -1, 1, 1, 1)).var(dim=0).mean().item())
    return found


def main() -> int:
    """Run the checks and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder of a defense with noise")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=32)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = l2p.load(arguments.run)
    header = read_model(locate(arguments.run))[1]
    data = l2p.load_data(header["config"]["dataset"], "test", root=arguments.data_dir, limit=arguments.images)
    x, y = data.images.float() / 255, data.labels
    with torch.no_grad():
        plain = equals_plain_network(model, x)
        twice = model(x[:1].expand(2, -1, -1, -1))
        rows_differ = not torch.equal(twice[0], twice[1])
        passes_differ = not torch.equal(model(x), model(x))
    variances = gradient_variances(model, x, y, arguments.repeats)
    slope = float(np.polyfit(np.log(EOT), np.log(variances), 1)[0])
    checks = {
        "noise off equals the plain network bit for bit": plain,
        "two rows of a batch, same image, get different noise": rows_differ,
        "two passes over the same batch differ": passes_differ,
        f"variance of the EOT gradient falls as K^{slope:.3f} (wanted -1 +- 0.1)": abs(slope + 1) <= 0.1,
    }
    for text, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {text}")
    print("\nK         " + "".join(f"{draws:>10}" for draws in EOT))
    print("variance  " + "".join(f"{variance:>10.3g}" for variance in variances))

    lines = read_metrics(arguments.run)
    if lines and "theta" in lines[-1]:
        last = lines[-1]
        print(f"\nafter epoch {last['epoch'] + 1}; the regulariser alone would give {last['theta_schedule']:.5f}")
        print(f"{'site':<16}{'mean':>9}{'spread':>9}{'minimum':>9}{'maximum':>9}{'departure':>11}")
        for site, theta in lines[-1]["theta"].items():
            numbers = [theta[key] for key in ("mean", "spread", "minimum", "maximum")]
            print(f"{site:<16}" + "".join(f"{number:>9.5f}" for number in numbers) + f"{theta['departure']:>11.5f}")
        print(
            f"\n{'epoch':<7}{'theta':>9}{'schedule':>10}{'largest departure':>19}{'loss slope / regulariser slope':>32}"
        )
        for line in lines:
            ratio = line.get("theta_slope_ratio", float("nan"))
            print(
                f"{line['epoch'] + 1:<7}{line['theta_mean']:>9.5f}{line['theta_schedule']:>10.5f}"
                f"{line['theta_departure']:>19.5f}{ratio:>32.3f}"
            )
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
