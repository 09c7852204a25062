"""Symbolic sizes, each read from one input."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["read_sizes_from_first_inputs"]


def read_sizes_from_first_inputs(graph: ir.Graph) -> None:
    """Read each symbolic size from the first input that has it, in place.

    Before: Shape(past_key_values.7.value, start=2, end=3)
    After:  Shape(past_key_values.0.key, start=2, end=3)

    Which of several inputs of one size the exporter asks depends on how many there are.
    """
    first: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                first.setdefault(size.value, (value, axis))
    for node in graph:
        asked = node.inputs[0] if node.op_identifier() == ("", "Shape", "") else None
        if asked is None or not asked.is_graph_input() or asked.shape is None:
            continue
        start = node.attributes.get_int("start", 0)
        if node.attributes.get_int("end", len(asked.shape)) - start != 1:
            continue
        size = asked.shape[start]
        if isinstance(size, int) or size.value is None:
            continue
        value, axis = first[size.value]
        node.replace_input_with(0, value)
        node.attributes["start"] = ir.AttrInt64("start", axis)
        node.attributes["end"] = ir.AttrInt64("end", axis + 1)
