"""From a module on fake weights to an ONNX graph without weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eptc.errors import InternalError
from eptc.lower.graph_spec import GraphSpec, example
from eptc.lower.naming import name_by_module
from eptc.lower.simplify import simplify

__all__ = ["export"]

# onnx_ir says of each weight that it has no data yet, which is how it is meant.
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export(
    spec: GraphSpec,
    mode: FakeTensorMode,
    parameters: Mapping[str, str],
    opset: int,
    grow: Callable[[ir.Graph], None] = lambda _: None,
) -> ir.Model:
    """Trace one graph.

    Args:
        spec: what to trace.
        mode: the mode its fake parameters belong to.
        parameters: canonical parameter name by name in the task model.
        opset: version of the ONNX operators.
        grow: what to do to the simplified graph, in place, while its nodes know their modules.

    Returns:
        A model with the spec's interface whose weights are initializers without data.
    """
    with _quiet(), mode:
        arguments = tuple(example(port) for port in spec.inputs)
        program = torch.export.export(
            spec.module, arguments, dynamic_shapes=_dynamic(spec), strict=False
        )
        onnx_program = torch.onnx.export(
            program, dynamo=True, optimize=False, opset_version=opset, verbose=False
        )
    assert onnx_program is not None
    model: ir.Model = onnx_program.model
    _name_interface(model.graph, spec)
    _unbind(model.graph, parameters)
    with _quiet():
        simplify(model)
    grow(model.graph)
    name_by_module(model.graph)
    _strip(model)
    return model


def _dynamic(spec: GraphSpec) -> tuple[object, ...]:
    """Return which sizes are symbolic, in the shape of the module's arguments."""
    shapes = [
        {axis: torch.export.Dim.DYNAMIC for axis, n in enumerate(port.shape) if isinstance(n, str)}
        for port in spec.inputs
    ]
    fixed = spec.module.forward.__code__.co_argcount - 1
    if len(shapes) > fixed:
        return (*shapes[:fixed], tuple(shapes[fixed:]))
    return tuple(shapes)


def _name_interface(graph: ir.Graph, spec: GraphSpec) -> None:
    """Give inputs and outputs their names and sizes, and the sizes in between the same names."""
    symbols: dict[str, str] = {}
    for values, ports in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if len(values) != len(ports):
            raise InternalError(f"a graph of {len(values)} ports was traced for {len(ports)}")
        for value, port in zip(values, ports, strict=True):
            assert value.shape is not None
            for found, wanted in zip(value.shape, port.shape, strict=True):
                if isinstance(found, int) is not isinstance(wanted, int):
                    raise InternalError(f"{port.name} was traced with {value.shape}")
                if isinstance(wanted, str):
                    symbols.setdefault(str(found), wanted)
            value.name = port.name
            value.shape = ir.Shape(port.shape)
    for node in graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = ir.Shape(_sizes(value.shape, symbols))


def _sizes(shape: ir.Shape, symbols: Mapping[str, str]) -> list[int | str | None]:
    return [n if isinstance(n, int) else symbols.get(str(n)) for n in shape]


def _unbind(graph: ir.Graph, parameters: Mapping[str, str]) -> None:
    """Rename the weights to their canonical names, tied ones to one, and drop their data."""
    for name, value in list(graph.initializers.items()):
        parameter = parameters.get(name.removeprefix("model."))
        if parameter is None:
            continue
        if parameter in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[parameter])
            del graph.initializers[name]
            continue
        value.const_value = None
        value.name = parameter


def _strip(model: ir.Model) -> None:
    """Remove what tells where and when the graph was traced."""
    model.producer_name, model.producer_version, model.doc_string = "eptc", None, None
    model.metadata_props.clear()
    model.graph.name, model.graph.doc_string = "eptc", None
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    values = ir.convenience.create_value_mapping(model.graph)
    for value in values.values():
        value.metadata_props.clear()
        value.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say about their own internals."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Deprecations inside torch.export and torch.onnx: nothing a caller can change.
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
