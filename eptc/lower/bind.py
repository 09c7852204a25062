"""Give the graphs their weights, lazily."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from eptc.errors import BaseModelError
from eptc.lower.weights import bound
from eptc.tensors import LazyTensor

__all__ = ["bind", "unbound"]

_SHOWN = 3
_TYPES = ("float32", "float16", "bfloat16", "float64")


def unbound(graph: ir.Graph) -> list[ir.Value]:
    """Return the initializers that have no data yet, in order."""
    return [value for value in graph.initializers.values() if value.const_value is None]


def bind(graphs: Mapping[str, ir.Model], weights: Mapping[str, LazyTensor]) -> None:
    """Bind every unbound initializer to the weight of its name, in place; nothing is read.

    The graphs compute in float32: a weight of a 16-bit type is widened when it is read, which
    changes no number, one of float64 is rounded, and the tensor knows either
    (`WeightTensor.origin`).

    Args:
        graphs: traced graphs.
        weights: by canonical parameter name; further names are ignored.

    Raises:
        BaseModelError: weights are missing, or have another shape than the graph's, or a type
            that is none of float32, float16 and bfloat16.
    """
    values = [value for model in graphs.values() for value in unbound(model.graph)]
    _check(values, weights)
    for value in values:
        value.const_value = bound(weights[str(value.name)], value.name)


def _check(values: list[ir.Value], weights: Mapping[str, LazyTensor]) -> None:
    wanted = {str(value.name): _shape(value) for value in values}
    if missing := [name for name in wanted if name not in weights]:
        raise BaseModelError(
            f"{len(missing)} of {len(wanted)} weights are missing: {_first(missing)}",
            expected="every parameter of the task model",
            fix="use the base the checkpoint was trained on, complete",
        )
    wrong = [
        f"{name} is {weights[name].dtype}{list(weights[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if weights[name].shape != shape or weights[name].dtype not in _TYPES
    ]
    if wrong:
        raise BaseModelError(
            f"{len(wrong)} of {len(wanted)} weights do not fit: {_first(wrong)}",
            expected="the shapes that the base's configuration describes",
            fix="use the base the checkpoint was trained on, with its own config.json",
        )


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()


def _first(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
