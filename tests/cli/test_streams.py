"""Standard streams that are closed, full, or of another encoding; signals to a verb; exit codes as documented."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from learn2perturb.cli import list as verb
from learn2perturb.cli.main import main
from learn2perturb.terminal import markdown_row

TRAIN = (
    "train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu", "--epochs=1",
    "--limit=32", "--batch-size=16", "--monitor=0", "--defense=none", "--tensorboard=false",
)  # fmt: skip


def shell(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which ``l2p`` is the command line."""
    command = f'l2p() {{ "{sys.executable}" -m learn2perturb.cli.main "$@"; }}\n{text}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, errors="surrogateescape",
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_reader_that_goes_away_stops_no_training(tmp_path):
    done = shell(f"l2p {' '.join(TRAIN)} --out {tmp_path}/run | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.split() == ["0"], done.stderr
    assert "error" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_full_stderr_and_a_plain_encoding_change_nothing(tmp_path):
    run = f"$'{tmp_path}/gr\\xc3\\xbc\\xff\\x1b[31m'"
    done = shell(f"l2p {' '.join(TRAIN)} --out {run} 2>/dev/full", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0, done.stdout
    assert "\\x1b[31m" in done.stdout
    assert "\x1b" not in done.stdout
    assert list(tmp_path.glob("gr*/checkpoints/0*"))


def test_a_refusal_without_stderr_keeps_its_code():
    assert shell("l2p train --model nothing 2>&-; echo $?").stdout.split() == ["2"]
    assert shell("l2p train --model nothing 2>/dev/full; echo $?").stdout.split() == ["2"]


@pytest.mark.parametrize("closed", [">&-", ">/dev/full"])
@pytest.mark.parametrize("words", ["list models", "train --help"])
def test_results_that_cannot_be_printed_are_a_failure(closed, words):
    done = shell(f"l2p {words} {closed}")
    assert done.returncode == 1
    assert "error: standard output cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_head_is_fine():
    done = shell("set -o pipefail; l2p list attacks | head -1")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_of_a_stranger_cannot_steer_the_terminal(capsys):
    assert main(["train", "--model", "\x1b]0;owned\x07\x1b[2J\r\u202e"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07\\x1b[2J" in said
    assert said.isprintable() or said.rstrip("\n").isprintable()


def test_a_name_cannot_break_a_markdown_table():
    assert markdown_row(["a|b", "c\nd", "<script>", "\x1b[2J", 3]) == r"| a\|b | c d | \<script> | \\x1b[2J | 3 |"
    assert markdown_row(["pgd_at", "[1.0, 2.0]"]) == "| pgd_at | [1.0, 2.0] |"


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_verb_with_one_line_and_its_code(monkeypatch, capsys, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(verb, "run", lambda _: signal.raise_signal(number))
    assert main(["list", "models"]) == 128 + number
    error = capsys.readouterr().err
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert error == f"learn2perturb: stopped by {name}; type the same command again\n"
    assert signal.getsignal(number) is before


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(verb, "run", lambda _: signal.raise_signal(signal.SIGHUP) or 0)
    try:
        assert main(["list", "models"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
