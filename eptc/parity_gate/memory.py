"""Whether a model can be verified as a whole, or has to be block by block."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable

from eptc.checkpoint import Checkpoint
from eptc.tensors import LazyTensor

__all__ = ["block_bytes", "fits_in_memory", "whole_model_bytes"]

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


def block_bytes(source: Checkpoint) -> int:
    """Return about how many bytes verifying a model block by block takes, at most.

    ::

        4 (4 B + 2 A + 4 L)

    As above, with B numbers in the largest block: the reference holds it once, ONNX Runtime maps
    and packs it, and what was freed is not given back at once.
    """
    blocks: collections.Counter[str] = collections.Counter()
    stacks = "|".join(map(re.escape, source.base.architecture.stacks))
    block = re.compile(rf"({stacks})\.\d+\.")
    for name, tensor in source.base.weights.items():
        if found := block.match(name):
            blocks[found[0]] += math.prod(tensor.shape)
    adapters = _numbers(source.contents.tensors.values())
    largest = max((math.prod(t.shape) for t in source.base.weights.values()), default=0)
    most = max(blocks.values(), default=0)
    return _FLOAT32 * (4 * most + 2 * adapters + _COPIES * largest)


def fits_in_memory(source: Checkpoint, limit: int) -> bool:
    """Whether a model can be verified as a whole.

    Args:
        source: the checkpoint; no tensor is read.
        limit: bytes that may be used beyond what the process holds already.
    """
    return whole_model_bytes(source) <= limit


def _numbers(tensors: Iterable[LazyTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
