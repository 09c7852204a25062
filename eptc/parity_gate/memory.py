"""Whether a model can be verified as a whole, or has to be block by block."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable

from eptc.checkpoint import Checkpoint
from eptc.tensors import LazyTensor

__all__ = ["block_bytes", "engine_bytes", "verified_by_block", "whole_model_bytes"]

_FLOAT32 = 4
# Float32 copies of the largest tensor: what is added to it, and both in float64 for some rows.
_COPIES = 4


def engine_bytes(source: Checkpoint) -> int:
    """Return about how many bytes running a float32 engine as a whole takes: its weights."""
    return _FLOAT32 * _numbers(source.weights.values())


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
    base = _numbers(source.weights.values())
    return _FLOAT32 * (2 * base + _beside(source))


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
    for name, tensor in source.weights.items():
        if found := block.match(name):
            blocks[found[0]] += math.prod(tensor.shape)
    most = max(blocks.values(), default=0)
    return _FLOAT32 * (4 * most + _beside(source))


def verified_by_block(source: Checkpoint, precision: str, limit: int | None) -> bool:
    """Whether an engine is verified block by block.

    It is where the whole model would not fit, and where weights are stored in 16 bits: their
    rounding adds up over blocks, and would hide what else is wrong.

    Args:
        source: the checkpoint; no tensor is read.
        precision: what the engine's matrices are stored as.
        limit: bytes that may be used beyond what the process holds already; None: any number.
    """
    narrow = precision in ("fp16-weights", "bf16-weights")
    return narrow or (limit is not None and whole_model_bytes(source) > limit)


def _beside(source: Checkpoint) -> int:
    """Return how many numbers either way takes beside the base: 2 A + 4 L."""
    adapters = _numbers(source.contents.tensors.values())
    largest = max((math.prod(t.shape) for t in source.weights.values()), default=0)
    return 2 * adapters + _COPIES * largest


def _numbers(tensors: Iterable[LazyTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
