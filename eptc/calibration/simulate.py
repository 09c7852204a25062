"""A float32 twin of a 16-bit engine, rounded where the engine rounds.

ONNX Runtime's CPU provider computes float16 graphs in float32 and rounds where it likes, and has
no bfloat16 arithmetic at all, so what it says of a 16-bit engine proves nothing. The twin rounds
every 16-bit value at the node that makes it, overflow to infinity included, and runs anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from eptc.bundle import write_manifest
from eptc.errors import BundleError
from eptc.lower.edit import insert, module
from eptc.lower.element_types import element_types
from eptc.lower.half import HALF, MOVES
from eptc.lower.sharing import is_scaling
from eptc.runtime.manifest import Manifest, load_manifest
from eptc.runtime.spec import GraphSpec, TensorSpec

__all__ = ["round_values", "simulated", "twin"]

_HALVES = frozenset(HALF.values())


def simulated(bundle: Path, out: Path) -> Manifest:
    """Write the float32 twin of a 16-bit engine.

    Interfaces are float32 where they were 16 bits. What a fused kernel keeps inside (an
    attention's scores) is not rounded.

    Args:
        bundle: folder of the engine.
        out: the folder to write; it must not exist.

    Raises:
        BundleError: not a bundle, or nothing in it is computed in 16 bits.
    """
    manifest = load_manifest(bundle)
    graphs, rounded = {}, 0
    for spec in manifest.graphs.values():
        model = ir.load(bundle / spec.file)
        rounded += round_values(model)
        proto = ir.to_proto(model)
        # As in every graph of a bundle: runtimes infer the types of values in between.
        del proto.graph.value_info[:]
        graphs[spec.file] = proto.SerializeToString(deterministic=True)
    if not rounded:
        raise BundleError(f"{bundle} computes nothing in 16 bits", fix="run the engine itself")
    out.mkdir()
    for name, content in graphs.items():
        (out / name).write_bytes(content)
    for name in manifest.files:
        if name not in graphs:
            # No links: onnx takes a file of two names for an attack, and so does onnx_ir.
            shutil.copyfile(bundle / name, out / name)
    twin = dataclasses.replace(
        manifest,
        graphs={name: _single(spec) for name, spec in manifest.graphs.items()},
        files={name: record for name, record in manifest.files.items() if name not in graphs},
    )
    return write_manifest(out, twin)


@contextlib.contextmanager
def twin(bundle: Path, within: Path | None = None) -> Iterator[Path]:
    """Yield the folder of a 16-bit engine's twin, which is removed at the end.

    Args:
        bundle: folder of the engine.
        within: where the folder is made; None: where temporary files are.
    """
    with tempfile.TemporaryDirectory(dir=within) as folder:
        simulated(bundle, Path(folder) / "twin")
        yield Path(folder) / "twin"


def round_values(model: ir.Model) -> int:
    """Replace 16-bit arithmetic by float32 and a rounding, in place; return how many roundings.

    Before: y = MatMul(x, W16)                          x, W16, y 16 bits
    After:  y = Cast(Cast(MatMul(x, Cast(W16)), 16))    x, y float32
    """
    return _Twin(model).write()


class _Twin:
    """Rewrites one graph.

    Args:
        model: the graph; the main graph alone is rewritten.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._types = element_types(model)
        self._wide: dict[ir.Value, ir.Value] = {}
        self._rounded = 0

    def write(self) -> int:
        """Rewrite it; return how many values are rounded."""
        for value in self._graph.inputs:
            if self._is_half(value):
                value.type, self._wide[value] = ir.TensorType(ir.DataType.FLOAT), value
        nodes = tuple(self._graph)
        for node in filter(is_scaling, nodes):
            self._widen(node.inputs[1])
        for node, following in itertools.zip_longest(nodes, nodes[1:]):
            self._rewrite(node, following)
        for index, value in enumerate(self._graph.outputs):
            wide = self._wide.get(value, value)
            if wide is not value:
                value.name, wide.name = wide.name, value.name
                self._graph.outputs[index] = wide
        return self._rounded

    def _widen(self, scale: ir.Value | None) -> None:
        """Store a scale in float32, which changes no number: it stays one that the file has."""
        if scale is None or not self._is_half(scale) or scale.const_value is None:
            return
        numbers = scale.const_value.numpy().astype(np.float32)
        scale.const_value, scale.type = (
            ir.tensor(numbers, name=scale.name), ir.TensorType(ir.DataType.FLOAT),
        )  # fmt: skip
        self._types[scale] = ir.DataType.FLOAT

    def _is_half(self, value: ir.Value | None) -> bool:
        return value is not None and self._types.get(value) in _HALVES

    def _rewrite(self, node: ir.Node, following: ir.Node | None) -> None:
        standard = "" if node.domain else node.op_type
        # Rows of a 16-bit table are widened, not the table.
        stored = standard in ("Gather", "Cast") and _is_initializer(node.inputs[0])
        for index, value in enumerate(node.inputs):
            if value is None or not self._is_half(value) or stored:
                continue
            if value not in self._wide:  # an initializer
                self._wide[value] = self._cast(value, node, ir.DataType.FLOAT)
            node.replace_input_with(index, self._wide[value])
        for value in node.outputs:
            if not self._is_half(value):
                continue
            half = value
            if standard in MOVES and not stored:
                value.type, self._wide[value] = ir.TensorType(ir.DataType.FLOAT), value
                continue
            if standard not in MOVES:
                self._rounded += 1
            if standard != "Cast" and not stored:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                half = self._cast(value, following, self._types[value])
            self._wide[value] = self._cast(half, following, ir.DataType.FLOAT)

    def _cast(self, value: ir.Value, before: ir.Node | None, to: ir.DataType) -> ir.Value:
        """Return a value in another type; `before` None: behind the last node."""
        maker = value.producer()
        path = "" if maker is None else module(maker)
        node = insert(before or self._graph[0], "Cast", [value], {"to": int(to)}, path=path)
        if before is None:
            self._graph.remove(node)
            self._graph.append(node)
        made = node.outputs[0]
        made.type, made.shape = ir.TensorType(to), value.shape
        return made


def _is_initializer(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _single(spec: GraphSpec) -> GraphSpec:
    def single(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            dataclasses.replace(tensor, dtype="float32") if tensor.dtype in HALF else tensor
            for tensor in tensors
        )

    return dataclasses.replace(spec, inputs=single(spec.inputs), outputs=single(spec.outputs))
