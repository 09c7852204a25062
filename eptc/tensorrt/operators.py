"""The operators that TensorRT's ONNX parser takes, by its version, and graphs beside them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from eptc.errors import OptionError
from eptc.lower.element_types import element_types
from eptc.node_makers import maker

__all__ = ["Version", "check_graphs", "listed", "parse_version"]

_CONTROL = ("If", "Loop", "Scan")
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
# Where the types that the list names are not those of the first input.
_DATA = {"Where": 1}
_OUTPUT = ("Constant", "ConstantOfShape", "Range")

_TYPES = {
    ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16", ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "FP8", ir.DataType.FLOAT4E2M1: "FP4", ir.DataType.INT4: "INT4",
    ir.DataType.INT8: "INT8", ir.DataType.INT32: "INT32", ir.DataType.INT64: "INT64",
    ir.DataType.UINT8: "UINT8", ir.DataType.BOOL: "BOOL",
}  # fmt: skip

Version = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class OperatorList:
    """What a version of TensorRT takes.

    Args:
        version: the version asked for.
        known: the newest version that the list is of.
        source: where the list is from.
        opset: the newest opset.
        types: by operator, the element types of its data.
        constant_inputs: by operator, the inputs that must be known when the engine is built.
    """

    version: Version
    known: Version
    source: str
    opset: int
    types: Mapping[str, frozenset[str]]
    constant_inputs: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        asked, known = (".".join(map(str, v)) for v in (self.version, self.known))
        return asked if self.version <= self.known else f"{asked} (by the list of {known})"


@functools.cache
def _data() -> Any:
    place = importlib.resources.files("eptc.tensorrt") / "operators.json"
    return json.loads(place.read_text("utf-8"))


def parse_version(text: str | None) -> Version:
    """Return a version of TensorRT; None is the newest whose operators are known.

    Raises:
        OptionError: not a version, or one before all that are known.
    """
    data = _data()
    oldest, newest = min(map(_version, data["opsets"])), _version(data["version"])
    if text is None:
        return newest
    if not re.fullmatch(r"\d+\.\d+(\.\d+)*", text):
        raise OptionError(
            f"--tensorrt-version is {text!r}", expected=f"a version such as {data['version']}"
        )
    version = _version(text)
    if version < oldest:
        raise OptionError(
            f"--tensorrt-version is {text}, and what its ONNX parser takes is not known",
            expected=".".join(map(str, oldest)) + " or newer",
        )
    return version


@functools.cache
def listed(version: Version) -> OperatorList:
    """Return what a version takes; of one newer than all that are known, what the newest does.

    Operators are added from version to version, none was taken away since 10.0.
    """
    data = _data()
    since = {name: _version(first) for name, first in data["since"].items()}
    types = {
        name: frozenset(group["types"])
        for group in data["operators"]
        for name in group["names"]
        if since.get(name, version) <= version
    }
    opsets = {_version(v): last for v, (_, last) in data["opsets"].items()}
    return OperatorList(
        version,
        _version(data["version"]),
        data["source"],
        opsets[max(v for v in opsets if v <= version)],
        types,
        {name: tuple(inputs) for name, inputs in data["constant_inputs"].items()},
    )


def _version(text: str) -> Version:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def check_graphs(graphs: Mapping[str, ir.Model], version: Version) -> None:
    """Check that TensorRT takes graphs: standard operators, their types, no control flow.

    Args:
        graphs: by name, after the passes.
        version: TensorRT's.

    Raises:
        OptionError: the first node that it does not take, and the pass that made it.
    """
    known = listed(version)
    for key, model in graphs.items():
        opset = model.opset_imports.get("", 0)
        if opset > known.opset:
            raise OptionError(
                f"graph {key!r} has opset {opset}, which TensorRT {known.name} does not take",
                expected=f"{known.opset} at most",
            )
        types = element_types(model)
        for node in model.graph:
            for why in _refused(node, types, known):
                raise OptionError(
                    f"TensorRT {known.name} does not take graph {key!r}: node {node.name!r}, "
                    f"which {maker(node)} made, is {_called(node)}: {why}",
                    expected=f"operators and types that its parser has ({known.source})",
                    fix="leave that pass or precision out, name a newer --tensorrt-version, or "
                    "run the engine in ONNX Runtime (--target onnx)",
                )


def _called(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _refused(
    node: ir.Node, types: Mapping[ir.Value, ir.DataType], known: OperatorList
) -> Iterator[str]:
    """Yield why a node is not taken."""
    if node.domain:
        yield "no standard operator"
        return
    if node.op_type in _CONTROL:
        yield "control flow, of which graphs for TensorRT have none here"
        return
    if node.op_type not in known.types:
        yield "its parser has no such operator"
        return
    for index in known.constant_inputs.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and not _is_constant(value):
            yield f"input {index} is not known when the engine is built"
    allowed = known.types[node.op_type]
    data = _data_value(node)
    dtype = None if data is None else types.get(data)
    if dtype is not None and _TYPES.get(dtype) not in allowed:
        yield f"{dtype.name} is not among its types, {', '.join(sorted(allowed))}"
    if node.op_type in _QUANTIZING and _shifted(node):
        yield "its zero point is not 0"


def _data_value(node: ir.Node) -> ir.Value | None:
    if node.op_type in _OUTPUT:
        return node.outputs[0]
    place = _DATA.get(node.op_type, 0)
    return node.inputs[place] if place < len(node.inputs) else None


def _is_constant(value: ir.Value) -> bool:
    made = value.producer()
    return value.const_value is not None or (made is not None and made.op_type == "Constant")


def _shifted(node: ir.Node) -> bool:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or zero.const_value is None:
        return False
    return bool(np.any(zero.const_value.numpy().astype(np.float32)))
