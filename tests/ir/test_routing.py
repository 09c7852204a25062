"""Routers that choose experts for a task."""

from __future__ import annotations

import numpy as np
import pytest

from eptc.errors import CheckpointError
from eptc.ir import TaskRouter
from eptc.tensors import ArrayTensor


def test_logits_that_overflow() -> None:
    """A temperature that no training had: said, where softmax would be of infinities."""
    ones = ArrayTensor("t", np.ones((2, 3)))
    router = TaskRouter(ones, None, ones, top_k=1, temperature=1e-320, normalization="sum")
    with pytest.raises(CheckpointError, match=r"temperature 1e-320 overflow"):
        router.route(0)
