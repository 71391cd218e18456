"""The laboratories find what they are for: faults that are planted here are seen, and what is sound passes."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

from learn2perturb.errors import DataError
from learn2perturb.records import atomic_write
from tests.laboratories import cases, choosing, covering, crash, damage, hostile, mutants, mutate, mutations
from tests.laboratories.cases import Case, Outcome
from tests.laboratories.covering import Test
from tests.laboratories.disk import Disk, Operation, after
from tests.laboratories.listed_mutants import EQUIVALENT, LISTED, SPEED
from tests.laboratories.mutants import Mutant
from tests.laboratories.mutate import ROOT, SOURCE, Trial
from tests.laboratories.recorder import Recorder


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


def outcomes(tried: list[Case], **settings) -> list[str]:
    return sorted(outcome.kind for _, outcome in cases.run(tried, **settings))


# --- the disk


def test_a_kill_keeps_everything_and_a_power_cut_what_was_synced(root):
    recorder = Recorder(root)
    with recorder.recording():
        (root / "new.txt").write_text("unsynced")
        with (root / "safe.txt").open("wb") as file:
            file.write(b"synced")
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(root, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        os.replace(root / "safe.txt", root / "moved.txt")
    end = len(recorder.journal)
    assert set(after(recorder.journal, end).contents) == {"old.txt", "new.txt", "moved.txt"}
    lost = after(recorder.journal, end, cut="lost").contents
    assert lost == {"old.txt": b"old", "new.txt": b"", "safe.txt": b"synced"}
    empty = after(recorder.journal, end, cut="empty").contents
    assert empty == {"old.txt": b"old", "new.txt": b"", "moved.txt": b"synced"}
    assert after(recorder.journal, end, cut="zeros").contents["new.txt"] == bytes(8)


def test_half_of_a_write_is_half_of_its_bytes(root):
    recorder = Recorder(root)
    with recorder.recording():
        (root / "new.txt").write_bytes(b"12345678")
    at = next(at for at, done in enumerate(recorder.journal) if done.data == b"12345678")
    assert after(recorder.journal, at, half=True).contents["new.txt"] == b"1234"


def test_what_the_recorder_cannot_see_is_not_believed(root):
    recorder, unseen = Recorder(root), os.symlink
    with pytest.raises(AssertionError, match="operations were missed"), recorder.recording():
        unseen("old.txt", root / "link.txt")


# --- the laboratories


def writer(write) -> crash.Scenario:
    """A command that writes ``record.json`` again, in place of an older one."""

    def again(folder: pathlib.Path) -> tuple[int, str]:
        write(folder / "run" / "record.json", json.dumps({"a": list(range(40))}))
        return 0, ""

    return crash.Scenario("writer", again, lambda folder: Disk.read(folder).contents, crash.old_record_kept)


@pytest.mark.parametrize("sound", [True, False], ids=["atomic", "in place"])
def test_the_crash_laboratory_sees_a_file_that_is_written_in_place(root, sound):
    (root / "run").mkdir()
    (root / "run" / "record.json").write_text("{}")
    scenario = writer(atomic_write if sound else pathlib.Path.write_text)
    recorder = Recorder(root)
    with recorder.recording():
        scenario.again(root)
    recording = crash.Recording(scenario, "writer", recorder.journal, recorder.start, None)
    lost = [kept for count in range(recorder.start, len(recorder.journal)) for cut in ("kill", "lost", "empty", "torn")
            if (kept := scenario.kept([], after(recording.journal, count, half=True, cut=cut), cut))]  # fmt: skip
    assert bool(lost) is not sound


def test_the_crash_laboratory_holds_a_training_to_its_synced_checkpoints():
    made = [
        Operation("make", -1, name="run", is_folder=True), Operation("make", -2, -1, "checkpoints", is_folder=True),
        Operation("make", -3, -2, ".0000000004.tmp", is_folder=True),
        Operation("enter", -3, -2, "0000000004", from_folder=-2, from_name=".0000000004.tmp"),
    ]  # fmt: skip
    assert crash.promised_step(made, "kill") == 4
    assert crash.promised_step(made, "lost") == -1
    assert crash.promised_step([*made, Operation("sync", -2)], "lost") == 4


def damaged(read) -> damage.Kind:
    content = b'{"a": 1, "b": [2, 3]}'
    return damage.Kind("planted", Disk({"x.json": content}), ("x.json",), read, right=content)


def raw(folder):
    return (folder / "x.json").read_bytes()


def refusing(folder):
    if raw(folder) != b'{"a": 1, "b": [2, 3]}':
        raise DataError("x.json is damaged; restore it")
    return raw(folder)


@pytest.mark.parametrize(
    ("read", "expected"),
    [(raw, "silent other result"), (refusing, "clean line"), (lambda folder: json.loads("{"), "traceback")],
)  # fmt: skip
def test_the_damage_laboratory_tells_a_refusal_from_silence_and_from_a_traceback(read, expected):
    assert outcomes([damaged(read).case(number, 0) for number in range(4)]) == [expected] * 4


@pytest.mark.parametrize("change", mutations.BYTES, ids=lambda change: change.__name__)
def test_every_damage_is_the_same_for_a_seed(change):
    results = []
    for _ in range(2):
        content = bytearray(range(200))
        change(content, random.Random(3))
        results.append(content)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learn2perturb: error: x is y; give z", "clean line"),
        ("learn2perturb: error: unexpected KeyError: 'x'", "traceback"),
        ("learn2perturb: error: \x1b[31mred", "escape sequence"),
        ("a line without our name", "traceback"),
    ],
)
def test_the_hostile_laboratory_reads_the_answer(tmp_path, text, expected):
    assert hostile._seen(tmp_path, 2, text, {}).kind == expected


def test_the_hostile_laboratory_sees_what_ran_and_what_was_changed(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("other")
    assert hostile._seen(tmp_path, 0, "", {mine: b"mine"}).kind == "lost"
    (tmp_path / hostile.CANARY).touch()
    assert hostile._seen(tmp_path, 0, "", {}).kind == "executed"


# --- the counting


def test_a_case_that_hangs_or_dies_is_counted_and_the_others_go_on(tmp_path):
    def hang(folder):
        while True:
            pass

    tried = [
        Case("hangs", "g", hang), Case("dies", "g", lambda folder: os._exit(3)),
        Case("fails", "g", lambda folder: 1 / 0), Case("works", "g", lambda folder: Outcome("same result")),
    ]  # fmt: skip
    assert outcomes(tried, limit=0.5) == ["hang", "same result", "traceback", "traceback"]


def test_a_ledger_goes_on_where_it_was_and_forgets_what_other_code_gave(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ledger.jsonl"
    tried = [Case(f"case {number}", "g", lambda folder: Outcome("same result")) for number in range(3)]
    cases.Ledger(path).work("three", tried[:2])
    assert "three: 2/2, 0 bad" in capsys.readouterr().out
    again = cases.Ledger(path)
    again.work("three", tried)
    assert "three: 1/1" in capsys.readouterr().out
    assert "| g | 3 | 3 |" in again.table()
    monkeypatch.setattr(cases, "source_mark", lambda: "other")
    assert not cases.Ledger(path).found


# --- mutants


@pytest.mark.parametrize("one", LISTED, ids=lambda one: one.name)
def test_a_listed_mutant_still_fits_the_source(one):
    mutant = one.mutant(SOURCE)
    compile(mutant.text, mutant.path, "exec")
    assert all((ROOT / tests).exists() for tests in one.tests)


def test_mutants_change_one_place_and_leave_messages_and_types_alone(tmp_path):
    (tmp_path / "a.py").write_text(
        'Size = int | float\n\ndef f(x: Literal[1] = 2) -> None:\n    """Of 3."""\n    if not x:\n'
        "        raise ValueError(f'{x + 4}')\n    warnings.warn(text[:4], stacklevel=4)\n    e = DataError(text[4])\n"
        "    isinstance(x, int | float)\n    return x * 5 < 6 + 1e-9\n\n"
        "def __repr__(self):\n    return self.text[:3]\n"
    )
    found = {(one.before, one.after) for one in mutants.mutants(tmp_path, "a.py")}
    wanted = {("x * 5", "(x) / (5)"), ("not x", "x"), ("2", "3"), ("6", "7"), ("1e-9", "0.0")}
    assert wanted | {("x * 5 < 6 + 1e-9", "(x * 5) <= (6 + 1e-09)")} <= found
    assert not {before for before, _ in found} & {"1", "3", "4", "x + 4", "int | float"}
    for one in mutants.mutants(tmp_path, "a.py"):
        compile(one.text, one.path, "exec")


def test_of_what_is_allowed_for_rounding_the_side_is_changed_and_not_the_edge(tmp_path):
    (tmp_path / "a.py").write_text("def f(x):\n    return x > _ROUNDING\n")
    assert [one.after for one in mutants.mutants(tmp_path, "a.py")] == ["not ((x) > (_ROUNDING))"]


def trial(text: str, *tests: str) -> Trial:
    return Trial("one", Mutant("progress.py", 1, "", "", (SOURCE / "progress.py").read_text() + text), tests)


def test_a_mutant_that_no_test_sees_survives(tmp_path, monkeypatch):
    """Tests are run on the mutant, in a process of its own, in the order that is given."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "import learn2perturb.progress as p\ndef test_other():\n    assert p.OTHER\n"
        "def test_it():\n    assert p.ANSWER == 42\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    for answer, expected in (("42", "same result"), ("43", "clean line")):
        tried = mutate.case(trial(f"\nANSWER = {answer}\nOTHER = True\n", file.name))
        assert outcomes([tried], limit=60) == [expected]
    both = trial("\nANSWER = 43\nOTHER = False\n", "test_it.py::test_it", "test_it.py::test_other")
    ((_, outcome),) = cases.run([mutate.case(both)], limit=60)
    assert outcome.detail.endswith("test_it")
    assert outcomes([mutate.case(trial("", "test_it.py::test_gone"))], limit=60) == [mutate.LABORATORY]
    ((_, outcome),) = cases.run([mutate.case(both, limit=-1.0)], limit=60)
    assert outcome.kind == "same result"  # its time was over before the first test


def test_a_test_that_fails_without_a_change_kills_nothing(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\ndef test_other():\n    pass\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    tests = {"one": "test_it.py::test_it", "other": "test_it.py::test_other"}
    found = {name: Outcome(mutate.DIED, test) for name, test in tests.items()} | {"third": Outcome("hang")}
    assert list(mutate._not_dead(found)) == ["one"]


def test_what_goes_wrong_around_the_tests_kills_nothing(monkeypatch):
    monkeypatch.setattr(mutate.pytest, "main", lambda *_, **__: 1 / 0)
    assert outcomes([mutate.case(trial("", "tests/test_house.py"))]) == [mutate.LABORATORY]
    monkeypatch.setattr(mutate.pytest, "main", lambda *_, **__: 4)
    assert outcomes([mutate.case(trial("", "tests/test_house.py"))]) == [mutate.LABORATORY]


def known(name: str, seconds: float, *lines: int) -> Test:
    return Test(name, seconds, {"attacks/a.py": frozenset(lines)})


def test_a_mutant_is_judged_by_the_tests_that_run_its_line_the_quick_and_near_first(tmp_path, monkeypatch):
    text = "LIMIT = 3\n\n\ndef f(x=4):\n    if x > (\n        5\n    ):\n        return 6\n    return 7\n"
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "a.py").write_text(text)
    monkeypatch.setattr(choosing, "SOURCE", tmp_path)
    choosing._tree.cache_clear()
    tests = [
        known("tests/attacks/test_a.py::test_slow", 9.0, 5, 8), known("tests/attacks/test_a.py::test_quick", 1.0, 5, 9),
        known("tests/attacks/test_b.py::test_other", 1.0, 5, 8), known("tests/cli/test_c.py::test_far", 1.0, 5, 8),
        known("tests/attacks/test_a.py::test_none", 0.1, 1),
    ]  # fmt: skip
    by_name = {one.name: one for one in tests}

    def chosen(line: int, limit: float = 60.0) -> list[str]:
        names = choosing.tests_of(Mutant("attacks/a.py", line, "", "", ""), by_name, limit)
        return [name.split("test_")[-1] for name in names]

    assert chosen(6) == ["quick", "other", "far", "slow"]  # in the head of a branch that begins a line above
    assert chosen(6, limit=2.5) == ["quick", "other"]
    assert chosen(8) == ["other", "far", "slow"]
    assert chosen(9) == ["quick"]
    # A constant, a default: what runs the functions, and what is named after the file.
    assert chosen(1) == chosen(4) == ["none", "quick", "other", "far", "slow"]


def test_what_a_shared_fixture_runs_is_run_by_every_test_that_asks_for_it(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\nimport torch\nfrom learn2perturb.attacks.balls import BALLS\n"
        "@pytest.fixture(scope='module')\ndef ball():\n    x = torch.ones(2, 3)\n    BALLS['l2'].step(x, 1.0)\n"
        "def test_first(ball):\n    pass\ndef test_second(ball):\n    pass\n"
        "def test_none():\n    pass\ndef test_fails():\n    assert False\n"
    )
    at = tmp_path / "lines.json"
    assert outcomes([Case("lines", "lines", covering._writer(str(file), at))]) == ["same result"]
    found = {one.name.split("::")[1]: one for one in covering._read(at)}
    assert set(found) == {"test_first", "test_second", "test_none"}
    lines = found["test_first"].lines["attacks/balls.py"]
    assert lines and found["test_second"].lines["attacks/balls.py"] == lines
    assert "attacks/balls.py" not in found["test_none"].lines


def test_the_first_test_of_a_file_does_not_pay_for_its_imports(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import functools\n@functools.cache\ndef heavy():\n    return sum(range(10_000_000))\n"
        "def test_first():\n    heavy()\ndef test_second():\n    heavy()\n"
    )
    at = tmp_path / "lines.json"
    assert outcomes([Case("lines", "lines", covering._writer(str(file), at))]) == ["same result"]
    assert all(one.seconds < 0.15 for one in covering._read(at))


def test_a_sample_hardly_changes_when_other_places_do(monkeypatch):
    whole = mutate.every()
    monkeypatch.setattr(mutate, "every", lambda _: whole)
    first = mutate.sample(60, 1)
    assert first == mutate.sample(60, 1) != mutate.sample(60, 2)
    monkeypatch.setattr(mutate, "every", lambda _: dict(list(whole.items())[50:]))
    assert len({*first} & {*mutate.sample(60, 1)}) >= 55


def test_a_sample_of_some_folders_is_judged_by_the_tests_of_these_and_a_few_elsewhere():
    drawn = mutate.sample(50, 1, ("noise", "defenses"))
    assert {one.path.split("/")[0] for one in drawn} == {"noise", "defenses"}
    places = covering.places_of(("noise",))
    files = covering.test_files(places)
    assert {"tests/noise/test_laws.py", "tests/cli/test_defaults.py", "tests/compat/test_ours_in_others.py"} <= {*files}
    assert not [path for path in files if path.startswith(("tests/attacks", "tests/defenses"))]
    assert all(covering.test_files([place]) for place in places)


def test_what_changes_speed_alone_is_no_mutant():
    assert {(path, name) for path, name in SPEED if f"\n{name} = " not in (SOURCE / path).read_text()} == set()
    assert not [one for one in mutate.every().values() if mutate.line_of(one).startswith("_BLOCK = ")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sample_of_every_laboratory_ends_well(tmp_path):
    words = [sys.executable, "-m", "tests.laboratories", "--size", "sample", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_every_equivalent_mutant_is_still_one_of_the_source():
    paths = {key[0] for key in EQUIVALENT}
    known = {
        (path, mutate.line_of(one), one.before, one.after) for path in paths for one in mutants.mutants(SOURCE, path)
    }
    assert set(EQUIVALENT) <= known, "its line has changed: think again whether it is equivalent"
    assert all(EQUIVALENT.values())
