"""Weights of a graph that are read, computed and cast only when they are written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import onnx_ir as ir

from eptc.tensors import Array, LazyTensor, numpy_dtype

__all__ = ["PACKED", "WeightTensor", "bound", "derive", "join"]

# Between the names of the parts in the name of a packed weight: no parameter's name has it.
PACKED = "+"


class WeightTensor(ir.LazyTensor):
    """A lazy ONNX tensor that knows which numbers it stands for.

    Two tensors with equal `key` have equal numbers in the same layout, and are written once.
    """

    __slots__ = ("key",)

    def __init__(
        self,
        compute: Callable[[], Array],
        dtype: ir.DataType,
        shape: tuple[int, ...],
        key: Hashable,
        name: str | None,
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(compute(), dtype=dtype), dtype, ir.Shape(shape), name=name
        )
        self.key = key


def bound(source: LazyTensor, name: str | None) -> WeightTensor:
    """Return the ONNX tensor of a weight; `name` is the initializer's."""
    dtype = ir.DataType.from_numpy(numpy_dtype(source.dtype))
    return WeightTensor(source.numpy, dtype, source.shape, ("weight", _Identity(source)), name)


def derive(
    tensor: ir.TensorProtocol,
    step: Hashable,
    compute: Callable[[Array], Array],
    *,
    shape: tuple[int, ...] | None = None,
    dtype: ir.DataType | None = None,
) -> WeightTensor:
    """Return the lazy result of one more step on a tensor.

    Args:
        tensor: what the step reads; not read before the result is.
        step: what the step is, options included: equal steps on equal tensors are written once.
        compute: the step.
        shape: shape of the result where it differs.
        dtype: type of the result where it differs.
    """
    source = tensor.key if isinstance(tensor, WeightTensor) else ("tensor", _Identity(tensor))
    return WeightTensor(
        lambda: compute(tensor.numpy()),
        tensor.dtype if dtype is None else dtype,
        tuple(tensor.shape.numpy()) if shape is None else shape,
        (source, step),
        tensor.name,
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
    return WeightTensor(
        lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=axis),
        tensors[0].dtype,
        tuple(shape),
        (keys, ("join", axis)),
        name,
    )


class _Identity:
    """Equal where it holds the very same object; keeps the object alive, so ids stay unique."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)
