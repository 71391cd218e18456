"""What every test shares: threads, seeds, and the way to the real CIFAR-10."""

from __future__ import annotations

import importlib
import os
import pathlib
import random
import signal
import sys

# Before torch is imported, and inherited by the processes that tests start: a resumed run is bit-identical only at an
# equal thread count. One: the tensors are small, and on a busy machine two threads spin and wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests look for words in what is printed; what a narrow terminal makes of tables is for test_widths.
os.environ["COLUMNS"] = "200"

import numpy as np
import pytest
import torch

from learn2perturb.registry import REGISTRIES

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Started by nohup, or in the background of a script, the tests of signals would find them ignored, as they should stay.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
CIFAR10_FILES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that checks the shapes of all calls, in all tests; those of test_shapes.py check theirs always."""
    parser.addoption("--check-shapes", action="store_true", help="check annotated shapes at every call (slower)")


@pytest.fixture(autouse=True)
def _shapes_checked(request: pytest.FixtureRequest):
    """Check every call against its annotated shapes, where that is asked for."""
    if not request.config.getoption("--check-shapes"):
        yield
        return
    from tests.shapes import checking

    with checking():
        yield


@pytest.fixture(autouse=True)
def _deterministic_seeds(request: pytest.FixtureRequest):
    """Seed every generator from the test's name, so that a test draws the same alone and among others."""
    seed = sum(position * byte for position, byte in enumerate(request.node.nodeid.encode(), start=1)) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _own_parts_forgotten(tmp_path_factory: pytest.TempPathFactory):
    """Take back what a test registers, and the modules of examples and of the test's folder that did."""
    modules, entries = set(sys.modules), [(one, dict(one._entries), one._looked) for one in REGISTRIES]
    dictionaries = [(one, dict(one)) for one in _registered_elsewhere()]
    yield
    for registry, known, looked in entries:
        registry._entries, registry._looked = known, looked
    for one, known in dictionaries:
        if one != known:
            one.clear()
            one.update(known)
    for name in set(sys.modules) - modules:
        if not name.startswith("learn2perturb"):
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith((str(EXAMPLES), str(tmp_path_factory.getbasetemp()))):
                del sys.modules[name]
                importlib.invalidate_caches()


def _registered_elsewhere() -> list[dict]:
    """Return the tables of parts that are imported, beside the registries."""
    places = {"learn2perturb.noise.laws": "_registered", "learn2perturb.diagnosis.checks": "CHECKS"}
    return [getattr(sys.modules[name], table) for name, table in places.items() if name in sys.modules]


@pytest.fixture(autouse=True)
def _no_global_side_effects():
    """Fail a test after which torch's global switches are not as they were."""
    before = _torch_switches()
    yield
    after = _torch_switches()
    torch.set_grad_enabled(before["grad"])
    torch.set_default_dtype(before["dtype"])
    torch.set_num_threads(before["threads"])
    torch.use_deterministic_algorithms(before["deterministic"])
    assert after == before, "the test, or the code under test, left a global switch of torch changed"


def _torch_switches() -> dict[str, object]:
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(scope="session")
def real_cifar10() -> pathlib.Path:
    """Folder that holds the real CIFAR-10 in the python layout; skipped where $LEARN2PERTURB_DATA_DIR has none.

    In CI a folder that is promised and empty is a failure: a skipped test would look like a passed one.
    """
    named = os.environ.get("LEARN2PERTURB_DATA_DIR", "")
    if not named:
        pytest.skip("needs the real CIFAR-10: set LEARN2PERTURB_DATA_DIR")
    root = pathlib.Path(named)
    missing = [name for name in CIFAR10_FILES if not (root / "cifar-10-batches-py" / name).is_file()]
    if missing:
        message = f"LEARN2PERTURB_DATA_DIR={named} lacks cifar-10-batches-py/{missing[0]}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return root
