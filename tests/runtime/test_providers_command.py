"""Choosing the provider on the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from eptc.cli import main
from eptc.runtime import probe_providers


def test_on_the_cpu(classifier: Any) -> None:
    """Options may be given with the name."""
    ran = CliRunner().invoke(
        main, ["run", str(classifier.path), "the film", "--provider", "cpu", "--allow-fallback"]
    )
    assert ran.exit_code == 0, ran.output
    options = ["--batch", "1", "--length", "4", "--repeat", "1"]
    ran = CliRunner().invoke(
        main,
        ["bench", str(classifier.path), "--provider", "cpu:arena_extend_strategy=kSameAsRequested",
         "--json", *options],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["providers"] == ["CPUExecutionProvider"]


@pytest.mark.parametrize("name", ["run", "bench", "parity"])
def test_every_command_has_them(name: str) -> None:
    text = CliRunner().invoke(main, [name, "--help"]).output
    assert "--provider NAME[:OPTION=VALUE,...]" in text
    assert "--allow-fallback" in text


def test_a_provider_that_does_not_start(classifier: Any) -> None:
    if probe_providers().get("CUDAExecutionProvider", "") is None:
        pytest.skip("CUDA starts on this machine")
    ran = CliRunner().invoke(
        main, ["run", str(classifier.path), "the film", "--provider", "cuda:device_id=0", "--json"]
    )
    assert ran.exit_code == 2
    assert "CUDAExecutionProvider cannot start" in ran.output


WRONG = {
    "no value": "cuda:device_id",
    "no name": "cuda:=1",
    "twice": "cuda:device_id=0,device_id=1",
    "an end": "cuda:",
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_wrong(classifier: Any, given: str) -> None:
    ran = CliRunner().invoke(main, ["run", str(classifier.path), "x", "--provider", given])
    assert ran.exit_code == 2
    assert f"--provider is '{given}'" in ran.output
    assert "such as cuda or tensorrt:cache=engines" in ran.output


def test_doctor_names_the_gpu() -> None:
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)["gpu"]
    assert {"driver", "onnxruntime is built for", "tensorrt"} <= set(found)
    assert found["onnxruntime is built for"].startswith("CUDA ")
