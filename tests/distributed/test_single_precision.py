"""Float32: two processes part from one where a rounding turns the sign of a gradient, and nowhere else."""

from __future__ import annotations

import functools

import pytest

from learn2perturb.attacks.base import Attack
from learn2perturb.defenses import list_defenses
from learn2perturb.engine import ranks
from tests.distributed.processes import together
from tests.distributed.test_as_one import check_alike, config, trained

# HAT with a seed under which it parts, by 0.3 in a weight; noise that is learned; TRADES, whose gradient begins near 0.
QUICK = ("hat", "learn2perturb", "trades")
SEEDS = {"hat": 2}


def crafting(settings, instead=None):
    """Train; return what came of it, what each attack found, and how many pixels are others than those of ``instead``.

    The training gets its rows of ``instead`` in place of what its attacks find, where that is given.
    """
    found, turned, craft = [], [], Attack.craft

    @functools.wraps(craft)
    def watched(self, model, x, *rest, **options):
        images = craft(self, model, x, *rest, **options).detach()
        if instead is not None:
            share, whole = ranks.current_share(), instead[len(turned)]
            given = whole if share is None else share.of(whole)
            turned.append(int(((images - given).abs() > 1e-6).sum()))
            images = given
        found.append(images.clone())
        return images.clone()

    Attack.craft = watched
    try:
        return trained(settings, double=False), found, sum(turned)
    finally:
        Attack.craft = craft


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in list_defenses()]
)
def test_on_the_same_adversarial_images_twenty_steps_are_those_of_one(name, tmp_path):
    settings = config(defense=name, seed=SEEDS.get(name, 0))
    one, images, _ = crafting(settings)
    many = together(2, lambda rank: crafting(settings, images), tmp_path)
    check_alike(one, [outcome for outcome, *_ in many], tolerance=1e-5)
    # What they would have found differs in single pixels.
    assert sum(turned for *_, turned in many) <= sum(map(len, images)) / 10
