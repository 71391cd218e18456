"""The paths of the practitioner and of the reviewer, each one shell script, run as a user would run it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.compat, pytest.mark.timeout(900)]


def run(name: str, folder: pathlib.Path) -> str:
    settings = os.environ | {
        "L2P": f"{sys.executable} -m learn2perturb",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", str(EXAMPLES / name), str(folder)], env=settings, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_practitioner_gets_from_a_folder_of_images_to_a_deployed_network(tmp_path, timm):
    import onnxruntime

    said = run("practitioner.sh", tmp_path)
    assert "tensors fit" in said and "frozen: " in said and "draws its noise anew" in said
    session = onnxruntime.InferenceSession((tmp_path / "deployed" / "hardened.onnx").read_bytes())
    assert session.get_inputs()[0].shape[1:] == [3, 16, 16]
    assert "timm:test_byobnet" in (tmp_path / "hardened" / "config.yaml").read_text()
    assert "<html" in (tmp_path / "page.html").read_text()[:2000]


def test_the_reviewer_gets_from_a_strangers_file_to_a_page_on_the_claim(tmp_path):
    said = run("reviewer.sh", tmp_path)
    assert "4 tensors fit; 'module.' left out of the keys" in said
    record = json.loads((tmp_path / "diagnosis.json").read_text())
    assert record["metadata"]["model"] == "stranger:build of stranger.pt"
    assert "<html" in (tmp_path / "page.html").read_text()[:2000]
