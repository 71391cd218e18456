"""Recipes: each closes every setting of every defense; one that extends another says what differs, and nothing else."""

from __future__ import annotations

import pytest

from learn2perturb.defenses import list_defenses
from learn2perturb.training import TrainConfig, config
from learn2perturb.training.config import RECIPES, load_recipe


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("defense", list_defenses())
def test_every_recipe_closes_every_setting_of_every_defense(recipe, defense):
    TrainConfig(recipe=recipe, defense=defense).resolve().closed()


def differing(one, other):
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_what_a_recipe_extends_is_the_other_but_for_what_it_says():
    paper, released, common, fast, laptop = map(load_recipe, RECIPES)
    assert differing(paper["settings"], released["settings"]) == {"weight_decay"}
    assert differing(paper["defenses"], released["defenses"]) == {"none", "learn2perturb", "learn2perturb_r", "pixeldp"}
    # Merged at every depth: the options are its own, what the paper gives the network stays.
    assert released["defenses"]["pixeldp"]["options"] == {"sensitivity": "assumed"}
    assert released["defenses"]["pixeldp"]["model_options"] == paper["defenses"]["pixeldp"]["model_options"]
    assert differing(common["settings"], fast["settings"]) == {"epochs", "schedule", "milestones"}
    assert common["defenses"] == fast["defenses"] == laptop["defenses"]
    assert differing(fast["settings"], laptop["settings"]) == {
        "epochs", "attack_steps", "attack_step_size",
    }  # fmt: skip


def test_extending_leaves_the_other_as_it_was_and_replaces_lists_whole(monkeypatch):
    texts = {
        "paper": "settings: {milestones: [1, 2], eps: 0.1}\ndefenses: {}",
        "fast": "extends: paper\nsettings: {milestones: []}",
    }
    monkeypatch.setattr(config, "_recipe_text", texts.__getitem__)
    assert load_recipe("fast") == {"settings": {"milestones": [], "eps": 0.1}, "defenses": {}}
    assert load_recipe("paper")["settings"]["milestones"] == [1, 2]
