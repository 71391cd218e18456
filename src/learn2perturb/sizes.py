"""What is a norm's own: usual radius and step, the radius of the whole box, the radii of a sweep. Knows no torch."""

from __future__ import annotations

from learn2perturb.errors import ConfigError

# The one radius that is usual for images of any size. Where an attack still holds this very object, nobody chose it.
LINF_EPS = 8 / 255
# PGD's step in the paper of Learn2Perturb, made for that radius.
_STEP = 0.01
_FACTORS_ABOVE = 6  # radii of a sweep above eps, at most, where doubling would take more


def usual_eps(norm: str) -> float:
    """Return the radius where nobody gives one, [0, 1] pixel scale.

    Raises:
        ConfigError: the norm has none: an l2 radius means little without the number of pixels.
    """
    if norm != "linf":
        raise ConfigError(
            f"norm is {norm!r} and no eps is given; 8/255 is an l_inf radius, so give one of this norm: eps=0.5 is "
            "usual in l2 for images of 32 x 32"
        )
    return LINF_EPS


def usual_step(norm: str, eps: float) -> float:
    """Return PGD's step where nobody gives one.

    In l_inf 0.01, and less where eps is below 8/255, in proportion; in other norms always that share of eps.
    """
    if eps == 0:
        return _STEP
    share = _STEP / LINF_EPS * eps
    return min(_STEP, share) if norm == "linf" else share


def whole_box(norm: str, pixels: int) -> float:
    """Return the radius of a ball that holds all of [0, 1]^pixels, wherever its centre is."""
    return 1.0 if norm == "linf" else float(pixels**0.5)


def sweep(norm: str, eps: float, pixels: int) -> tuple[float, ...]:
    """Return radii from a quarter of ``eps`` to one that reaches the grey image from anywhere, and beyond ``eps``.

    There nothing tells two images apart, so that accuracy must be at chance. Each is twice the one before, or more
    where more than six would be above ``eps``. For l_inf 8/255 they are 2, 4, 8, 16, 32, 64 and 128/255.
    """
    last = reach(norm, eps, pixels)
    factor = max(2.0, (last / eps) ** (1 / _FACTORS_ABOVE))
    sizes = [eps / 4, eps / 2, eps]
    while sizes[-1] < last * (1 - 1e-9):
        sizes.append(min(sizes[-1] * factor, whole_box(norm, pixels)))
    return tuple(sizes)


def reach(norm: str, eps: float, pixels: int) -> float:
    """Return the least last radius of a sweep: half the box, or twice ``eps``, and never more than the box."""
    whole = whole_box(norm, pixels)
    return min(max(whole / 2, 2 * eps), whole)
