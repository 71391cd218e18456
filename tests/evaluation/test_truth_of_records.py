"""A record is what its raw bits say, and names what it is of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD, Transfer
from learn2perturb.certification import Certification, certify
from learn2perturb.certification.bounds import gaussian_dp_radius, laplace_radius, vote_bounds
from learn2perturb.data import load_data
from learn2perturb.diagnosis import QUICK, diagnose
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation, evaluate
from learn2perturb.evaluation.intervals import accuracy_interval, bootstrap_mean
from learn2perturb.models import build_model
from learn2perturb.records import PackedIntegers

X, Y = torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2

FEW = dataclasses.replace(
    QUICK, images=30, some=6, scorings=2, eot=1, sweep_eot=1, steps=2, unbounded_steps=4, samples=2, judge_draws=2,
    eps_grid=(0.1, 0.2), draw_curve=(1, 4), step_curve=(2, 4), restarts=1, square_queries=4, square_draws=1,
    slope_images=2, slope_repeats=4,
)  # fmt: skip


def noisy(x: Tensor) -> Tensor:
    score = x.flatten(1).mean(1, keepdim=True) + 0.1 * torch.randn(len(x), 1)
    return torch.cat([score, 0.5 + 0 * score], dim=1)


@pytest.fixture(scope="module")
def record() -> Evaluation:
    return evaluate(noisy, (X, Y), {"pgd": PGD(0.1, 0.05, 2)}, draws=4)


def test_a_true_record_loads(record, tmp_path):
    assert Evaluation.load(record.save(tmp_path / "a.json")) == record


def first_version(record: Evaluation, moved: float = 0.0) -> Evaluation:
    """The same as it was recorded before: a bootstrap over images, and nothing of the passes."""
    rows = []
    for row in record.rows:
        drawn = bootstrap_mean(row.correct.unpack().mean(axis=0), 2000, record.seed).interval
        rows.append(dataclasses.replace(row, interval=dataclasses.replace(drawn, low=drawn.low + moved)))
    return dataclasses.replace(record, rows=tuple(rows), resamples=2000, batches=None)


_FIRST_INTERVAL = ("low", "high", "confidence", "method", "resamples")


def written_as_first(record: Evaluation, path: Path) -> Path:
    payload = json.loads(record.save(path).read_text())
    fields = {key: value for key, value in payload.items() if key not in ("checksum", "batches")} | {"version": 1}
    for row in fields["rows"]:
        for holder in (row, *row["pooled"]):
            holder["interval"] = {key: holder["interval"][key] for key in _FIRST_INTERVAL}
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("moved", [0.0, 1e-3])  # a bootstrap drawn elsewhere differs a little
def test_a_record_of_the_first_version_loads_with_the_interval_of_its_bits(moved, record, tmp_path):
    loaded = Evaluation.load(written_as_first(first_version(record, moved), tmp_path / "old.json"))
    for row, new in zip(loaded.rows, record.rows, strict=True):
        assert row.interval == accuracy_interval(row.correct.unpack())
        assert (row.interval.method, row.accuracy) == ("two-way", new.accuracy)
    assert Evaluation.load(loaded.save(tmp_path / "again.json")) == loaded


def test_a_record_of_the_first_version_is_still_checked(record, tmp_path):
    with pytest.raises(CheckpointError, match="interval"):
        Evaluation.load(written_as_first(first_version(record, 0.2), tmp_path / "forged.json"))


@pytest.mark.parametrize("field", ["accuracy", "std", "interval", "worst_of", "pooled", "n", "draws"])
def test_a_number_that_contradicts_the_bits_is_refused(field, record, tmp_path):
    row = record.rows[1]
    false = {
        "accuracy": row.accuracy + 0.01,
        "std": 0.001,
        "interval": dataclasses.replace(row.interval, low=row.interval.low + 0.2),
        "worst_of": row.worst_of | {1: row.worst_of[1] + 0.01},
        "pooled": tuple(dataclasses.replace(one, accuracy=one.accuracy + 0.01) for one in row.pooled),
        "n": row.n + 1,
        "draws": row.draws + 1,
    }[field]
    forged = dataclasses.replace(record, rows=(record.rows[0], dataclasses.replace(row, **{field: false})))
    path = forged.save(tmp_path / "forged.json")
    with pytest.raises(CheckpointError, match="pgd") as caught:
        Evaluation.load(path)
    assert "\n" not in str(caught.value)


def test_a_record_names_the_weights(tmp_path):
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2))
    hashes = [evaluate(network, (X, Y)).metadata["weights"] for network in (one, one, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    sources = [evaluate(noisy, (X, Y), {"t": Transfer(0.1, source=s, attack=PGD(0.1, 0.05, 1))}) for s in (one, other)]
    assert sources[0].rows[1].parameters != sources[1].rows[1].parameters


def test_no_scoring_sees_a_draw_of_the_attack():
    drawn: list[tuple[float, ...]] = []

    def model(x: Tensor) -> Tensor:
        noise = torch.rand(len(x))
        drawn.append(tuple(noise.tolist()))
        return torch.stack([x.flatten(1).mean(1) + noise, torch.ones(len(x))], dim=1)

    evaluate(model, (X, Y), {"pgd": PGD(0.1, 0.05, 3, eot=2, random_start=False)}, draws=3)
    probes = 7  # what tells whether the model draws, and whether seeds decide it, repeats a stream on purpose
    assert len(set(drawn[probes:])) == len(drawn[probes:])


def certified(method: str) -> Certification:
    """A certification of some images, of which some abstained."""
    if method == "smoothing":
        return certify(lambda x: torch.stack([x.flatten(1).mean(1), 0.5 + 0 * x[:, 0, 0, 0]], 1), (X, Y),
                       sigma=0.5, n0=10, n=60)  # fmt: skip
    from learn2perturb.defenses import build_defense

    torch.manual_seed(0)
    network = build_defense("pixeldp").prepare(build_model("digits_cnn", input_shape=(1, 8, 8)), (1, 8, 8)).eval()
    with torch.no_grad():
        network.fc.bias[0] += 4  # all votes agree: then the other votes are known, and so is the radius
    return certify(network, load_data("digits", "test", limit=6), method="pixeldp", n0=20, n=200, alpha=0.05)


@pytest.fixture(scope="module", params=["smoothing", "pixeldp"])
def certificates(request) -> Certification:
    return certified(request.param)


@pytest.mark.parametrize("field", ["radius", "largest", "votes", "abstained", "class", "constant", "alpha", "n"])
def test_a_certificate_that_contradicts_its_votes_is_refused(field, certificates, tmp_path):
    assert Certification.load(certificates.save(tmp_path / "true.json")) == certificates
    radii, predictions = list(certificates.radii), certificates.predictions.unpack()
    first = next(index for index, radius in enumerate(radii) if radius > 0)
    radii[first] *= 2
    votes = certificates.votes.unpack()
    votes[first] = certificates.n // 2
    predictions[first] = -1 if field == "abstained" else 99
    forged = dataclasses.replace(
        certificates,
        **{
            "radius": {"radii": tuple(radii)},
            "largest": {"largest": certificates.largest * 2},
            "votes": {"votes": PackedIntegers.pack(votes)},
            "abstained": {"predictions": PackedIntegers.pack(predictions)},
            "class": {"predictions": PackedIntegers.pack(predictions)},
            "constant": {"constant": certificates.constant * 2},
            "alpha": {"alpha": certificates.alpha * 10},
            "n": {"n": certificates.n * 2},
        }[field],
    )
    path = forged.save(tmp_path / "forged.json")
    with pytest.raises(CheckpointError, match="certify again") as caught:
        Certification.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_any_split_of_the_other_votes_is_within_the_range_of_pixeldp(norm):
    draws = np.random.default_rng(0)
    votes = np.stack([draws.multinomial(200, [0.7 + 0.28 * share, *[(0.3 - 0.28 * share) / 4] * 4])
                      for share in draws.random(40)])  # fmt: skip
    rule = laplace_radius if norm == "l1" else gaussian_dp_radius
    radii = rule(*vote_bounds(votes, 0.05, top=np.zeros(40, dtype=np.int64)), sigma=1.0, sensitivity=2.0)
    counts = votes[:, 0]
    found = Certification(
        method="pixeldp", norm=norm, constant=2.0, exact=True, site=None, sigma=None, n0=1, n=200, alpha=0.05, eps=0.1,
        pixels=4, largest=0.0, labels=PackedIntegers.pack(0 * counts), predictions=PackedIntegers.pack(0 * counts),
        votes=PackedIntegers.pack(counts), radii=tuple(map(float, radii)), num_classes=5, seed=0,
    )  # fmt: skip
    unanimous = rule(*vote_bounds([[200, 0, 0, 0, 0]], 0.05, top=[0]), sigma=1.0, sensitivity=2.0)
    true = dataclasses.replace(
        found, largest=float(unanimous[0]), predictions=PackedIntegers.pack(np.where(radii > 0, 0, -1))
    )
    assert (radii > 0).any() and (radii < true.largest).all()
    true._check()
    with pytest.raises(CheckpointError, match="image 5 has radius"):
        dataclasses.replace(true, radii=(*true.radii[:5], true.largest * 1.01, *true.radii[6:]))._check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"radii": (0.1,)}, "not one for each image"),
        ({"method": "magic"}, "none that a certificate can have"),
        ({"alpha": 1.0}, "none that a certificate can have"),
        ({"sigma": 0.25}, "the constant is 2, and that of sigma"),
        ({"sigma": None}, "the constant is 2, and that of sigma"),
    ],
)
def test_settings_that_no_certificate_has_are_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        dataclasses.replace(certified("smoothing"), **changes)._check()


def test_certifications_and_diagnoses_name_weights_and_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    one, other = (certify(network, (X, Y), sigma=0.5, n0=5, n=20, limit=limit) for limit in (None, 10))
    evaluated = evaluate(network, (X, Y))
    assert one.metadata["weights"] == other.metadata["weights"] == evaluated.metadata["weights"] is not None
    assert one.metadata["images"] == evaluated.metadata["images"] != other.metadata["images"]
    found = diagnose(network, (X, Y), budget=FEW)
    assert found.metadata["weights"] == evaluated.metadata["weights"]
    assert found.metadata["images"] == evaluated.metadata["images"]
