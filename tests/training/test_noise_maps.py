"""Maps of the scale of the noise: small, true to the scale, kept by a training, refused where they are damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

import learn2perturb as l2p
from learn2perturb.errors import CheckpointError
from learn2perturb.noise import named_noise
from learn2perturb.runs.files import locate, look
from learn2perturb.runs.noise_maps import FILE, MOST_SIDE, MOST_STRIP, NoiseMap, NoiseMaps


@pytest.mark.parametrize(
    ("shape", "size", "averaged"),
    [
        ((3, 4, 5), (4, 5), "channels"),
        ((2, 40, 40), (MOST_SIDE, MOST_SIDE), "channels and blocks"),
        ((7, 1, 1), (1, 7), ""),
        ((200, 1, 1), (1, MOST_STRIP), "blocks"),
        ((6, 3, 3, 3), (6, 3), "the kernel"),
        ((5, 8), (5, 8), ""),
        ((1,), (1, 1), ""),
        ((), (1, 1), ""),
    ],
)
def test_a_map_has_the_numbers_of_the_scale(shape, size, averaged):
    scale = np.random.default_rng(0).random(shape)
    found = NoiseMap.of("theta", "bn1", scale)
    assert (len(found.values), len(found.values[0])) == size and found.averaged == averaged
    told = found.mean, found.spread, found.minimum, found.maximum
    assert told == pytest.approx((scale.mean(), scale.std(), scale.min(), scale.max()), rel=1e-4)
    if shape == (3, 4, 5):
        assert np.array(found.values) == pytest.approx(scale.mean(axis=0), rel=1e-4)
    if shape == (2, 40, 40):
        assert found.values[0][0] == pytest.approx(scale[:, :3, :3].mean(), rel=1e-4)


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_training_leaves_the_maps_of_the_network_it_leaves(average, tmp_path):
    config = l2p.TrainConfig(
        defense="learn2perturb", model="digits_cnn", dataset="digits", recipe="fast", epochs=1, limit=16, batch_size=8,
        weight_average=average,
    )  # fmt: skip
    run = l2p.train(config, out=tmp_path / "run", progress=False)
    kept = {one.site: one for one in NoiseMaps.load(tmp_path / "run" / FILE).sites}
    learned = {site: module.scale()[1] for site, module in named_noise(run.model) if module.noise_parameters()}
    assert kept.keys() == learned.keys() != set()
    for site, scale in learned.items():
        assert kept[site].shape == tuple(scale.shape)
        assert kept[site].mean == pytest.approx(scale.mean().item(), rel=1e-4)
    assert NoiseMaps.load(tmp_path / "run" / FILE).weights == look(locate(tmp_path / "run")).fingerprint
    before = (tmp_path / "run" / FILE).read_bytes()
    (tmp_path / "run" / FILE).unlink()
    l2p.train(config, out=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / FILE).read_bytes() == before, "the same command writes what an older run lacks"


@pytest.mark.parametrize("values", [[], [[]], [[1.0], [1.0, 2.0]], [[1.0] * 65], [[1.0]] * 17])
def test_maps_of_an_odd_shape_are_refused(values, tmp_path):
    path = NoiseMaps.of({"theta/bn1": np.ones((2, 2, 2))}).save(tmp_path / FILE)
    content = json.loads(path.read_text())
    content.pop("checksum", None)
    content["sites"][0]["values"] = values
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="train again"):
        NoiseMaps.load(path)
