"""Norms that a graph spells out, node by node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from eptc.lower.edit import made_by

__all__ = ["around_means"]

_NORM = frozenset({"Add", "Div", "Mul", "Pow", "ReduceMean", "Reciprocal", "Sqrt", "Sub"})


def around_means(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Yield the nodes of each norm: the square, its mean, and what is computed with it."""
    for mean in nodes:
        if mean.op_type != "ReduceMean":
            continue
        source = _squared(mean)
        inside: set[ir.Value | None] = {source, *mean.outputs}
        found, waiting = [mean], [mean]
        while waiting:
            for reader in (r for v in waiting.pop().outputs for r in v.consumers()):
                others = [v for v in reader.inputs if v not in inside]
                if reader in found or reader.op_type not in _NORM:
                    continue
                if all(v is None or v.const_value is not None for v in others):
                    inside.update(reader.outputs)
                    found.append(reader)
                    waiting.append(reader)
        square = None if mean.inputs[0] is None else mean.inputs[0].producer()
        if square is not None and mean.inputs[0] is not source:
            yield square
        yield from found


def _squared(mean: ir.Node) -> ir.Value | None:
    """Return what a mean is the mean of: the x of mean(x * x) or mean(x ** 2), else its input."""
    value = mean.inputs[0]
    power, product = made_by(value, "Pow"), made_by(value, "Mul")
    if power is not None:
        return power.inputs[0]
    if product is not None and product.inputs[0] is product.inputs[1]:
        return product.inputs[0]
    return value
