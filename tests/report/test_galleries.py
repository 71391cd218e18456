"""The galleries of a page show the images that are kept beside a record, with the votes that the record holds."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest

import learn2perturb as l2p
from learn2perturb.attacks import PGD
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import ImageKeeper
from learn2perturb.evaluation.attacked import beside, broken_and_held, eight_bits
from learn2perturb.report import galleries
from learn2perturb.report.page import page
from tests.report.test_report import data_of, images, noisy


def evaluated(folder, name="mine", each=3, **settings):
    """Save a record with its images; return both, and where the record is."""
    keeper = ImageKeeper(each)
    attacks = {"pgd": PGD(0.1, 0.05, 2), "weak": PGD(0.01, 0.01, 1)}
    found = l2p.evaluate(noisy, images(), attacks, draws=5, name=name, images=keeper, progress=False, **settings)
    path = found.save(folder / "a.json")
    keeper.found.save(beside(path))
    return found, keeper.found, path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("kept"))


def test_votes_and_kinds_are_those_of_the_record(kept):
    found, _, path = kept
    (gallery,) = data_of(page(path))["galleries"]
    row, clean = found.row("pgd"), found.row("clean").predictions.unpack()
    assert gallery["row"] == row.label, "what leaves least"
    answers, labels = row.predictions.unpack(), found.labels.unpack()
    kinds = dict(zip(galleries.KINDS, broken_and_held(answers, labels, clean), strict=True))
    assert {shot["kind"] for shot in gallery["shots"]} == {"broken", "held"}
    for kind, those in kinds.items():
        assert [shot["index"] for shot in gallery["shots"] if shot["kind"] == kind] == list(np.flatnonzero(those)[:3])
    for shot in gallery["shots"]:
        number = shot["index"]
        assert shot["label"] == str(labels[number])
        for name, votes in (("votes", answers), ("clean_votes", clean)):
            classes, counts = np.unique(votes[:, number], return_counts=True)
            assert shot[name] == {str(one): count for one, count in zip(classes, counts, strict=True)}


def test_the_pictures_are_the_kept_images(kept):
    from PIL import Image

    _, images_kept, path = kept
    text = page(path)
    row = images_kept.row("pgd 0.1")
    by_words = dict(re.findall(r'<img src="data:image/png;base64,[^"]*" alt="([^"]*)"()', text))
    assert len(by_words) == 3 * len(row.index)
    for place, number in enumerate(row.index):
        for word, source in (("clean", images_kept.clean[images_kept.places(row)]), ("attacked", row.adversarial)):
            (content,) = re.findall(rf'base64,([^"]*)" alt="image {number}, \d: {word}"', text)
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
            assert (shown == eight_bits(source[place])[0]).all()


def test_images_of_another_record_are_left_out_and_said(kept, tmp_path):
    _, images_kept, _ = kept
    other = l2p.evaluate(noisy, images(), {"pgd": PGD(0.1, 0.05, 2)}, draws=5, name="mine", seed=9, progress=False)
    path = other.save(tmp_path / "b.json")
    images_kept.save(beside(path))
    text = page(path)
    assert data_of(text)["galleries"] == []
    assert "b.images.npz is not of the record beside it" in text


def test_damaged_images_are_refused_in_a_line(kept, tmp_path):
    found, _, path = kept
    other = found.save(tmp_path / "a.json")
    beside(other).write_bytes(beside(path).read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"a\.images\.npz.*remove it"):
        page(other)


def test_what_has_no_room_is_left_out_and_counted(kept, monkeypatch):
    monkeypatch.setattr(galleries, "ROOM", 1000)
    text = page(kept[2])
    (gallery,) = data_of(text)["galleries"]
    assert 0 < len(gallery["shots"]) < 6
    assert f"{len(gallery['shots'])} of 6 are shown" in text
    assert {shot["kind"] for shot in gallery["shots"]} == {"broken", "held"}
    monkeypatch.setattr(galleries, "ROOM", 0)
    assert data_of(page(kept[2]))["galleries"] == []


def test_without_a_clean_row_there_are_no_clean_votes(tmp_path):
    _, images_kept, path = evaluated(tmp_path, clean=False)
    shots = data_of(page(path))["galleries"][0]["shots"]
    assert len(shots) == len(images_kept.row("pgd 0.1").index)
    assert all(shot["clean_votes"] == {} for shot in shots)
