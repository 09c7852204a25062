"""Binding: lazy, complete, and refusing what does not fit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from eptc.errors import BaseModelError
from eptc.lower import bind
from eptc.lower.weights import derive
from eptc.tensors import Array, ArrayTensor, ComputedTensor, LazyTensor


def unbound_model(**shapes: tuple[int, ...]) -> ir.Model:
    values = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in shapes.items()
    ]
    total = ir.node("Sum", values)
    total.outputs[0].name = "y"
    graph = ir.Graph([], total.outputs, nodes=[total], opset_imports={"": 20})
    for value in values:
        graph.initializers.add(value)
    return ir.Model(graph, ir_version=10)


def zeros(name: str, *shape: int, dtype: type = np.float32) -> LazyTensor:
    return ArrayTensor(name, np.zeros(shape, dtype))


def test_nothing_is_read() -> None:
    def fail() -> Array:
        raise AssertionError("read")

    model = unbound_model(w=(2, 3))
    bind({"model": model}, {"w": ComputedTensor("w", "float32", (2, 3), fail)})
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert (tensor.dtype, tuple(tensor.shape), tensor.nbytes) == (ir.DataType.FLOAT, (2, 3), 24)
    with pytest.raises(AssertionError, match="read"):
        tensor.numpy()


def test_further_weights_are_ignored() -> None:
    model = unbound_model(w=(2,))
    bind({"model": model}, {"w": zeros("w", 2), "other": zeros("other", 1)})


def test_bound_ones_are_kept() -> None:
    model = unbound_model(w=(2,))
    bind({"model": model}, {"w": zeros("w", 2)})
    before = model.graph.initializers["w"].const_value
    bind({"model": model}, {})
    assert model.graph.initializers["w"].const_value is before


REFUSED: dict[str, tuple[dict[str, LazyTensor], str]] = {
    "missing": ({}, "4 of 4 weights are missing: a, b, c and 1 more"),
    "one missing": (
        {"a": zeros("a", 2), "b": zeros("b", 2), "c": zeros("c", 2)},
        "1 of 4 weights are missing: d",
    ),
    "shape": (
        {name: zeros(name, 2) for name in "abc"} | {"d": zeros("d", 2, 1)},
        r"1 of 4 weights do not fit: d is float32\[2, 1\], not \[2\]",
    ),
    "type": (
        {name: zeros(name, 2) for name in "abc"} | {"d": zeros("d", 2, dtype=np.int32)},
        r"d is int32\[2\], not \[2\]",
    ),
}


@pytest.mark.parametrize(("weights", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(weights: dict[str, LazyTensor], message: str) -> None:
    """The first three are named, and nothing is bound half."""
    model = unbound_model(a=(2,), b=(2,), c=(2,), d=(2,))
    with pytest.raises(BaseModelError, match=message):
        bind({"model": model}, weights)
    assert all(value.const_value is None for value in model.graph.initializers.values())


def test_derived_keys() -> None:
    """Equal steps on one weight are one tensor, whichever graph reads it."""
    first, second = unbound_model(w=(2, 3)), unbound_model(w=(2, 3))
    bind({"first": first, "second": second}, {"w": zeros("w", 2, 3)})
    one, two = (m.graph.initializers["w"].const_value for m in (first, second))
    assert one is not None
    assert two is not None

    def double(array: Array) -> Array:
        return np.asarray(array * 2)

    def key(tensor: ir.TensorProtocol, step: str) -> object:
        return derive(tensor, step, double).key

    assert key(one, "double") == key(two, "double")
    assert key(one, "double") != key(one, "half")
    assert key(one, "double") != key(ir.tensor(np.zeros((2, 3), np.float32)), "double")
