"""Weights of a graph that are read, computed and cast only when they are written."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from eptc.errors import EptcError
from eptc.tensors import Array, LazyTensor, as_dtype, numpy_dtype

__all__ = [
    "PACKED",
    "PART",
    "STACKED",
    "Piece",
    "WeightTensor",
    "bound",
    "derive",
    "join",
    "split",
    "to_proto",
]

# Between the names of the parts in the name of a packed weight: no parameter's name has it.
PACKED = "+"
# Before what a part of a weight is, in its name: `encoder.wi.weight@scale`.
PART = "@"
# Before what is stacked by task, in its name: `encoder.wi.tasks.B`.
STACKED = ".tasks."


class WeightTensor(ir.LazyTensor):
    """A lazy ONNX tensor that knows which numbers it stands for.

    Two tensors with equal `key` have equal numbers in the same layout, and are written once.
    `origin` is the same numbers before they became float32: in the 16-bit type they came in, or
    in the float64 they were folded in; None where they were float32 all along.
    """

    __slots__ = ("key", "origin")

    def __init__(
        self,
        compute: Callable[[], Array],
        dtype: ir.DataType,
        shape: tuple[int, ...],
        key: Hashable,
        name: str | None,
        origin: WeightTensor | None = None,
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(compute(), dtype=dtype), dtype, ir.Shape(shape), name=name
        )
        self.key = key
        self.origin = origin


def bound(source: LazyTensor, name: str | None) -> WeightTensor:
    """Return the float32 ONNX tensor of a weight; `name` is the initializer's."""
    key = ("weight", _Identity(source))
    if source.dtype == "float32":
        return WeightTensor(source.numpy, ir.DataType.FLOAT, source.shape, key, name)
    dtype = ir.DataType.from_numpy(numpy_dtype(source.dtype))
    origin = WeightTensor(source.numpy, dtype, source.shape, key, name)
    single = as_dtype(source, "float32")
    return WeightTensor(
        single.numpy, ir.DataType.FLOAT, single.shape, (key, "float32"), name, origin
    )


def derive(
    tensor: ir.TensorProtocol,
    step: Hashable,
    compute: Callable[[Array], Array],
    *,
    shape: tuple[int, ...] | None = None,
    dtype: ir.DataType | None = None,
    moves: bool = False,
) -> WeightTensor:
    """Return the lazy result of one more step on a tensor.

    Args:
        tensor: what the step reads; not read before the result is.
        step: what the step is, options included: equal steps on equal tensors are written once.
        compute: the step.
        shape: shape of the result where it differs.
        dtype: type of the result where it differs.
        moves: whether the step only moves numbers, so that it does the same to their origin.
    """
    source = tensor.key if isinstance(tensor, WeightTensor) else ("tensor", _Identity(tensor))
    origin = tensor.origin if moves and isinstance(tensor, WeightTensor) else None
    return WeightTensor(
        lambda: compute(tensor.numpy()),
        tensor.dtype if dtype is None else dtype,
        tuple(tensor.shape.numpy()) if shape is None else shape,
        (source, step),
        tensor.name,
        None if origin is None else derive(origin, step, compute, shape=shape),
    )


def join(tensors: Sequence[ir.TensorProtocol], *, axis: int, name: str) -> WeightTensor:
    """Return the lazy concatenation of tensors of one type along an axis.

    Args:
        tensors: the parts, in order; not read before the result is.
        axis: along which they are joined; the other sizes are equal.
        name: the initializer's name: those of its parts with `PACKED` between them.
    """
    shapes = [list(tensor.shape.numpy()) for tensor in tensors]
    shape = [*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :]]
    keys = tuple(
        tensor.key if isinstance(tensor, WeightTensor) else ("tensor", _Identity(tensor))
        for tensor in tensors
    )
    origins = [t.origin for t in tensors if isinstance(t, WeightTensor) and t.origin is not None]
    alike = len(origins) == len(tensors) and len({t.dtype for t in origins}) == 1
    return WeightTensor(
        lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=axis),
        tensors[0].dtype,
        tuple(shape),
        (keys, ("join", axis)),
        name,
        join(origins, axis=axis, name=name) if alike else None,
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of the tensors that a weight becomes.

    Args:
        suffix: what it is, in its name behind `PART`; empty for the one that keeps the name.
        dtype: its type.
        shape: its shape.
    """

    suffix: str
    dtype: ir.DataType
    shape: tuple[int, ...]


def split(
    tensor: ir.TensorProtocol,
    step: Hashable,
    compute: Callable[[Array], Sequence[Array]],
    pieces: Sequence[Piece],
) -> tuple[WeightTensor, ...]:
    """Return the lazy tensors that one step makes of a weight, such as integers and scales.

    The step is done once for all of them. It reads the weight as it was before it became
    float32, where that is known: what is rounded here is rounded once.

    Args:
        tensor: the weight; not read before one of the pieces is.
        step: what the step is, options included: equal steps on equal tensors are written once.
        compute: the step; one array for each piece.
        pieces: what it makes.
    """
    origin = tensor.origin if isinstance(tensor, WeightTensor) else None
    source = tensor if origin is None else origin
    key = source.key if isinstance(source, WeightTensor) else ("tensor", _Identity(source))
    once = _Once(lambda: compute(source.numpy()))
    return tuple(
        WeightTensor(
            functools.partial(once.take, number),
            piece.dtype,
            piece.shape,
            (key, step, number),
            f"{tensor.name}{PART}{piece.suffix}" if piece.suffix else tensor.name,
        )
        for number, piece in enumerate(pieces)
    )


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return a model's protobuf, with the numbers of every weight that is not in another file.

    Raises:
        EptcError: what computing a weight raised, which onnx_ir hides in an error of its own.
        MemoryError: likewise.
    """
    try:
        return ir.to_proto(model)
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while isinstance(cause, ir.serde.SerdeError):
            cause = cause.__cause__
        if isinstance(cause, EptcError | MemoryError):
            raise cause from cause.__cause__
        raise


# Bytes. Pieces up to this stay: they lie in the graph itself, which is written last.
_KEPT = 4096


class _Once:
    """What a step made, until each piece was asked for once; asked again, it is made again."""

    def __init__(self, compute: Callable[[], Sequence[Array]]) -> None:
        self._compute = compute
        self._made: dict[int, Array] = {}
        self._lock = threading.Lock()

    def take(self, number: int) -> Array:
        with self._lock:
            if number not in self._made:
                self._made = dict(enumerate(self._compute()))
            array = self._made[number]
            if array.nbytes > _KEPT:
                del self._made[number]
            return array


class _Identity:
    """Equal where it holds the very same object; keeps the object alive, so ids stay unique."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)
