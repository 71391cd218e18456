"""Freed memory is kept while a gear asks for it, and given back to what is usual after."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from learn2perturb.engine import gears, memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has what this sets")


def faults() -> int:
    """Fresh pages that the process was given for holding, and dropping, tensors of 8 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(1 << 21) for _ in range(12)]
        held.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_tensors_get_no_fresh_pages_once_memory_is_kept():
    with memory.kept():
        faults()
        assert faults() < 20
    assert faults() > 40  # 96 MiB is more than is usually kept; with huge pages a page is 2 MiB


def test_the_fast_gear_keeps_memory_also_around_a_plain_pass_and_the_outermost_gives_it_back():
    assert not memory._kept
    with gears.running(gears.FAST):
        assert memory._kept
        with gears.running(gears.PLAIN), gears.running(gears.FAST):
            assert memory._kept
        assert memory._kept
    assert not memory._kept
    with gears.running(gears.PLAIN):
        assert not memory._kept


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_mallopt", lambda: None)
    with memory.kept():
        assert not memory._kept
