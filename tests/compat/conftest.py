"""Other people's libraries: missing in CI, or with LEARN2PERTURB_REQUIRE_COMPAT=1, is a failure, elsewhere a skip."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
import warnings

import pytest
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.models.foreign import library

REQUIRED = bool(os.environ.get("CI")) or os.environ.get("LEARN2PERTURB_REQUIRE_COMPAT", "") not in ("", "0")


def import_or_skip(name: str) -> types.ModuleType:
    """Import the library ``name``; skip the test where it is missing."""
    try:
        library("torchvision")  # timm and adv_lib import it too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old names that they import: not ours to fix
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}): make setup")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Turn every skip in this folder into a failure where the libraries are required: it would look like a pass."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and here it must run: {call.excinfo and call.excinfo.value}"
    return report


@pytest.fixture(scope="session")
def torchvision() -> types.ModuleType:
    """The library torchvision, with its networks."""
    import_or_skip("torchvision.models")
    return import_or_skip("torchvision")


@pytest.fixture(scope="session")
def timm() -> types.ModuleType:
    """The library timm."""
    return import_or_skip("timm")


@pytest.fixture(scope="session")
def torchattacks() -> types.ModuleType:
    """The library torchattacks."""
    return import_or_skip("torchattacks")


@pytest.fixture(scope="session")
def foolbox() -> types.ModuleType:
    """The library foolbox."""
    return import_or_skip("foolbox")


@pytest.fixture(scope="session")
def adv_lib() -> types.ModuleType:
    """The attacks of adversarial-library."""
    # It draws curves with visdom if asked to, which nobody does here, and which does not build everywhere.
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))
    return import_or_skip("adv_lib.attacks")


@pytest.fixture(scope="session")
def art() -> types.ModuleType:
    """The evasion attacks of the Adversarial Robustness Toolbox."""
    import_or_skip("art.estimators.classification")
    return import_or_skip("art.attacks.evasion")


EPS = 0.1  # where a third of the digits fall


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small stochastic network, trained in seconds."""
    config = l2p.TrainConfig(
        defense="learn2perturb", model="digits_cnn", dataset="digits", recipe="fast", engine="plain", device="cpu",
        epochs=4, batch_size=64, eps=EPS, attack_steps=2, attack_step_size=EPS / 2, monitor=0, tensorboard=False,
    )  # fmt: skip
    model = l2p.train(config, out=tmp_path_factory.mktemp("compat") / "run").model.eval()
    model.zero_grad()  # so that a gradient left by an attack is seen
    return model


@pytest.fixture(scope="session")
def plain(noisy: nn.Module) -> nn.Module:
    """The same network without its noise."""
    return l2p.remove_noise(copy.deepcopy(noisy))


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Test images in [0, 1] and their labels."""
    data = l2p.load_data("digits", "test", limit=300)
    return data.images.float() / 255, data.labels
