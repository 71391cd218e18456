"""How passes are run: precision, memory format, random draws. Everything above gains from it without knowing it."""

from learn2perturb.engine.execution import FAST, FAST32, PLAIN, ExecutionMode, autocast, current, running, select

__all__ = ["FAST", "FAST32", "PLAIN", "ExecutionMode", "autocast", "current", "running", "select"]
