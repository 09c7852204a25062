"""One kernel for rotary embedding."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from eptc.lower.edit import MICROSOFT, constant, drop, insert, made_by, replace
from eptc.pass_base import Contract, GraphPass

__all__ = ["FuseRotary"]

logger = logging.getLogger(__name__)

_HEADS_FIRST = (0, 2, 1, 3)


@dataclasses.dataclass(frozen=True)
class FuseRotary(GraphPass):
    """One kernel for rotary embedding.

    Before: h = Split(x); y = h * cos([a, a]) + Concat(-h[..., d/2:], h[..., :d/2]) * sin([a, a])
    After:  y = Split(RotaryEmbedding(x, row, cos(a), sin(a)))

    x [batch, n, heads * d]; Split is Reshape to [batch, n, heads, d] and Transpose; a [batch, n,
    d/2] are the angles. The kernel looks cosines up by position; it is given one row [d/2] for
    each token of the batch, so that the positions themselves may be any. Exact: the same
    products and sums. Main graph only. A sum is left alone, its reason logged at DEBUG, where
    it is not exactly this, or something else reads what would disappear.
    """

    name: ClassVar[str] = "fuse-rotary"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Fuse every rotation; return how many were."""
        fused = 0
        tables: dict[ir.Value, list[ir.Value]] = {}
        for node in tuple(model.graph):
            rotated = _rotated_half(node)
            if rotated is None:
                continue
            found = _match(node, rotated)
            if isinstance(found, str):
                logger.debug("%s: left %s alone: %s", self.name, node.name, found)
                continue
            _fuse(node, found, model.graph, tables)
            fused += 1
        if fused:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return fused


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """One rotation as it was found: x and angles as in the pass, target [0, 0, heads, d]."""

    x: ir.Value
    angles: ir.Value
    target: ir.Value
    heads: int
    width: int


def _rotated_half(node: ir.Node) -> ir.Node | None:
    """Return the Concat in x * cos + Concat(-x2, x1) * sin, or None where there is none."""
    if node.op_identifier() != ("", "Add", ""):
        return None
    product = made_by(node.inputs[1], "Mul")
    concat = made_by(product.inputs[0], "Concat") if product is not None else None
    if concat is None or len(concat.inputs) != 2:
        return None
    return concat if made_by(concat.inputs[0], "Neg") is not None else None


def _match(node: ir.Node, concat: ir.Node) -> _Rotation | str:
    """Return the rotation that ends in an Add, or why it is none."""
    plain, turned = (made_by(value, "Mul") for value in node.inputs)
    negated = made_by(concat.inputs[0], "Neg")
    if plain is None or turned is None or negated is None:
        return "it is no sum of two products"
    split = plain.inputs[0]
    transpose = made_by(split, "Transpose")
    reshape = made_by(transpose.inputs[0], "Reshape") if transpose is not None else None
    if split is None or transpose is None or reshape is None:
        return "what is rotated is not split into heads"
    target, x = reshape.inputs[1], reshape.inputs[0]
    known = None if target is None else target.const_value
    sizes: list[int] = [] if known is None else known.numpy().tolist()
    perm = tuple(transpose.attributes.get_ints("perm", ()))
    if perm != _HEADS_FIRST or len(sizes) != 4 or sizes[0] or sizes[1] or min(sizes[2:]) < 1:
        return "what is rotated is not split into heads"
    assert x is not None
    assert target is not None
    heads, width = sizes[2:]
    halves = (_bounds(concat.inputs[1], split), _bounds(negated.inputs[0], split))
    if width % 2 or halves[0] != (0, width // 2) or not _from_half(halves[1], width):
        return "it does not turn one half into the other"
    if concat.attributes.get_int("axis", 0) not in (-1, 3):
        return "it does not turn one half into the other"
    angles = {_angles(plain.inputs[1], "Cos"), _angles(turned.inputs[1], "Sin")}
    if len(angles) != 1 or None in angles:
        return "it is not turned by cosine and sine of the same angles"
    (angle,) = angles
    assert angle is not None
    if angle.shape is None or x.shape is None or list(angle.shape) != [*x.shape[:2], width // 2]:
        return "the angles are not known to be one row for each token"
    slices = [made_by(value, "Slice") for value in (concat.inputs[1], negated.inputs[0])]
    inside = [plain, turned, concat, negated, *slices]
    if any(n is None or len(n.outputs[0].uses()) != 1 for n in inside) or len(split.uses()) != 3:
        return "something else reads what is inside"
    if any(n is not None and n.outputs[0].is_graph_output() for n in (*inside, transpose)):
        return "a caller reads what is inside"
    return _Rotation(x, angle, target, heads, width)


def _bounds(value: ir.Value | None, x: ir.Value) -> tuple[int, int] | None:
    """Return (start, end) of x[..., start:end], or None where the value is no such slice."""
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return None
    numbers = [None if v is None or v.const_value is None else v.const_value for v in node.inputs]
    if any(tensor is None or tensor.size != 1 for tensor in numbers[1:]):
        return None
    start, end, axis, *step = (int(t.numpy().reshape(())) for t in numbers[1:] if t is not None)
    return (start, end) if axis in (-1, 3) and step in ([], [1]) else None


def _from_half(bounds: tuple[int, int] | None, width: int) -> bool:
    return bounds is not None and bounds[0] == width // 2 and bounds[1] >= width


def _angles(value: ir.Value | None, function: str) -> ir.Value | None:
    """Return a where the value is Unsqueeze(function(Concat(a, a)), 1), else None."""
    unsqueeze = made_by(value, "Unsqueeze")
    node = made_by(unsqueeze.inputs[0], function) if unsqueeze is not None else None
    concat = made_by(node.inputs[0], "Concat") if node is not None else None
    if unsqueeze is None or concat is None or len(concat.inputs) != 2:
        return None
    axes = unsqueeze.inputs[1].const_value if unsqueeze.inputs[1] is not None else None
    if axes is None or axes.numpy().tolist() != [1]:
        return None
    first, second = concat.inputs
    last = concat.attributes.get_int("axis", 0) in (-1, 2)
    return first if first is second and last else None


def _fuse(
    node: ir.Node, found: _Rotation, graph: ir.Graph, tables: dict[ir.Value, list[ir.Value]]
) -> None:
    """Put the kernel in the place of what was found."""
    if found.angles not in tables:
        tables[found.angles] = _tables(found, node, graph)
    rotated = insert(
        node,
        "RotaryEmbedding",
        [found.x, *tables[found.angles]],
        {"num_heads": found.heads, "interleaved": 0},
        domain=MICROSOFT,
    ).outputs[0]
    rotated.type, rotated.shape = found.x.type, found.x.shape
    reshape = insert(node, "Reshape", [rotated, found.target]).outputs[0]
    assert found.x.shape is not None
    reshape.shape = ir.Shape([*found.x.shape[:2], found.heads, found.width])
    split = insert(node, "Transpose", [reshape], {"perm": _HEADS_FIRST}).outputs[0]
    replace(node.outputs[0], split)
    drop(node.outputs[0])


def _tables(found: _Rotation, before: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """Return the row of each token [batch, n], and cosines and sines by row [rows, d/2]."""
    maker = found.angles.producer()
    path = (maker.name or "").rpartition("/")[0] if maker is not None else ""
    integer = ir.TensorType(ir.DataType.INT64)

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return insert(before, op_type, inputs, attributes, path=path).outputs[0]

    width = constant(graph, np.array([-1, found.width // 2], np.int64))
    flat = add("Reshape", found.angles, width)
    sizes = add("Shape", found.angles, start=0, end=2)
    count = add("ReduceProd", sizes, keepdims=0)
    zero, one = (constant(graph, np.array(number, np.int64)) for number in (0, 1))
    sizes.type = count.type = integer
    row = add("Reshape", add("Range", zero, count, one), sizes)
    return [row, add("Cos", flat), add("Sin", flat)]
