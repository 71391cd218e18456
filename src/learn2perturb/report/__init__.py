"""A page that a reviewer can open, believe and pass on: one HTML file, made of records alone. Knows no torch.

The package is what it does: ``learn2perturb.report(...)`` writes a page.
"""

from __future__ import annotations

import sys
import types
from typing import Any, final

from learn2perturb.report.page import report

__all__ = ["report"]


@final
class _Callable(types.ModuleType):
    """This package, called as the function that it holds, since both have one name in ``learn2perturb``."""

    def __call__(self, *sources: Any, **settings: Any) -> Any:
        """Return what :func:`report` returns."""
        return report(*sources, **settings)


sys.modules[__name__].__class__ = _Callable
