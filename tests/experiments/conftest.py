"""A study of seconds: two defenses on a few digits, two cells, two seeds."""

from __future__ import annotations

import copy

import pytest

TINY = {
    "title": "tiny",
    "train": {
        "dataset": "digits", "model": "digits_cnn", "recipe": "common", "engine": "plain", "epochs": 2,
        "milestones": [1],
        "limit": 64, "batch_size": 32, "eps": 0.15, "attack_step_size": 0.05, "attack_steps": 2, "monitor": 0,
        "tensorboard": False,
    },
    "seeds": [1, 2],
    "runs": {"all": {"defense": ["pgd_at", "learn2perturb"]}},
    "evaluate": {"limit": 20, "draws": 2, "batch_size": 20},
    "cells": {"clean": {}, "pgd": {"attack": "pgd:steps=2,step_size=0.05"}},
}  # fmt: skip


@pytest.fixture
def tiny():
    return copy.deepcopy(TINY)


@pytest.fixture
def one(tiny):
    """One run of the study, one seed."""
    return {**tiny, "seeds": [1], "runs": {"all": {"defense": "learn2perturb"}}}
