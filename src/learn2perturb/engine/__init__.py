"""How passes are run: precision, memory format, random draws. Everything above gains from it without knowing it."""

from learn2perturb.engine.execution import FAST, PLAIN, ExecutionMode, autocast, current, running, select

__all__ = ["FAST", "PLAIN", "ExecutionMode", "autocast", "current", "running", "select"]
