"""What a build takes, predicted from shapes and types: memory, space and time."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Literal

from eptc.architectures import setting
from eptc.checkpoint import Checkpoint
from eptc.errors import OptionError
from eptc.lower import IN_FLIGHT
from eptc.lower.blocks import PRECISIONS
from eptc.machine import available_memory
from eptc.precision import SCHEMES, Precision
from eptc.tensors import LazyTensor, numpy_dtype

__all__ = ["WRITERS", "Plan", "Verification", "make_plan"]

Verification = Literal["whole model", "block by block", "none"]

# Threads that compute weights while others are written: more would wait for the disk.
WRITERS = 2
# Above this the reference gets a process of its own; below, starting one takes longer than it
# saves.
_LARGE = 256 * 2**20
# Resident with everything imported and a graph traced, measured: torch and transformers are
# nearly all of it.
_COMPILER = 760 * 2**20
_VERIFIER = 650 * 2**20
# Seconds to import everything, and for each block that is traced; bytes hashed, numbers folded
# and written, and numbers verified (weights times tokens of all probes) in a second: measured on
# two cores, for orders of magnitude.
_START, _TRACE, _HASHED, _WRITTEN, _VERIFIED = 8.0, 2.0, 1.2e9, 1.6e8, 6e10
# Tokens that the built-in probes feed a model, passes of either side counted.
_PROBED = 7500


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a build takes.

    Args:
        stored: what matrices are stored as: the precision's name; of `keep`, `fp32`,
            `fp16-weights` or `bf16-weights`; of `auto`, `mixed`.
        weight_bytes: size of `weights.bin`, within a page for each tensor.
        compiler_peak: most bytes resident in the compiler's process.
        verification: how the engine is compared with the reference.
        verifier_peak: most bytes resident in the process that verifies; 0 where none does.
        own_process: whether verification has a process of its own.
        in_flight: bytes of weights that may be in memory at once while they are written.
        seconds: wall time, an order of magnitude.
        limit: bytes that each process may have resident; None where nobody knows.
    """

    stored: str
    weight_bytes: int
    compiler_peak: int
    verification: Verification
    verifier_peak: int
    own_process: bool
    in_flight: int
    seconds: float
    limit: int | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def make_plan(
    source: Checkpoint,
    config: Any,
    *,
    precision: Precision,
    verify: bool,
    max_memory: int | None,
    runs_exact: bool = False,
    beside: int = 0,
    wide_tables: bool = False,
) -> Plan:
    """Predict a build; no weight is read.

    Args:
        source: the checkpoint.
        config: the task model's configuration.
        precision: of the engine.
        verify: whether the engine is verified.
        max_memory: bytes each process may have resident; None: what is available.
        runs_exact: whether the float32 engine is run on text before the precision is lowered.
        beside: bytes of weights beside those of the checkpoint's model.
        wide_tables: whether the table of tokens stays as wide as what is not quantised.

    Raises:
        OptionError: it cannot be done within `max_memory`, or, where the float32 engine is run,
            within what is available; what it takes is said.
    """
    weights = list(source.weights.values())
    weights += source.routed_tensors
    table = source.weights.get(source.base.architecture.embedding) if wide_tables else None
    tables: Precision = "fp16" if SCHEMES[precision].half is not None else "fp32"
    sizes = [_stored_bytes(t, tables if t is table else precision) for t in weights]
    limit = available_memory() if max_memory is None else max_memory
    in_flight, working = _working(weights, sizes, limit)
    compiler = _COMPILER + working
    if runs_exact:
        compiler = max(compiler, _exact_engine(source, precision, verify, limit))
    if max_memory is not None and compiler > max_memory:
        raise OptionError(
            f"the build takes {_mb(compiler)}, the limit is {_mb(max_memory)}",
            fix=f"give --max-memory {_mb(compiler)} or more",
        )
    stored = _stored_name(weights, precision)
    verification, verifier = _verification(source, limit, stored) if verify else ("none", 0)
    numbers = sum(math.prod(tensor.shape) for tensor in weights)
    own = verify and os.name == "posix" and 4 * numbers > _LARGE
    if verify and max_memory is not None and not own:
        verifier = compiler = max(compiler, verifier)
    if verify and max_memory is not None and verifier > max_memory:
        raise OptionError(
            f"verifying {verification} takes {_mb(verifier)}, the limit is {_mb(max_memory)}",
            fix=f"give --max-memory {_mb(verifier)} or more, or --no-verify, which the manifest "
            "records",
        )
    hashed = sum(tensor.nbytes for tensor in weights)
    traced = sum(
        min(3, int(setting(config, name))) for name in source.base.architecture.stacks.values()
    )
    seconds = _START + max(_TRACE * traced, hashed / _HASHED) + numbers / _WRITTEN
    if verify:
        seconds += hashed / _HASHED + _PROBED * numbers / _VERIFIED
    return Plan(
        stored, sum(sizes) + beside, compiler, verification, verifier, own,
        in_flight, seconds, limit,
    )  # fmt: skip


def _exact_engine(
    source: Checkpoint, precision: Precision, verify: bool, limit: int | None
) -> int:
    """Return how many bytes the compiler takes while it runs the float32 engine on text.

    Raises:
        OptionError: the engine cannot be run, or verified, as a whole.
    """
    from eptc.parity_gate.memory import engine_bytes, whole_model_bytes

    compiler = _COMPILER + engine_bytes(source)
    needed = max(compiler, _VERIFIER + whole_model_bytes(source)) if verify else compiler
    if limit is not None and needed > limit:
        why, other = "--data is scored", f"--precision {precision} without --data"
        if SCHEMES[precision].calibrated:
            why, other = f"--precision {precision} is calibrated", "--precision int8 or int4"
        elif precision == "auto":
            other = "--precision-plan without --data"
        raise OptionError(
            f"{why} on the whole float32 engine, which takes {_mb(needed)}; "
            f"the limit is {_mb(limit)}",
            fix=f"give --max-memory {_mb(needed)} or more, where the machine has it, or {other}: "
            "then one block of the model at a time is in memory",
        )
    return compiler


def _stored_bytes(tensor: LazyTensor, precision: Precision) -> int:
    """Return about how many bytes a weight takes: passes leave some matrices as they are."""
    numbers = math.prod(tensor.shape)
    if len(tensor.shape) < 2 or precision == "fp32":
        return 4 * numbers
    if precision == "keep":
        return numbers * numpy_dtype(tensor.dtype).itemsize
    if precision in ("fp16", "bf16"):
        return 2 * numbers
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    if precision not in PRECISIONS:
        return numbers + 4 * rows
    blocks = PRECISIONS[precision]
    return blocks.nbytes(rows, columns) if columns >= blocks.size else 4 * numbers


def _stored_name(weights: list[LazyTensor], precision: Precision) -> str:
    """Name what most matrices are stored as."""
    if precision != "keep":
        return "mixed" if precision == "auto" else precision
    kinds: dict[str, int] = {}
    for tensor in weights:
        if len(tensor.shape) > 1:
            kinds[tensor.dtype] = kinds.get(tensor.dtype, 0) + tensor.nbytes
    most = max(kinds, key=kinds.__getitem__, default="float32")
    return {"float16": "fp16-weights", "bfloat16": "bf16-weights"}.get(most, "fp32")


def _working(weights: list[LazyTensor], sizes: list[int], limit: int | None) -> tuple[int, int]:
    """Return how many bytes may be in flight while weights are written, and the most in use.

    A weight is there as it was read, as it is written, and once more the other way round.
    """
    each = [tensor.nbytes + 2 * size for tensor, size in zip(weights, sizes, strict=True)]
    largest = max(each, default=0)
    for in_flight in (IN_FLIGHT, IN_FLIGHT // 4):
        together = max((n for n, s in zip(each, sizes, strict=True) if s <= in_flight), default=0)
        working = max(largest, min(in_flight, sum(sizes)) + WRITERS * together)
        if limit is None or _COMPILER + working <= limit:
            return in_flight, working
    return 0, largest


def _verification(source: Checkpoint, limit: int | None, stored: str) -> tuple[Verification, int]:
    from eptc.parity_gate.memory import block_bytes, verified_by_block, whole_model_bytes

    if verified_by_block(source, stored, None if limit is None else limit - _VERIFIER):
        return "block by block", _VERIFIER + block_bytes(source)
    return "whole model", _VERIFIER + whole_model_bytes(source)


def _mb(count: int) -> str:
    return f"{math.ceil(count / 1e6)}MB"
