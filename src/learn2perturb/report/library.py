"""The library that draws charts: Vega-Lite, as a script for a page and as a renderer for figures."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from learn2perturb.errors import MissingDependencyError


def vl_convert() -> Any:
    """Return the module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import vl_convert as found
    except ImportError:
        raise MissingDependencyError(
            "the charts of a page need vl-convert-python; install it: pip install 'learn2perturb[report]'"
        ) from None
    return found


@lru_cache
def script() -> str:
    """Return Vega-Lite with all that it needs, as one script.

    Raises:
        MissingDependencyError: vl-convert is not installed.
    """
    bundle = vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return str(bundle).replace("</script", "<\\/script")
