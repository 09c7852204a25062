"""One kernel for attention."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from eptc.lower.edit import MICROSOFT, constant, drop, insert, made_by, replace
from eptc.pass_base import Contract, GraphPass

__all__ = ["FuseAttention"]

logger = logging.getLogger(__name__)

_HEADS_FIRST = (0, 2, 1, 3)


@dataclasses.dataclass(frozen=True)
class FuseAttention(GraphPass):
    """One kernel for attention.

    Before: y = Merge(MatMul(Softmax(MatMul(Split(q), Split(k)^T) * scale + bias), Split(v)))
    After:  y = MultiHeadAttention(q, k, v, bias)    q, k, v, y [batch, n, heads * d]

    Split is Reshape to [batch, n, heads, d] and Transpose, Merge the way back; bias [batch or
    1, heads or 1, queries, keys]. With a cache, Concat(past, Split(k)) becomes part of the
    node: past [batch, heads, past, d] in, present out. Keys and values that come with their
    heads first (a decoder's cross-attention) stay so.

    The mask stays what is added to the scores, so that holes in it and rows without any key
    keep their meaning; lengths of keys could not say so. A bias that is the same for all
    queries is expanded once. Exact: the same sums in another order. Main graph only. A Softmax
    is left alone, its reason logged at DEBUG, where anything else reads what would disappear,
    where shapes are unknown, or where groups of heads share keys: GroupQueryAttention refuses
    batches that continue a cache by more than one token.

    Args:
        only_cached: leave attention alone that has neither cache nor keys with heads first.
    """

    name: ClassVar[str] = "fuse-attention"
    contract: ClassVar[Contract] = "exact"
    only_cached: bool = False

    def rewrite(self, model: ir.Model) -> int:
        """Fuse every attention; return how many were."""
        fused = 0
        expanded: dict[ir.Value, ir.Value] = {}
        for node in tuple(model.graph):
            if node.op_identifier() != ("", "Softmax", ""):
                continue
            try:
                found = _match(node)
                if self.only_cached and not found.cached:
                    raise _LeftAloneError("its keys are not cached")
            except _LeftAloneError as reason:
                logger.debug("%s: left %s alone: %s", self.name, node.name, reason)
                continue
            _fuse(found, model.graph, expanded)
            fused += 1
        if fused:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return fused


class _LeftAloneError(Exception):
    """Why a Softmax is no attention that can be fused."""


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Keys or values of one attention.

    Args:
        new: [batch, n, heads * d], or [batch, heads, n, d] where `heads_first`.
        past: [batch, heads, past, d]; None without a cache.
        present: what past and new are concatenated to.
        heads_first: how `new` is laid out.
    """

    new: ir.Value
    past: ir.Value | None = None
    present: ir.Value | None = None
    heads_first: bool = False


@dataclasses.dataclass(frozen=True)
class _Attention:
    """One attention as it was found."""

    query: ir.Value
    keys: _Keys
    values: _Keys
    bias: ir.Value | None
    scale: float
    heads: int
    queries: int | ir.SymbolicDim
    output: ir.Value

    @property
    def cached(self) -> bool:
        return self.keys.past is not None or self.keys.heads_first


def _match(softmax: ir.Node) -> _Attention:
    """Return the attention around a Softmax; raise `_LeftAloneError` where there is none."""
    mix = _reader(softmax.outputs[0], "MatMul")
    merge = _reader(_reader(mix.outputs[0], "Transpose", _HEADS_FIRST).outputs[0], "Reshape")
    scores = softmax.inputs[0]
    if softmax.attributes.get_int("axis", -1) not in (-1, 3) or mix.inputs[0] is scores:
        raise _LeftAloneError("it is not over keys")
    scaled, bias = _operands(scores, "Add")
    product, factor = _operands(scaled, "Mul")
    scale = 1.0 if factor is None else _number(factor)
    matmul = made_by(product, "MatMul")
    if matmul is None or product is None or len(product.uses()) != 1:
        raise _LeftAloneError("it is not over a product of queries and keys")
    query, heads = _split(matmul.inputs[0], _HEADS_FIRST)
    if _sizes(merge)[:2] != [0, 0] or len(_sizes(merge)) != 3:
        raise _LeftAloneError("its heads are not merged")
    keys, values = _keys(matmul.inputs[1], heads), _values(mix.inputs[1], heads)
    if (keys.past is None, keys.heads_first) != (values.past is None, values.heads_first):
        raise _LeftAloneError("keys and values come in different ways")
    shape = product.shape
    if shape is None or len(shape) != 4:
        raise _LeftAloneError("the shape of the scores is not known")
    if bias is not None:
        _check_bias(bias, shape, heads)
    return _Attention(query, keys, values, bias, scale, heads, shape[2], merge.outputs[0])


def _reader(value: ir.Value, op_type: str, perm: tuple[int, ...] | None = None) -> ir.Node:
    """Return the one node that reads a value, as its first input."""
    uses = tuple(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        node, index = uses[0]
        fits = perm is None or _perm(node) == perm
        if node.op_identifier() == ("", op_type, "") and index == 0 and fits:
            return node
    raise _LeftAloneError(f"{op_type} is not what reads {value.name}, or not alone")


def _operands(value: ir.Value | None, op_type: str) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the scores in an Add or Mul and what they meet; a value itself where it is none."""
    node = made_by(value, op_type)
    if node is None or value is None:
        return value, None
    if len(value.uses()) != 1 or value.is_graph_output():
        raise _LeftAloneError(f"something else reads {value.name}")
    first, second = node.inputs
    inner = [made_by(first, op) for op in ("MatMul", "Mul")]
    return (first, second) if any(inner) else (second, first)


def _number(value: ir.Value) -> float:
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or tensor.dtype != ir.DataType.FLOAT:
        raise _LeftAloneError("the scores are not scaled by one number")
    return float(tensor.numpy().reshape(()))


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))


def _sizes(reshape: ir.Node) -> list[int]:
    """Return the constant target of a Reshape; empty where it is computed."""
    target = reshape.inputs[1].const_value if reshape.inputs[1] is not None else None
    return [] if target is None else [int(size) for size in target.numpy()]


def _split(value: ir.Value | None, perm: tuple[int, ...]) -> tuple[ir.Value, int]:
    """Return x and the number of heads in Transpose(Reshape(x, [0, 0, heads, d]))."""
    transpose = made_by(value, "Transpose")
    reshape = made_by(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or _perm(transpose) != perm:
        raise _LeftAloneError("its queries, keys or values are not split into heads")
    sizes, x = _sizes(reshape), reshape.inputs[0]
    if len(sizes) != 4 or sizes[:2] != [0, 0] or min(sizes[2:]) < 1 or x is None:
        raise _LeftAloneError("its queries, keys or values are not split into heads")
    if len(x.shape or ()) != 3:
        raise _LeftAloneError("the shape of what is split into heads is not known")
    return x, sizes[2]


def _keys(value: ir.Value | None, heads: int) -> _Keys:
    """Return the keys behind a value [batch, heads, d, n]."""
    transpose = made_by(value, "Transpose")
    if transpose is not None and _perm(transpose) == (0, 1, 3, 2):
        return _values(transpose.inputs[0], heads)
    return _with_heads(_split(value, (0, 2, 3, 1)), heads)


def _values(value: ir.Value | None, heads: int) -> _Keys:
    """Return the values behind a value [batch, heads, n, d]."""
    assert value is not None
    concat = made_by(value, "Concat")
    if concat is not None:
        past = concat.inputs[0]
        if len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in (-2, 2):
            raise _LeftAloneError("its cache does not grow by position")
        if past is None or past.shape is None or len(past.shape) != 4 or past.shape[1] != heads:
            raise _LeftAloneError("groups of heads share keys, or the cache has no known shape")
        new = _with_heads(_split(concat.inputs[1], _HEADS_FIRST), heads)
        return dataclasses.replace(new, past=past, present=value)
    if made_by(value, "Transpose") is not None:
        return _with_heads(_split(value, _HEADS_FIRST), heads)
    if value.shape is None or len(value.shape) != 4 or value.shape[1] != heads:
        raise _LeftAloneError("groups of heads share keys, or their shape is not known")
    return _Keys(value, heads_first=True)


def _with_heads(split: tuple[ir.Value, int], heads: int) -> _Keys:
    if split[1] != heads:
        raise _LeftAloneError("groups of heads share keys")
    return _Keys(split[0])


def _check_bias(bias: ir.Value, scores: ir.Shape, heads: int) -> None:
    """Check that the kernel can add a bias, expanded over the queries if need be."""
    shape = bias.shape
    if shape is None or len(shape) != 4:
        raise _LeftAloneError("the shape of what is added to the scores is not known")
    if shape[1] not in (1, heads) or shape[3] == 1 or shape[2] not in (1, scores[2]):
        raise _LeftAloneError("what is added to the scores is broadcast in another way")


def _fuse(found: _Attention, graph: ir.Graph, expanded: dict[ir.Value, ir.Value]) -> None:
    """Put the kernel in the place of what was found."""
    before = found.output.producer()
    assert before is not None
    bias = found.bias
    if bias is not None and bias.shape is not None and bias.shape[2] != found.queries:
        if bias not in expanded:
            expanded[bias] = _expand(bias, found.query, before, graph)
        bias = expanded[bias]
    keys, values = found.keys, found.values
    node = insert(
        before,
        "MultiHeadAttention",
        [found.query, keys.new, values.new, None, None, bias, keys.past, values.past],
        {"num_heads": found.heads, "scale": found.scale},
        domain=MICROSOFT,
        outputs=1 if keys.present is None else 3,
    )
    replace(found.output, node.outputs[0])
    for old, new in zip((keys.present, values.present), node.outputs[1:], strict=False):
        assert old is not None
        replace(old, new)
    drop(found.output, keys.present, values.present)


def _expand(bias: ir.Value, query: ir.Value, before: ir.Node, graph: ir.Graph) -> ir.Value:
    """Return a bias [batch, heads, 1, keys] with a row for each query."""
    one = constant(graph, np.array([1], np.int64))
    queries = insert(before, "Shape", [query], {"start": 1, "end": 2}, path="").outputs[0]
    queries.type, queries.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    shape = insert(before, "Concat", [one, one, queries, one], {"axis": 0}, path="").outputs[0]
    return insert(before, "Expand", [bias, shape], path="").outputs[0]
