"""Fixtures every folder of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# No test may ask a model hub; one thread a session keeps parallel test processes from fighting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded checkpoints and outputs, beside the checkout."""
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden (checkpoints and outputs recorded from the originals)")
    return GOLDEN
