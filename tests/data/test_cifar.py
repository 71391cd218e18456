from __future__ import annotations

import builtins
import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from learn2perturb.data import cifar, load_data
from learn2perturb.data.archive import fetch, unpack
from learn2perturb.data.pickles import read_pickle
from learn2perturb.errors import DataError

N = 4
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (N, 3072), dtype=np.uint8) for name in ("1", "2", "3", "4", "5", "test")}


def labels_of(name: str, classes: int) -> list[int]:
    return [(7 * len(name) + ord(name[0]) + i) % classes for i in range(N)]


def write(layout: str, root: Path, protocol: int = 2) -> Path:
    """Write a tiny set in ``layout``; CIFAR-100's only training file holds batch 1."""
    folder = root / layout
    folder.mkdir(parents=True)
    hundred = "100" in layout
    names = [f"class{i}" for i in range(100 if hundred else 10)]
    binary = layout.endswith(("bin", "binary"))
    files = (
        {"train": "1", "test": "test"}
        if hundred
        else {f"data_batch_{i}": str(i) for i in range(1, 6)} | {"test_batch": "test"}
    )
    for file, key in files.items():
        labels = labels_of(key, len(names))
        if binary:
            fine = np.array(labels, dtype=np.uint8)[:, None]
            coarse = [np.full((N, 1), 99, dtype=np.uint8)] if hundred else []
            (folder / f"{file}.bin").write_bytes(np.hstack([*coarse, fine, PIXELS[key]]).tobytes())
        else:
            content = {b"data": PIXELS[key], b"fine_labels" if hundred else b"labels": labels}
            (folder / file).write_bytes(pickle.dumps(content, protocol))
    if binary:
        (folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(names) + "\n\n")
    else:
        meta = {"fine_label_names" if hundred else "label_names": names}
        (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol))
    return folder


LAYOUTS = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]


def name_of(layout: str) -> str:
    return "cifar100" if "100" in layout else "cifar10"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["parent", "itself", "environment"])
def test_four_layouts_from_the_parent_or_the_folder_itself(
    layout: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(layout, tmp_path)
    if where == "environment":
        monkeypatch.setenv("LEARN2PERTURB_DATA_DIR", str(tmp_path))
    root = {"parent": tmp_path, "itself": folder, "environment": None}[where]
    train, test = (load_data(name_of(layout), split, root=root) for split in ("train", "test"))
    keys = ["1"] if "100" in layout else ["1", "2", "3", "4", "5"]
    assert np.array_equal(train.images.flatten(1).numpy(), np.concatenate([PIXELS[key] for key in keys]))
    assert train.labels.tolist() == [y for key in keys for y in labels_of(key, train.num_classes)]
    assert np.array_equal(test.images.numpy(), PIXELS["test"].reshape(N, 3, 32, 32))
    assert train.num_classes == (100 if "100" in layout else 10) and train.classes[3] == "class3" and train.flip


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    write("cifar-10-batches-py", tmp_path, protocol)
    assert np.array_equal(load_data("cifar10", "test", root=tmp_path).images.flatten(1).numpy(), PIXELS["test"])


class Evil:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]  # type: ignore[return-value]


def attacks(marker: Path) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w').close()"
    # Protocol 4 resolves dotted names, so that one STACK_GLOBAL can walk from an allowed module to anything.
    chain = (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(word)]) + word for word in (b"numpy", b"ndarray.__class__.__subclasses__"))
        + b"\x93."
    )
    return {
        "os.system": pickle.dumps(Evil(os.system, f"touch {marker}"), 2),
        "builtins.eval": pickle.dumps({b"data": Evil(eval, touch)}, 4),
        "builtins.exec": pickle.dumps(Evil(exec, touch), 0),
        "getattr chain": pickle.dumps(Evil(getattr, Evil(__import__, "os"), "system"), 2),
        "dotted name": chain,
        "numpy.load": pickle.dumps(Evil(np.load, "x"), 4),
        "codec": pickle.dumps(Evil(__import__("_codecs").encode, "x", "rot13"), 2),
        "builtins.print": pickle.dumps(Evil(builtins.print, "x"), 5),
    }


@pytest.mark.parametrize("kind", sorted(attacks(Path("m"))))
def test_a_malicious_pickle_runs_nothing(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "batch"
    path.write_bytes(attacks(marker)[kind])
    with pytest.raises(DataError) as caught:
        read_pickle(path)
    assert not marker.exists() and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "empty", "not a dict", "floats", "labels", "shape", "big label"])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    path = write("cifar-10-batches-py", tmp_path) / "test_batch"
    good = path.read_bytes()
    data, labels = PIXELS["test"], labels_of("test", 10)
    contents = {
        "truncated": good[:-900],
        "empty": b"",
        "not a dict": pickle.dumps([1, 2]),
        "floats": pickle.dumps({"data": data.astype(float), "labels": labels}),
        "labels": pickle.dumps({"data": data, "labels": labels[:2]}),
        "shape": pickle.dumps({"data": data[:, :30], "labels": labels}),
        "big label": pickle.dumps({"data": data, "labels": [10**30] * N}),
    }
    path.write_bytes(contents[kind])
    with pytest.raises(DataError, match="test_batch"):
        load_data("cifar10", "test", root=tmp_path)


def test_missing_sets_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"LEARN2PERTURB_DATA_DIR.*download=True") as caught:
        load_data("cifar10", root=tmp_path)
    assert str(tmp_path) in str(caught.value) and "--data-dir" in str(caught.value)
    (write("cifar-10-batches-py", tmp_path) / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3"):
        load_data("cifar10", root=tmp_path)
    (write("cifar-100-binary", tmp_path) / "train.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"train\.bin has 5 bytes"):
        load_data("cifar100", root=tmp_path)


def archive_of(layout: str, folder: Path, name: str) -> tuple[Path, str]:
    path = folder / name
    with tarfile.open(path, "w:gz") as tar:
        tar.add(write(layout, folder / "made"), layout)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_archive_is_fetched_checked_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web").mkdir()
    path, digest = archive_of("cifar-10-batches-py", tmp_path / "web", "cifar-10-python.tar.gz")
    monkeypatch.setattr(cifar, "CIFAR10_URL", f"file://{path}")
    monkeypatch.setattr(cifar, "CIFAR10_SHA256", "0" * 64)
    root = tmp_path / "data"
    with pytest.raises(DataError, match="cannot fetch"):
        load_data("cifar10", root=root, download=True)
    assert not list(root.iterdir())
    monkeypatch.setattr(cifar, "CIFAR10_SHA256", digest)
    assert len(load_data("cifar10", root=root, download=True)) == 5 * N
    assert sorted(entry.name for entry in root.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    path.unlink()  # what was fetched is not fetched again
    assert len(load_data("cifar10", root=root, download=True)) == 5 * N


def test_fetch_over_http_with_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    (tmp_path / "set.bin").write_bytes(b"x" * 5000)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/set.bin"
        digest = hashlib.sha256(b"x" * 5000).hexdigest()
        assert fetch(url, digest, tmp_path / "got", progress=True).read_bytes() == b"x" * 5000
        with pytest.raises(DataError, match="cannot fetch"):
            fetch(url + "x", digest, tmp_path / "got")
        server.shutdown()
    assert "set.bin" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_archive_in_the_folder_is_unpacked(layout: str, tmp_path: Path) -> None:
    name = layout.replace("-batches-py", "-python").replace("-batches-bin", "-binary") + ".tar.gz"
    (tmp_path / "root").mkdir()
    path, _ = archive_of(layout, tmp_path, name)
    path.rename(tmp_path / "root" / name)
    assert len(load_data(name_of(layout), "test", root=tmp_path / "root")) == N


def test_a_bad_archive_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("x")
    outside = tmp_path / "outside.tar"
    with tarfile.open(outside, "w") as tar:
        tar.add(tmp_path / "inside", "../escaped")
    whole, _ = archive_of("cifar-10-batches-py", tmp_path, "whole.tar.gz")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[:20_000])
    root = tmp_path / "root"
    for archive, folder in ((outside, "a"), (cut, "cifar-10-batches-py"), (whole, "other")):
        with pytest.raises(DataError, match="cannot unpack"):
            unpack(archive, folder, root)
        assert not list(root.iterdir()) and not (tmp_path / "escaped").exists()


@pytest.mark.skipif(not os.environ.get("LEARN2PERTURB_DATA_DIR"), reason="LEARN2PERTURB_DATA_DIR is not set")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_set(name: str) -> None:
    from learn2perturb.data.dataset import pixel_statistics

    try:
        train, test = load_data(name), load_data(name, "test")
    except DataError as error:
        if name == "cifar10" or "not found in" not in str(error):
            raise
        pytest.skip(f"no {name} there")
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(train.labels).tolist() == [50_000 // train.num_classes] * train.num_classes
    mean, std = pixel_statistics(train.images)
    assert mean == pytest.approx(train.mean, abs=1e-4) and std == pytest.approx(train.std, abs=1e-4)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny sets of these tests be the published ones."""
    digests = {}
    for split, keys in {"train": "12345", "test": ["test"]}.items():
        images = np.concatenate([PIXELS[key] for key in keys]).reshape(-1, 3, 32, 32)
        labels = np.array([y for key in keys for y in labels_of(key, 10)])
        digests["cifar10", split] = (len(labels), cifar.content_digest(images, labels))
    monkeypatch.setattr(cifar, "PUBLISHED", digests)


def test_a_set_packed_anew_in_another_order_is_the_published_one(tmp_path: Path, published: None) -> None:
    folder = write("cifar-10-batches-py", tmp_path)
    first, second = folder / "data_batch_1", folder / "data_batch_4"
    moved = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(moved)
    data = load_data("cifar10", "train", root=tmp_path)
    assert data.published is True and data.take(7).published is True
    assert load_data("digits").published is None


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-10-batches-bin"])
@pytest.mark.parametrize("what", ["pixel", "label"])
def test_a_flipped_bit_is_not_passed_over(layout: str, what: str, tmp_path: Path, published: None) -> None:
    folder = write(layout, tmp_path)
    path = next(path for path in folder.iterdir() if path.name.startswith("test_batch"))
    content = bytearray(path.read_bytes())
    if layout.endswith("py"):
        labels = pickle.loads(content)
        labels[b"data" if what == "pixel" else b"labels"][2 if what == "label" else (1, 77)] ^= 1
        content = bytearray(pickle.dumps(labels, 2))
    else:
        content[3073 if what == "label" else 3073 + 77] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"test images .* not those .* \(a byte differs\)"):
        assert load_data("cifar10", "test", root=tmp_path).published is False


def test_a_file_cut_at_an_image_is_not_passed_over(tmp_path: Path, published: None) -> None:
    path = write("cifar-10-batches-bin", tmp_path) / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[: 3 * 3073])
    with pytest.warns(UserWarning, match="19 images and not 20"):
        load_data("cifar10", "train", root=tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_and_names_that_do_not_fit_name_the_file(layout: str, tmp_path: Path) -> None:
    folder = write(layout, tmp_path)
    names = next(path for path in folder.iterdir() if "meta" in path.name or "names" in path.name)
    whole = names.read_bytes()
    names.write_bytes(whole.replace(b"class5\n", b"") if b"\n\n" in whole else pickle.dumps({
        b"label_names": ["a"], b"fine_label_names": ["a"]
    }, 2))  # fmt: skip
    with pytest.raises(DataError, match=f"{names.name} names .* classes"):
        load_data(name_of(layout), "test", root=tmp_path)
    names.write_bytes(whole)
    if layout.endswith("bin"):
        path = folder / "test_batch.bin"
        path.write_bytes(b"\x0a" + path.read_bytes()[1:])
        with pytest.raises(DataError, match=r"test_batch\.bin has a label 10"):
            load_data("cifar10", "test", root=tmp_path)


def test_garbled_archives_and_files_are_one_line(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    inner = write("cifar-10-batches-bin", tmp_path / "in")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(inner, inner.name)
    whole = archive.read_bytes()
    for number in range(40):
        root = tmp_path / f"out{number}"
        root.mkdir()
        garbled = bytearray(whole)
        garbled[chance.integers(len(garbled))] ^= 1 << int(chance.integers(8))
        (root / archive.name).write_bytes(garbled[: len(garbled) if number % 4 else chance.integers(len(garbled))])
        try:
            load_data("cifar10", "test", root=root)
        except DataError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 600, message


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for number in range(1001):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{number}")
            tar.addfile(member)
    with pytest.raises(DataError, match="more than 1000 files"):
        load_data("cifar10", "test", root=tmp_path)
    header = tarfile.TarInfo("cifar-10-batches-bin/large")
    header.size = 2**33  # the archive ends before: the header alone says enough
    archive.write_bytes(header.tobuf())
    with pytest.raises(DataError, match="bytes"):
        load_data("cifar10", "test", root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name]


@pytest.mark.realdata
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_real_cifar10_is_the_published_one(split: str, real_cifar10: Path) -> None:
    assert load_data("cifar10", split, root=real_cifar10).published is True


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_pixel_in_an_archive_is_noticed_by_its_checksum(place: float, tmp_path: Path) -> None:
    """The checksum of a compressed file follows its last member, where nobody looks who only wants the members."""
    whole, _ = archive_of("cifar-10-batches-bin", tmp_path, "packed.tar.gz")
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "cifar-10-binary.tar.gz"
    with tarfile.open(whole) as tar, tarfile.open(path, "w:gz", compresslevel=0) as stored:
        for member in tar.getmembers():
            stored.addfile(member, tar.extractfile(member))
    content = bytearray(path.read_bytes())  # stored blocks: every byte is one of the files', still valid when flipped
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"cannot unpack .*(CRC|checksum|damaged)"):
        load_data("cifar10", "test", root=tmp_path / "root")
