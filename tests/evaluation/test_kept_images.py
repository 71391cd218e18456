"""Attacked images that an evaluation keeps: which, exactly what, how they are read again, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from learn2perturb.attacks import FGSM, PGD
from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.evaluation import AttackedImages, Evaluation, ImageKeeper, Unfinished, evaluate
from learn2perturb.evaluation.attacked import AttackedRow, beside, broken_and_held, eight_bits, rule
from learn2perturb.evaluation.pictures import amplification, difference, png, save_sheets, sheet
from learn2perturb.records import PackedIntegers
from tests.foreign import write_network

ATTACKS = {"one": FGSM(0.1), "more": PGD(0.1, 0.05, 2)}


class Noisy(nn.Module):
    """A linear classifier with noise on its logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits = self.inner(x)
        return logits + 0.2 * torch.randn_like(logits)


def noisy(seed=0):
    torch.manual_seed(seed)
    return Noisy(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))


def images(n=40):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = noisy().inner(x).argmax(dim=1)
    return x, y


def kept(each=2, data=None, **settings):
    keeper = ImageKeeper(each)
    found = evaluate(
        noisy(), images() if data is None else data, ATTACKS, draws=5, batch_size=16, images=keeper, progress=False,
        **settings,
    )  # fmt: skip
    return found, keeper.found


@pytest.fixture(scope="module")
def both():
    return kept()


def test_the_first_broken_and_held_images_of_each_row_are_kept(both):
    found, images_kept = both
    labels, clean = found.labels.unpack(), found.row("clean").predictions.unpack()
    assert [row.label for row in images_kept.rows] == [row.label for row in found.rows if row.attack != "clean"]
    for row in images_kept.rows:
        answers = images_kept.row_of(found, row).predictions.unpack()
        broken, held = broken_and_held(answers, labels, clean)
        expected = sorted([*np.flatnonzero(broken)[:2], *np.flatnonzero(held)[:2]])
        assert row.index.tolist() == expected and len(expected) == 4, "a row with both kinds"
        assert (row.predictions == answers[:, row.index]).all()
        assert (row.clean_predictions == clean[:, row.index]).all()
    assert "the first 2 images that are broken" in images_kept.about["rule"]


@pytest.mark.parametrize(("each", "clean", "right_before", "start"), [
    (2, True, 2, "the first 2 images"), (3, False, 0, "the first 3 images"), (None, True, 0, "all images"),
    (None, False, 0, "all images"),
])  # fmt: skip
def test_the_rule_says_right_before_only_where_clean_images_were_scored(each, clean, right_before, start):
    said = rule(each, clean)
    assert said.count("right in most scorings of the clean row") == right_before and said.startswith(start)


def test_broken_was_right_before_and_a_tie_is_neither():
    labels = np.zeros(4, dtype=np.int64)
    attacked = np.array([[0, 1, 1, 0], [0, 1, 1, 1]])  # right always, never, never, half of the time
    clean = np.array([[0, 0, 1, 0], [0, 0, 0, 0]])  # the third is right half of the time only
    broken, held = broken_and_held(attacked, labels, clean)
    assert broken.tolist() == [False, True, False, False] and held.tolist() == [True, False, False, False]
    broken, held = broken_and_held(attacked, labels)
    assert broken.tolist() == [False, True, True, False] and held.tolist() == [True, False, False, False]


def test_the_images_are_exactly_those_that_were_scored(both):
    """Another model without noise answers to the kept images as it does under the same attack."""
    plain, data = noisy().inner, images()
    keeper = ImageKeeper(None)
    found = evaluate(plain, data, {"one": FGSM(0.1)}, images=keeper, progress=False)
    adversarial, labels = keeper.found.data("one 0.1")
    assert (keeper.found.clean == data[0].numpy()).all() and (labels == data[1].numpy()).all()
    assert adversarial.dtype == np.float32
    assert np.abs(adversarial - keeper.found.clean).max() == pytest.approx(0.1, abs=1e-6)
    again = evaluate(plain, keeper.found.data("one 0.1"), progress=False)
    assert (again.row("clean").predictions.unpack() == found.row("one").predictions.unpack()).all()


def test_the_numbers_are_those_of_an_evaluation_that_keeps_nothing(both):
    plain = evaluate(noisy(), images(), ATTACKS, draws=5, batch_size=16, progress=False)
    assert [row.predictions for row in plain.rows] == [row.predictions for row in both[0].rows]


@pytest.mark.parametrize("clean", [True, False])
def test_a_loader_is_read_once_and_its_images_are_kept(clean):
    data = torch.utils.data.TensorDataset(*images())
    found, from_loader = kept(data=torch.utils.data.DataLoader(data, batch_size=16), clean=clean)
    assert from_loader.misfit(found) is None
    x, y = images()
    assert (from_loader.clean == x[from_loader.index].numpy()).all()
    assert (from_loader.labels == y[from_loader.index].numpy()).all()
    assert all((row.clean_predictions is None) == (not clean) for row in from_loader.rows)


class Augmented(torch.utils.data.TensorDataset):
    """Gives another image each time, by a generator that nobody seeds."""

    own = random.Random(0)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x ** (1 + self.own.random()), y


def test_kept_images_of_a_loader_that_augments_are_those_that_were_attacked():
    _, found = kept(each=None, data=torch.utils.data.DataLoader(Augmented(*images()), batch_size=16))
    assert len(found.rows) == len(ATTACKS) and len(found.clean) == 40
    for row in found.rows:
        assert np.abs(row.adversarial - found.clean).max() <= 0.1 + 1e-6


def test_a_few_chosen_of_all_are_those_that_are_kept_at_once(both):
    found, few = both
    _, every = kept(each=None)
    chosen = every.chosen(2)
    assert len(every.index) == 40 > len(few.index) and chosen.misfit(found) is None
    assert dict(chosen.about) == dict(few.about)
    for name in ("index", "labels", "clean"):
        assert np.array_equal(getattr(chosen, name), getattr(few, name))
    for one, other in zip(chosen.rows, few.rows, strict=True):
        for name in ("index", "adversarial", "predictions", "clean_predictions"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_without_an_attack_there_are_no_images(tmp_path):
    keeper = ImageKeeper(2)
    record = evaluate(noisy(), images(4), draws=2, images=keeper, progress=False)
    again = AttackedImages.load(keeper.found.save(tmp_path / "none.npz"))
    for found in (keeper.found, again, again.chosen(1)):
        assert (found.rows, found.index.tolist(), found.labels.tolist(), len(found.clean)) == ((), [], [], 0)
        assert found.misfit(record) is None and "clean row" not in found.about["rule"]


def test_what_is_saved_is_read_again(both, tmp_path):
    found, images_kept = both
    path = images_kept.save(beside(found.save(tmp_path / "a.json")))
    assert path.name == "a.images.npz"
    again = AttackedImages.load(path)
    assert again.misfit(Evaluation.load(tmp_path / "a.json")) is None
    assert dict(again.about) == dict(images_kept.about)
    for one, other in zip(images_kept.rows, again.rows, strict=True):
        assert (one.adversarial == other.adversarial).all() and one.adversarial.dtype == other.adversarial.dtype
        assert (again.data(one.label)[1] == images_kept.data(one.label)[1]).all()
    with np.load(path) as arrays:  # by numpy alone
        assert (arrays["adversarial_8bit_0"] == np.round(255 * arrays["adversarial_0"])).all()
    with pytest.raises(ConfigError, match="there are"):
        again.data("other")


def changed(path, **changes):
    """Write the arrays of a file with some changed, or left out."""
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adversarial_0", lambda array: 1 - array),
        ("adversarial_0", lambda array: array[1:]),
        ("clean", lambda array: array * np.nan),
        ("clean", lambda array: array[0]),
        ("index", lambda array: array[::-1]),
        ("index_0", lambda array: array + 1000),
        ("labels", lambda array: array.astype(float)),
        ("predictions_0", lambda array: array[:, 1:]),
        ("about", lambda array: array[:-1]),
        ("about", lambda array: np.array([{}], dtype=object)),
        ("clean_8bit", lambda array: None),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(name, change, both, tmp_path):
    path = both[1].save(tmp_path / "a.images.npz")
    with np.load(path) as found:
        changed_array = change(found[name])
    changed(path, **{name: changed_array})
    with pytest.raises(CheckpointError, match=r"a.images.npz.*evaluate again") as refusal:
        AttackedImages.load(path)
    assert "\n" not in str(refusal.value)


def test_what_is_no_such_file_is_refused(tmp_path, both):
    path = tmp_path / "a.images.npz"
    with pytest.raises(CheckpointError, match="No such file"):
        AttackedImages.load(path)
    content = both[1].save(path).read_bytes()
    for text in (b"", content[:300], content[:-30], b"{}"):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            AttackedImages.load(path)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", bytes(1000))
    path.write_bytes(bomb.getvalue())
    with pytest.raises(CheckpointError, match="compressed"):
        AttackedImages.load(path)


def test_images_of_another_evaluation_are_told(both):
    _, images_kept = both
    other = evaluate(noisy(1), images(), ATTACKS, draws=5, batch_size=16, progress=False)
    assert "weights" in images_kept.misfit(other)
    seeded = evaluate(noisy(), images(), ATTACKS, draws=5, batch_size=16, seed=3, progress=False)
    assert "seed" in images_kept.misfit(seeded)


class Stopped(Exception):
    """What ends an evaluation in the middle."""


def test_an_evaluation_that_goes_on_has_all_images(tmp_path, both):
    def stop(done, total, label):
        if label.startswith("more") and done:
            raise Stopped

    settings = {"draws": 5, "batch_size": 16}
    with pytest.raises(Stopped), Unfinished(tmp_path) as keep:
        evaluate(noisy(), images(), ATTACKS, keep=keep, images=ImageKeeper(2), progress=stop, **settings)
    assert len(list(tmp_path.glob("*.images.npz"))) == 1
    seen = set()
    with Unfinished(tmp_path) as keep:
        keeper = ImageKeeper(2)
        found = evaluate(
            noisy(), images(), ATTACKS, keep=keep, images=keeper,
            progress=lambda done, total, label: seen.add(label.split()[0]), **settings,
        )  # fmt: skip
    assert seen == {"more"}, "the other rows are not computed again"
    assert keeper.found.misfit(found) is None
    for one, other in zip(keeper.found.rows, both[1].rows, strict=True):
        assert (one.adversarial == other.adversarial).all()
    assert list(tmp_path.iterdir()) == []


def test_lost_images_of_finished_rows_are_made_again(tmp_path, both):
    settings = {"draws": 5, "batch_size": 16}
    keep = Unfinished(tmp_path)
    evaluate(noisy(), images(), ATTACKS, keep=keep, images=ImageKeeper(2), progress=False, **settings)
    next(tmp_path.glob("*.images.npz")).unlink()
    keeper = ImageKeeper(2)
    evaluate(noisy(), images(), ATTACKS, keep=Unfinished(tmp_path), images=keeper, progress=False, **settings)
    assert [row.index.tolist() for row in keeper.found.rows] == [row.index.tolist() for row in both[1].rows]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_number_of_channels(channels):
    from PIL import Image

    image = np.arange(channels * 6, dtype=np.uint8).reshape(channels, 2, 3)
    shown = Image.open(io.BytesIO(png(image)))
    assert shown.size == (3, 2) and shown.mode == ("RGB" if channels == 3 else "L")


def test_the_largest_difference_is_as_bright_as_can_be():
    clean = np.full((1, 1, 1, 2), 0.5)
    adversarial = clean + np.array([0.1, -0.05])
    assert amplification(clean, adversarial) == 5
    assert difference(clean[0], adversarial[0], 5)[0, 0].tolist() == [255, eight_bits(np.array(0.25))]
    assert amplification(clean, clean) == 1


def test_a_sheet_of_each_row(both):
    from PIL import Image

    assert Image.open(io.BytesIO(sheet(both[1], both[1].rows[0]))).size == (3 * 68, 4 * 68)


def test_a_sheet_shows_clean_attacked_and_difference_side_by_side_enlarged():
    from PIL import Image

    clean = np.zeros((2, 1, 40, 40))
    clean[:, :, :, 20:] = 1.0
    adversarial = clean + np.where(clean > 0, -0.25, 0.125)
    row = AttackedRow({"label": "pgd 8/255"}, np.array([4, 7]), adversarial, np.array([[1, 0]]), None)
    images = AttackedImages({}, np.array([4, 7]), np.array([0, 0]), clean, (row,))
    shown = np.asarray(Image.open(io.BytesIO(sheet(images, row))))
    assert shown.shape == (2 * (80 + 4), 3 * (80 + 4))  # twice as large, a frame of two
    tile = lambda column: shown[2:82, 84 * column + 2 : 84 * column + 82]  # noqa: E731
    halves = [
        (tile(column)[0, 0], tile(column)[0, -1], tile(column)[79, 39], tile(column)[79, 40]) for column in range(3)
    ]
    assert halves == [(0, 255, 0, 255), (32, 191, 32, 191), (191, 0, 191, 0)]
    assert (shown[:2] == 255).all() and (shown[:, :2] == 255).all() and (shown[82:86] == 255).all()


def test_a_sheet_of_nothing_is_grey_and_files_have_safe_names(tmp_path):
    from PIL import Image

    none = np.zeros((0, 1, 4, 4)), np.zeros(0, np.int64)
    names = ["../pgd 8/255", "x" * 90, "///"]
    rows = tuple(AttackedRow({"label": name}, none[1], none[0], none[1][None], None) for name in names)
    images = AttackedImages({}, none[1], none[1], none[0], rows)
    shown = np.asarray(Image.open(io.BytesIO(sheet(images, rows[0]))))
    assert shown.shape == (64, 64) and (shown == 127).all()
    files = save_sheets(images, tmp_path / "attacked.npz")
    assert [file.name for file in files] == [
        "attacked-0-pgd-8-255.png",
        f"attacked-1-{'x' * 80}.png",
        "attacked-2-row.png",
    ]


@pytest.mark.parametrize("each", [0, -1, True, "8", 2.5])
def test_a_count_that_is_none_is_refused(each):
    with pytest.raises(ConfigError, match="each"):
        ImageKeeper(each)


def test_the_verb_keeps_a_few_beside_the_record_and_saves_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own_network = write_network(tmp_path, monkeypatch)
    words = ["evaluate", own_network, "--dataset", "digits", "--attacks", "fgsm", "--limit", "20", "--draws", "2"]
    assert main([*words, "--out", "a.json", "--keep-images", "2", "--save-images", "all.npz"]) == 0
    assert capsys.readouterr().out.count("images: ") == 3
    found = Evaluation.load("a.json")
    few, every = AttackedImages.load("a.images.npz"), AttackedImages.load("all.npz")
    assert few.misfit(found) is every.misfit(found) is None
    assert len(every.rows[0].index) == 20 and 0 < len(few.rows[0].index) <= 4
    assert (tmp_path / "all-0-fgsm-8-255.png").read_bytes().startswith(b"\x89PNG")
    assert found.metadata["command"][:3] == ["learn2perturb", "evaluate", own_network]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep-images", "0"], "keep_images"),
        (["--save-images", "all.png"], "no .npz file"),
        (["--save-images", "."], "no .npz file"),
        (["--save-images", "taken.npz"], "holds no kept images"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_work(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.npz").write_bytes(b"mine")
    assert main(["evaluate", "runs/none", *words]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "taken.npz").read_bytes() == b"mine"


def test_kept_images_are_numbers_never_objects(tmp_path, both):
    found = both[1]
    odd = dataclasses.replace(found, index=np.array([{}] * len(found.index), dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        odd.save(tmp_path / "odd.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("largest", "times"), [(0.0, 1), (0.1, 5), (0.2, 2), (0.3, 1), (0.6, 1)])
def test_differences_are_enlarged_by_whole_numbers(largest, times):
    clean = np.full((1, 1, 1, 2), 0.25)
    assert amplification(clean, clean + np.array([largest, 0.0])) == times
    assert amplification(clean[:0], clean[:0]) == 1


@pytest.mark.parametrize(("side", "shown"), [(16, 64), (31, 93), (64, 64), (65, 65), (80, 80)])
def test_images_are_enlarged_to_64_pixels_at_least(side, shown):
    from PIL import Image

    clean = np.zeros((1, 1, 4, side))
    row = AttackedRow({"label": "pgd 8/255"}, np.array([0]), clean, np.array([[1]]), None)
    images = AttackedImages({}, np.array([0]), np.array([0]), clean, (row,))
    assert Image.open(io.BytesIO(sheet(images, row))).size[0] == 3 * (shown + 4)


@pytest.mark.parametrize(("index", "good"), [([0, 2], True), ([2, 2], False), ([2, 0], False), ([-1, 2], False)])
def test_numbers_of_images_rise_from_zero(index, good, tmp_path):
    clean, numbers = np.zeros((2, 1, 2, 2)), np.array(index)
    AttackedImages({}, numbers, np.array([0, 1]), clean, ()).save(tmp_path / "it.npz")
    if good:
        assert AttackedImages.load(tmp_path / "it.npz").index.tolist() == index
        return
    with pytest.raises(CheckpointError, match="the numbers of its images do not rise"):
        AttackedImages.load(tmp_path / "it.npz")


@pytest.mark.parametrize(("index", "seed", "fits"), [
    ([0, 1, 4], 0, True), ([0, 1, 5], 0, False), ([4], 0, True), ([5], 0, False), ([], 0, True), ([0, 1, 4], 1, False),
])  # fmt: skip
def test_images_beyond_those_of_a_record_are_not_its_own(index, seed, fits):
    record = SimpleNamespace(metadata={}, seed=0, labels=PackedIntegers.pack(np.zeros(5, dtype=np.int64)), rows=())
    numbers = np.array(index, dtype=np.int64)
    found = AttackedImages({"seed": seed}, numbers, np.zeros_like(numbers), np.zeros((len(index), 1, 2, 2)), ())
    assert found.misfit(record) == (None if fits else "they are of another seed, or of more images")
