"""The record of a certification: what it says of its radii, and which numbers it can have."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from learn2perturb.certification import Certification
from learn2perturb.certification.bounds import gaussian_dp_radius, laplace_radius, vote_bounds
from learn2perturb.certification.record import largest_radius, lower_bound, radius_of
from learn2perturb.errors import CheckpointError
from learn2perturb.records import PackedIntegers

N, ALPHA, SIGMA = 100, 0.05, 0.5
VOTES = np.array([100, 90, 70, 40])
RADII = tuple(float(radius) for radius in radius_of(lower_bound(VOTES, N, ALPHA), 1 / SIGMA))
LARGEST = largest_radius(N, ALPHA, 1 / SIGMA)


def record(**changes: Any) -> Certification:
    """Four images: two certified rightly, one wrongly, one abstention."""
    values: dict[str, Any] = {
        "method": "smoothing", "norm": "l2", "constant": 1 / SIGMA, "exact": True, "site": None, "sigma": SIGMA,
        "n0": 10, "n": N, "alpha": ALPHA, "eps": 0.1, "pixels": 4, "largest": LARGEST, "labels": [0, 1, 2, 0],
        "predictions": [0, 1, 0, -1], "votes": VOTES, "radii": RADII, "num_classes": 3, "seed": 0,
    }  # fmt: skip
    values |= changes
    for name in ("labels", "predictions", "votes"):
        values[name] = PackedIntegers.pack(np.asarray(values[name]))
    return Certification(**values)


def test_shares_count_right_images_with_that_radius():
    found = record()
    assert found.abstained == 0.25
    assert found.accuracy_at(0) == 0.5  # the third is certified, but of a wrong class
    assert found.accuracy_at(RADII[1]) == 0.5  # a radius holds at itself
    assert found.accuracy_at(RADII[1] + 1e-9) == 0.25
    assert found.accuracy_at(RADII[0]) == 0.25
    assert found.accuracy_at(RADII[0] + 1e-9) == 0


def test_the_curve_goes_up_to_the_largest_radius_that_was_certified():
    found = record()
    curve = found.curve()
    assert [radius for radius, _ in curve] == pytest.approx(list(np.linspace(0, RADII[0], 21)))
    assert [share for _, share in curve] == [found.accuracy_at(radius) for radius, _ in curve]
    assert found.curve([0.0, 9.0]) == ((0.0, 0.5), (9.0, 0.0))
    none = record(predictions=[-1] * 4, votes=[50] * 4, radii=(0.0,) * 4)
    assert [radius for radius, _ in none.curve()] == pytest.approx(list(np.linspace(0, 1e-9, 21)), abs=1e-12)


def test_the_radius_that_is_needed_covers_the_ball():
    assert record(eps=0.1, pixels=9).needed == pytest.approx(0.3)
    assert record(eps=0.1, pixels=9, norm="l1").needed == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (RADII[1], "Against l_inf {size} an l2 radius of {needed:.3f} is needed: 50.0 % are certified."),
        (LARGEST, "Against l_inf {size} an l2 radius of {needed:.3f} is needed: 25.0 % are certified."),
        (
            LARGEST + 0.01,
            (
                "VACUOUS against l_inf {size}: against l_inf {size} an l2 radius of {needed:.3f} is needed, and no "
                "image can be certified beyond {largest:.3f}, even if all 100 draws agree."
            ),
        ),
    ],
)
def test_the_statement_says_what_is_vacuous(needed, words):
    said = record(eps=needed, pixels=1).statement
    assert said == words.format(size=f"{needed:.6g}", needed=needed, largest=LARGEST)


def test_the_statement_says_that_no_image_reached_what_could_be():
    radii = radius_of(lower_bound([90] * 4, N, ALPHA), 1 / SIGMA)
    found = record(votes=[90] * 4, radii=tuple(radii), predictions=[0, 1, 0, 0], eps=float(radii[0]) + 0.01, pixels=1)
    assert found.largest > found.needed
    assert found.statement.startswith("VACUOUS against l_inf ")
    assert found.statement.endswith("is needed, and no image reached it.")


def test_the_printed_record():
    found = record(eps=RADII[2], pixels=1, metadata={"model": "mine"})
    assert str(found).splitlines() == [
        "mine: 4 images, smoothing, S = 2, n0 = 10, n = 100, alpha = 0.05",
        f"abstained: 25.0 %; largest radius that n draws can certify: {LARGEST:.4f}",
        "",
        "l2 radius   certified accuracy %",
        "   0.0000    50.00 [15.00, 85.00]",
        f"   {RADII[2]:.4f}    50.00 [15.00, 85.00]",
        f"   {0.25 * RADII[0]:.4f}    50.00 [15.00, 85.00]",
        f"   {0.5 * RADII[0]:.4f}    50.00 [15.00, 85.00]",
        f"   {0.75 * RADII[0]:.4f}    25.00 [4.56, 69.94]",
        "",
        found.statement,
        "The certificate is of the majority vote over many draws, not of a single draw.",
    ]
    bounded = str(record(method="first_noise", exact=False, site="norm", sigma=None))
    assert bounded.startswith("model: 4 images, first_noise at 'norm', S <= 2, n0")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 3, "labels": [0, 1, 2, 2]},
        {"votes": [100, 100, 0, 50], "predictions": [0, 2, -1, -1], "radii": (LARGEST, LARGEST, 0.0, 0.0)},
        {"radii": tuple(radius + 0.9e-6 * (radius > 0) for radius in RADII)},
        {"radii": tuple(radius - 0.9e-6 * (radius > 0) for radius in RADII)},
        {"largest": LARGEST + 0.9e-6},
        {"method": "first_noise", "sigma": None},
        {"constant": 0.5, "sigma": 2.0, "radii": tuple(4 * radius for radius in RADII), "largest": 4 * LARGEST},
        {"n": 1, "votes": [1, 1, 1, 0], "alpha": 0.05, "largest": 0.0, "predictions": [-1] * 4, "radii": (0.0,) * 4},
    ],
)
def test_what_the_votes_give_is_taken(changes):
    record(**changes)._check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": [0, 1, 2]}, "are not one for each image"),
        ({"predictions": [0, 1, 0]}, "are not one for each image"),
        ({"votes": VOTES[:3]}, "are not one for each image"),
        ({"radii": RADII[:3]}, "are not one for each image"),
        ({"labels": [], "predictions": [], "votes": [], "radii": ()}, "are not one for each image"),
        ({"method": "cohen"}, "none that a certificate can have"),
        ({"n": 0}, "none that a certificate can have"),
        ({"alpha": 0.0}, "none that a certificate can have"),
        ({"alpha": 1.0}, "none that a certificate can have"),
        ({"constant": 0.0}, "none that a certificate can have"),
        ({"constant": -2.0}, "none that a certificate can have"),
        ({"constant": math.nan}, "none that a certificate can have"),
        ({"sigma": None}, "the constant is 2, and that of sigma"),
        ({"sigma": 0.0}, "the constant is 2, and that of sigma"),
        ({"sigma": 0.51}, "the constant is 2, and that of sigma"),
        ({"labels": [0, 1, 3, 0]}, "a label lies outside of 0 to 2"),
        ({"labels": [0, 1, -1, 0]}, "a label lies outside of 0 to 2"),
        ({"predictions": [0, 1, 3, -1]}, "a prediction lies outside of -1 to 2"),
        ({"predictions": [0, 1, -2, -1]}, "a prediction lies outside of -1 to 2"),
        ({"votes": [101, 90, 70, 40]}, "a number of votes lies outside of 0 to 100"),
        ({"votes": [100, 90, 70, -1]}, "a number of votes lies outside of 0 to 100"),
        ({"radii": (RADII[0], RADII[1] + 1.5e-6, *RADII[2:])}, "image 1 has radius .* its 90 of 100 votes give"),
        ({"radii": (RADII[0], RADII[1] - 1.5e-6, *RADII[2:])}, "image 1 has radius"),
        ({"radii": (RADII[0], RADII[1], 0.0, 0.1)}, "image 2 has radius"),
        ({"largest": LARGEST + 1.5e-6}, "the largest radius is"),
        ({"largest": LARGEST - 1.5e-6}, "the largest radius is"),
        ({"predictions": [0, 1, -1, -1]}, "an image without a radius has a certified class"),
        ({"predictions": [0, 1, 0, 0]}, "an image without a radius has a certified class"),
    ],
)
def test_what_no_votes_can_give_is_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        record(**changes)._check()
    assert "restore the file or certify again" in str(caught.value)


def _pixeldp(votes: list[int], norm: str) -> tuple[float, float]:
    """Return the radius of one image by its full votes, and that of an image on which all draws agree."""
    rule = laplace_radius if norm == "l1" else gaussian_dp_radius
    radii = rule(*vote_bounds([votes, [N, 0, 0, 0]], ALPHA, top=[0, 0]), sigma=1.0, sensitivity=2.0)
    return float(radii[0]), float(radii[1])


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("others", [[8, 0, 0], [3, 3, 2], [6, 0, 0], [2, 2, 2]])
def test_pixeldp_allows_the_radii_of_every_split_of_the_other_votes_and_no_other(others, norm):
    """The least is that of all others for one class, the most that of others spread evenly."""
    rest = sum(others)
    radius, largest = _pixeldp([N - rest, *others], norm)
    changes: dict[str, Any] = {
        "method": "pixeldp", "norm": norm, "sigma": None, "num_classes": 4, "labels": [0], "predictions": [0],
        "votes": [N - rest], "largest": largest,
    }  # fmt: skip
    record(**changes, radii=(radius,))._check()
    beyond = radius - 2e-6 if max(others) == rest else radius + 2e-6
    with pytest.raises(CheckpointError, match="image 0 has radius"):
        record(**changes, radii=(beyond,))._check()
    with pytest.raises(CheckpointError, match="the largest radius"):
        record(**changes | {"largest": largest + 2e-6}, radii=(radius,))._check()


def test_a_record_of_no_metadata_compares_equal_after_its_file(tmp_path):
    found = record()
    assert dataclasses.replace(found).metadata == {}
    assert Certification.load(found.save(tmp_path / "c.json")) == found
    assert (Certification.FORMAT, Certification.VERSION) == ("learn2perturb.certification", 1)


def test_the_bound_of_no_success_is_zero_and_needs_no_warning():
    assert lower_bound([0], 10, 0.05).tolist() == [0.0]
    assert radius_of([0.0, 1.0], 2.0).tolist() == [0.0, math.inf]
