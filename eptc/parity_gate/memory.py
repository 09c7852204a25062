"""Whether a model can be verified as a whole, or has to be block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable

from eptc.checkpoint import Checkpoint
from eptc.tensors import LazyTensor

__all__ = ["fits_in_memory", "whole_model_bytes"]

_FLOAT32 = 4
# Float32 copies of the largest tensor: what is added to it, and both in float64 for some rows.
_COPIES = 4


def whole_model_bytes(source: Checkpoint) -> int:
    """Return about how many bytes verifying a model as a whole takes, at most.

    ::

        4 (2 P + 2 A + 4 L)

    P numbers in the base are held twice, by the PyTorch reference and by ONNX Runtime, whatever
    type they are stored in: both compute in float32. A numbers in adapters and heads are read and
    copied into the reference. Comparing the weights takes some copies of the largest tensor, of L
    numbers. The activations of the probes, some hundred tokens at a time, are small beside that.

    Args:
        source: the checkpoint; no tensor is read.
    """
    base = _numbers(source.base.weights.values())
    adapters = _numbers(source.contents.tensors.values())
    largest = max((math.prod(t.shape) for t in source.base.weights.values()), default=0)
    return _FLOAT32 * (2 * base + 2 * adapters + _COPIES * largest)


def fits_in_memory(source: Checkpoint, limit: int) -> bool:
    """Whether a model can be verified as a whole.

    Args:
        source: the checkpoint; no tensor is read.
        limit: bytes that may be used beyond what the process holds already.
    """
    return whole_model_bytes(source) <= limit


def _numbers(tensors: Iterable[LazyTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
