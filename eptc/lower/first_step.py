"""The first step of an encoder-decoder as a graph of its own, made of the engine's two graphs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.lower.edit import constant

__all__ = ["first_step"]

_HIDDEN, _STATE = "encoder_hidden_states", "last_hidden_state"


def first_step(encoder: ir.Model, decoder: ir.Model) -> ir.Model:
    """Return a decoder that has no past and reads the encoder's state.

    Before: encoder ids, mask -> state, present.{i}.encoder.*
            decoder ids, mask, past_key_values.{i}.{decoder,encoder}.* -> logits,
            present.{i}.decoder.*
    After:  ids, mask, encoder_hidden_states -> logits, present.{i}.{decoder,encoder}.*

    What the encoder's graph makes its cache with moves behind the state; the decoder's own past
    is empty. No number changes, and no weight is read.

    Args:
        encoder: the engine's graph; it stays as it is.
        decoder: likewise.

    Raises:
        InternalError: the encoder's graph makes its cache of something else than its state.
    """
    model = decoder.clone()
    graph = model.graph
    state = next(value for value in encoder.graph.outputs if value.name == _STATE)
    hidden = ir.Value(name=_HIDDEN, type=state.type, shape=_with_rows(state, graph))
    cached = _Copier(graph, {state: hidden}).copy(
        [value for value in encoder.graph.outputs if value is not state]
    )
    inputs = {str(value.name): value for value in graph.inputs}
    ids = inputs["input_ids"]
    for name, past in inputs.items():
        if ".decoder." in name:
            ir.convenience.replace_all_uses_with(past, _empty(graph, ids, past))
        elif ".encoder." in name:
            made = cached[name.replace("past_key_values.", "present.", 1)]
            ir.convenience.replace_all_uses_with(past, made)
    kept = [value for name, value in inputs.items() if not name.startswith("past_key_values.")]
    graph.inputs.clear()
    graph.inputs.extend([*kept, hidden])
    graph.outputs.extend(cached.values())
    for domain, version in encoder.graph.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    return model


def _with_rows(state: ir.Value, graph: ir.Graph) -> ir.Shape:
    """Return [batch, rows, width], the rows called as the decoder calls those of its cache."""
    assert state.shape is not None
    past = next(value for value in graph.inputs if ".encoder.key" in str(value.name))
    assert past.shape is not None
    return ir.Shape([past.shape[0], past.shape[2], state.shape[2]])


def _empty(graph: ir.Graph, ids: ir.Value, past: ir.Value) -> ir.Value:
    """Return a cache [batch, heads, 0, width] without a token in it; equal ones are one value."""
    assert past.shape is not None
    assert past.dtype is not None
    path = f"empty_past_{past.shape[1]}_{past.shape[3]}"
    for node in graph:
        if node.name == f"{path}/ConstantOfShape":
            return node.outputs[0]
    rest = constant(graph, np.array([past.shape[1], 0, past.shape[3]], np.int64))
    batch = ir.node("Shape", [ids], attributes={"start": 0, "end": 1}, name=f"{path}/Shape")
    shape = ir.node(
        "Concat", [batch.outputs[0], rest], attributes={"axis": 0}, name=f"{path}/Concat"
    )
    zero = ir.tensor(np.zeros(1, past.dtype.numpy()))
    made = ir.node(
        "ConstantOfShape", [shape.outputs[0]], attributes={"value": zero},
        name=f"{path}/ConstantOfShape",
    )  # fmt: skip
    for node in (batch, shape, made):
        node.outputs[0].name = str(node.name)
    made.outputs[0].type, made.outputs[0].shape = past.type, past.shape
    _insert_first(graph, [batch, shape, made])
    return made.outputs[0]


class _Copier:
    """Copies nodes of one graph to the beginning of another.

    Args:
        graph: where to.
        known: values of the first graph that are there, as what.
    """

    def __init__(self, graph: ir.Graph, known: dict[ir.Value, ir.Value]) -> None:
        self._graph = graph
        self._known = dict(known)
        self._made: list[ir.Node] = []

    def copy(self, wanted: Iterable[ir.Value]) -> dict[str, ir.Value]:
        """Return the copies of some outputs, by name, with all that makes them."""
        found = {str(value.name): self._value(value) for value in wanted}
        _insert_first(self._graph, self._made)
        for name, value in found.items():
            value.name = name
        return found

    def _value(self, value: ir.Value) -> ir.Value:
        if value not in self._known:
            if value.is_initializer():
                self._known[value] = self._initializer(value)
            elif (node := value.producer()) is None:
                raise InternalError(
                    f"the encoder's graph makes its cache of {value.name}, not of its state alone"
                )
            else:
                self._node(node)
        return self._known[value]

    def _initializer(self, value: ir.Value) -> ir.Value:
        name, tensor = str(value.name), value.const_value
        assert tensor is not None
        there = self._graph.initializers.get(name)
        if there is not None and name.startswith("constants."):
            return constant(self._graph, np.array(tensor.numpy()))
        if there is None:
            there = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
            self._graph.register_initializer(there)
        return there

    def _node(self, node: ir.Node) -> None:
        inputs = [None if value is None else self._value(value) for value in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(),
            overload=node.overload, num_outputs=len(node.outputs), name=node.name,
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = f"encoder/{old.name}", old.type, old.shape
            self._known[old] = new
        self._made.append(copy)


def _insert_first(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    graph.insert_before(graph[0], nodes)
