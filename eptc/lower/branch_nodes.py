"""What lowerings of branches need: nodes before a linear, and weights that are made lazily."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from eptc.ir import Float64
from eptc.ir.numbers import rounded
from eptc.lower.calls import Call
from eptc.lower.edit import constant
from eptc.lower.weights import WeightTensor
from eptc.tensors import Array

__all__ = ["BranchNodes"]


class BranchNodes:
    """Inserts the nodes of a linear's branches before it.

    A node that would do what an earlier one does already is not made: linears that read the same
    input with the same weights share what they compute of it.

    Args:
        call: the linear.
    """

    def __init__(self, call: Call) -> None:
        graph = call.node.graph
        assert isinstance(graph, ir.Graph)
        assert call.x.shape is not None
        self.call = call
        self.graph = graph
        # How many axes the linear's input has before its features.
        self.leading = len(call.x.shape) - 1
        self._taken = {node.name for node in graph}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: Any,
    ) -> ir.Value:
        """Return the output of a node of one output."""
        return self.ops(op_type, inputs, (dtype,), attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtypes: Sequence[ir.DataType],
        attributes: Mapping[str, Any],
    ) -> Sequence[ir.Value]:
        """Return the outputs of a node, which have these types."""
        node = ir.node(
            op_type,
            inputs,
            attributes=dict(attributes),
            num_outputs=len(dtypes),
            name=self._name(op_type),
        )
        for known in inputs[0].consumers():
            if known is not node and _alike(known, node):
                node.graph = None
                for index in range(len(inputs)):
                    node.replace_input_with(index, None)
                return known.outputs
        for value, dtype in zip(node.outputs, dtypes, strict=True):
            value.name, value.dtype = None, dtype
        self.graph.insert_before(self.call.node, node)
        self._taken.add(node.name)
        return node.outputs

    def _name(self, op_type: str) -> str:
        base = f"{self.call.path}/branch/{op_type}"
        names = (f"{base}_{i}" if i else base for i in itertools.count())
        return next(name for name in names if name not in self._taken)

    def reshaped(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Return a value with other axes behind the leading ones."""
        return self.op("Reshape", value, self.numbers(*[0] * self.leading, *sizes))

    def numbers(self, *numbers: int) -> ir.Value:
        """Return an initializer of integers."""
        return constant(self.graph, np.array(numbers, np.int64))

    def weight(
        self, name: str, shape: tuple[int, ...], compute: Callable[[], Float64], key: Hashable
    ) -> ir.Value:
        """Return an initializer whose numbers are computed when it is written, rounded once.

        Args:
            name: its name; one that is there already is returned.
            shape: of the numbers.
            compute: makes them.
            key: what they are, the same for the same numbers.
        """
        if name in self.graph.initializers:
            return self.graph.initializers[name]

        def computed() -> Array:
            with np.errstate(over="ignore", invalid="ignore"):  # refused below
                found = np.ascontiguousarray(compute())
            return rounded(found, "float32", f"what the experts of {self.call.path} add")

        tensor = WeightTensor(computed, ir.DataType.FLOAT, shape, ("branch", key), name)
        value = ir.Value(name=name, const_value=tensor)
        value.dtype, value.shape = tensor.dtype, ir.Shape(shape)
        self.graph.register_initializer(value)
        return value


def _alike(a: ir.Node, b: ir.Node) -> bool:
    """Whether two nodes compute the same."""
    return (
        a.op_identifier() == b.op_identifier()
        and tuple(a.inputs) == tuple(b.inputs)
        and {name: repr(x.value) for name, x in a.attributes.items()}
        == {name: repr(x.value) for name, x in b.attributes.items()}
    )
