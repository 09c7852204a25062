"""Weights of a graph that are read, computed and cast only when they are written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import onnx_ir as ir

from eptc.tensors import Array, LazyTensor, as_dtype, numpy_dtype

__all__ = ["PACKED", "WeightTensor", "bound", "derive", "join"]

# Between the names of the parts in the name of a packed weight: no parameter's name has it.
PACKED = "+"


class WeightTensor(ir.LazyTensor):
    """A lazy ONNX tensor that knows which numbers it stands for.

    Two tensors with equal `key` have equal numbers in the same layout, and are written once.
    `narrow` is the same numbers in the 16-bit type they came in; None where they have no such.
    """

    __slots__ = ("key", "narrow")

    def __init__(
        self,
        compute: Callable[[], Array],
        dtype: ir.DataType,
        shape: tuple[int, ...],
        key: Hashable,
        name: str | None,
        narrow: WeightTensor | None = None,
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(compute(), dtype=dtype), dtype, ir.Shape(shape), name=name
        )
        self.key = key
        self.narrow = narrow


def bound(source: LazyTensor, name: str | None) -> WeightTensor:
    """Return the float32 ONNX tensor of a weight; `name` is the initializer's."""
    key = ("weight", _Identity(source))
    if source.dtype == "float32":
        return WeightTensor(source.numpy, ir.DataType.FLOAT, source.shape, key, name)
    dtype = ir.DataType.from_numpy(numpy_dtype(source.dtype))
    narrow = WeightTensor(source.numpy, dtype, source.shape, key, name)
    wide = as_dtype(source, "float32")
    return WeightTensor(wide.numpy, ir.DataType.FLOAT, wide.shape, (key, "float32"), name, narrow)


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
        moves: whether the step only moves numbers, so that it does the same to narrow ones.
    """
    source = tensor.key if isinstance(tensor, WeightTensor) else ("tensor", _Identity(tensor))
    narrow = tensor.narrow if moves and isinstance(tensor, WeightTensor) else None
    return WeightTensor(
        lambda: compute(tensor.numpy()),
        tensor.dtype if dtype is None else dtype,
        tuple(tensor.shape.numpy()) if shape is None else shape,
        (source, step),
        tensor.name,
        None if narrow is None else derive(narrow, step, compute, shape=shape),
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
    narrow = [t.narrow for t in tensors if isinstance(t, WeightTensor) and t.narrow is not None]
    alike = len(narrow) == len(tensors) and len({t.dtype for t in narrow}) == 1
    return WeightTensor(
        lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=axis),
        tensors[0].dtype,
        tuple(shape),
        (keys, ("join", axis)),
        name,
        join(narrow, axis=axis, name=name) if alike else None,
    )


class _Identity:
    """Equal where it holds the very same object; keeps the object alive, so ids stay unique."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)
