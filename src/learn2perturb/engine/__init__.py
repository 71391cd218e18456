"""How passes are run: precision, memory format, random draws. Everything above gains from it without knowing it."""

from learn2perturb.engine.gears import FAST, PLAIN, Gear, autocast, current, running, select

__all__ = ["FAST", "PLAIN", "Gear", "autocast", "current", "running", "select"]
