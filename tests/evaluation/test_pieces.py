"""Finished pieces of work in files: what is taken up, what is done again, when a file is written, what is refused."""

from __future__ import annotations

import types
import zlib
from pathlib import Path

import pytest
import torch

from learn2perturb.engine.ranks import Ranks
from learn2perturb.evaluation import pieces
from learn2perturb.evaluation.keeping import Unfinished
from learn2perturb.evaluation.pieces import NOTHING, Pieces, key_of

CPU = torch.device("cpu")


class Work:
    """Gives tensors that follow from the number; every piece takes so many seconds of a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.25) -> None:
        self.done: list[int] = []
        self.now, self.seconds = 100.0, seconds
        monkeypatch.setattr(pieces, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def __call__(self, number: int) -> torch.Tensor:
        self.done.append(number)
        self.now += self.seconds
        return torch.tensor([number, 7])


@pytest.fixture
def work(monkeypatch) -> Work:
    return Work(monkeypatch)


def seconds_in(folder: Path) -> list[int]:
    """Return the milliseconds that the names of the files tell, smallest first."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("*.piece"))


def test_pieces_are_taken_from_before_and_only_the_rest_is_done(work, tmp_path):
    first = Pieces(tmp_path / "kept")
    assert [value.tolist() for value in first.each(work, 2, "key", CPU)] == [[0, 7], [1, 7]]
    assert (work.done, first.seconds, first.waiting) == ([0, 1], 0.0, 0.5)
    again = Pieces(tmp_path / "kept")
    found = list(again.run(work, 5, "key", CPU))
    assert [(value.tolist(), before) for value, before in found] == [
        ([0, 7], True), ([1, 7], True), ([2, 7], False), ([3, 7], False), ([4, 7], False),
    ]  # fmt: skip
    assert work.done == [0, 1, 2, 3, 4]
    assert (again.seconds, again.waiting) == (0.5, 1.25)
    assert seconds_in(tmp_path / "kept") == [500, 750]


def test_other_work_of_the_same_folder_is_not_taken_up(work, tmp_path):
    kept = Pieces(tmp_path)
    kept.each(work, 2, {"eps": 0.1}, CPU)
    kept.each(work, 2, {"eps": 0.2}, CPU)
    assert work.done == [0, 1, 0, 1]
    assert kept.waiting == 1.0


def test_a_key_is_32_digits_of_plain_values_in_any_order():
    assert len(key_of("x")) == 32 and int(key_of("x"), 16) > 0
    assert key_of({"a": 1, "b": (2.0, None)}) == key_of({"b": [2.0, None], "a": 1}) != key_of({"a": 1, "b": 2.0})


@pytest.mark.parametrize(("count", "files"), [(1, []), (2, [500]), (3, [750])])
def test_half_a_second_of_work_is_worth_a_file(count, files, work, tmp_path):
    Pieces(tmp_path).each(work, count, "key", CPU)
    assert seconds_in(tmp_path) == files


def test_ten_seconds_of_work_are_written_while_it_goes_on(monkeypatch, tmp_path):
    work, written = Work(monkeypatch, 2.5), []
    for _ in Pieces(tmp_path).run(work, 9, "key", CPU):
        written.append(len(seconds_in(tmp_path)))
    assert written == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert seconds_in(tmp_path) == [2500, 10000, 10000]


def test_nothing_fresh_is_no_file(work, tmp_path, monkeypatch):
    monkeypatch.setattr(Pieces, "WORTH", 0.0)
    for _ in range(2):
        assert len(Pieces(tmp_path).each(work, 1, "key", CPU)) == 1
    assert seconds_in(tmp_path) == [250]


def test_what_is_finished_stays_finished_where_the_rest_fails(work, tmp_path):
    def fails(number: int) -> torch.Tensor:
        if number == 2:
            raise KeyboardInterrupt
        return work(number)

    with pytest.raises(KeyboardInterrupt):
        Pieces(tmp_path).each(fails, 4, "key", CPU)
    assert len(Pieces(tmp_path).each(work, 4, "key", CPU)) == 4
    assert work.done == [0, 1, 2, 3]


@pytest.mark.parametrize(("folder", "key"), [(None, "key"), ("kept", None), (None, None)])
def test_without_a_folder_or_a_key_nothing_is_kept(folder, key, work, tmp_path):
    kept = Pieces(None if folder is None else tmp_path / folder)
    for _ in range(2):
        assert [value.tolist() for value in kept.each(work, 2, key, CPU)] == [[0, 7], [1, 7]]
    assert work.done == [0, 1, 0, 1]
    assert (kept.seconds, kept.waiting, list(tmp_path.iterdir())) == (0.0, 0, [])
    list(NOTHING.run(work, 3, "key", CPU))
    NOTHING.clear()
    assert NOTHING.waiting == 0 and work.done[4:] == [0, 1, 2]


def test_several_processes_share_the_numbers_and_keep_nothing(work, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "gathered", lambda self, own: [own])
    kept = Pieces(tmp_path)
    with pytest.raises(KeyError):  # what the other has done is not there
        kept.each(work, 4, "key", CPU, Ranks(1, 2))
    assert work.done == [1, 3]
    assert seconds_in(tmp_path) == []


def _cut(content: bytes) -> bytes:
    return content[:-9]


def _of_other_work(content: bytes) -> bytes:
    return pieces._packed("0" * 32, {0: torch.tensor(3)})


def _of_objects(content: bytes) -> bytes:
    return pieces._packed(key_of("key"), {0: types.SimpleNamespace()})


@pytest.mark.parametrize(("damage", "reason"), [
    (_cut, "it ends too early"), (_of_other_work, "it is of other work"), (_of_objects, "Weights only load failed"),
    (lambda content: b"", "it ends too early"), (lambda content: b"text", "Error -3 while decompressing"),
])  # fmt: skip
def test_a_damaged_file_is_said_removed_and_its_work_done_again(damage, reason, work, tmp_path):
    Pieces(tmp_path).each(work, 2, "key", CPU)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    kept = Pieces(tmp_path)
    with pytest.warns(UserWarning, match=f"finished work is done again: .*{path.name} is damaged: {reason}") as said:
        kept.each(work, 1, "key", CPU)
    assert (len(said), work.done, kept.seconds, list(tmp_path.iterdir())) == (1, [0, 1, 0], 0.0, [])
    assert "\n" not in str(said[0].message)


@pytest.mark.parametrize(("error", "reason"), [
    (ValueError(), "ValueError"), (ValueError("a" * 300), "a" * 200), (ValueError("first\nsecond"), "first"),
])  # fmt: skip
def test_the_reason_is_one_line_of_200_letters_at_most(error, reason, work, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise error

    Pieces(tmp_path).each(work, 2, "key", CPU)
    monkeypatch.setattr(pieces, "_unpacked", fails)
    with pytest.warns(UserWarning, match="is damaged") as said:
        Pieces(tmp_path).each(work, 1, "key", CPU)
    assert str(said[0].message).endswith(f"is damaged: {reason}")


def test_a_file_may_unfold_into_two_gibibytes_at_most(monkeypatch):
    asked = []
    real = zlib.decompressobj

    def unfolding() -> types.SimpleNamespace:
        inner = real()
        return types.SimpleNamespace(
            decompress=lambda content, most: (asked.append(most), inner.decompress(content, most))[1], eof=True
        )

    monkeypatch.setattr(zlib, "decompressobj", unfolding)
    assert pieces._unpacked(pieces._packed("name", {3: 1.5}), "name", CPU) == {3: 1.5}
    assert asked == [2 * 1024**3]


def test_a_disk_that_refuses_is_said_once_and_the_work_goes_on(work, tmp_path):
    (tmp_path / "file").write_text("no folder")
    kept = Pieces(tmp_path / "file")
    with pytest.warns(UserWarning, match="finished work is not kept: cannot write"):
        kept.each(work, 2, "key", CPU)
    assert kept.folder is None
    assert len(kept.each(work, 2, "key", CPU)) == 2  # no word more: a warning is an error here


def test_a_folder_that_is_removed_on_the_way_is_no_error(work, tmp_path):
    kept = Pieces(tmp_path / "kept")
    kept.clear()
    kept.each(work, 2, "key", CPU)
    assert kept.waiting == 0.5
    kept.clear()
    assert not (tmp_path / "kept").exists() and kept.waiting == 0


@pytest.mark.parametrize(("name", "seconds"), [
    ("a-1500-b.piece", 1.5), ("a-b-c.piece", 0.0), ("a-1500.piece", 0.0), ("a-1500-b-c.piece", 0.0),
])  # fmt: skip
def test_seconds_are_told_by_names_of_three_words(name, seconds):
    assert pieces._seconds(Path("folder-1-x") / name) == seconds


# --- of whom they are


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_says_that_nothing_is_kept(rank, says, tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Unfinished(tmp_path).pieces("work", "they share it") is NOTHING
    assert ("nothing is kept on the way, so a kill loses all: they share it" in capsys.readouterr().err) is says


def test_the_work_that_goes_on_is_said_and_removed_at_the_end(work, tmp_path, capsys):
    with Unfinished(tmp_path) as keep:
        keep.pieces("work").each(work, 3, "key", CPU)
        assert capsys.readouterr().err == ""
        assert keep.pieces("other work").waiting == 0
        kept = keep.pieces("work")
        assert kept.waiting == 0.75
        assert f"going on: 1 s of work finished before, in {kept.folder}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
