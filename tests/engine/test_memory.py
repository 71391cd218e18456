"""Freed memory is kept while an execution mode asks for it, and given back to what is usual after."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from learn2perturb.engine import execution, memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has what this sets")


# In a process of its own: what a heap gives back depends on what lies at its end.
COUNT = """
import resource, torch
from learn2perturb.engine import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(1 << 21) for _ in range(12)]
        held.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory.kept():
    faults()
    print(faults())
"""


def test_tensors_get_no_fresh_pages_once_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 20  # not kept, five times 96 MiB are 30,000 pages on some systems


def test_the_fast_mode_keeps_memory_also_around_a_plain_pass_and_the_outermost_gives_it_back():
    assert not memory._keeping.bodies
    with execution.running(execution.FAST):
        assert memory._keeping.bodies
        with execution.running(execution.PLAIN), execution.running(execution.FAST):
            assert memory._keeping.bodies
        assert memory._keeping.bodies
    assert not memory._keeping.bodies
    with execution.running(execution.PLAIN):
        assert not memory._keeping.bodies


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_mallopt", lambda: None)
    with memory.kept():
        assert not memory._keeping.bodies


def test_memory_is_kept_until_the_last_of_bodies_that_overlap_has_ended(monkeypatch):
    told = []
    monkeypatch.setattr(memory, "_mallopt", lambda: lambda parameter, value: told.append((parameter, value)))
    first, second = memory.kept(), memory.kept()  # as two threads have them, neither within the other
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert told == list(memory._KEEPING.items())
    second.__exit__(None, None, None)
    assert told == [*memory._KEEPING.items(), *memory._USUAL.items()]
