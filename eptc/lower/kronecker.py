"""Experts that are Kronecker products, mixed token by token without their dense matrices.

An expert of size s adds vec(B (A X) K^T) to x viewed as X [in / s, s] (specs, paper). How that is
computed depends on its size:

* Small ones are products with kron(A, I) and kron(B, I), those of all sizes side by side. These
  multiply zeros, but are few large products, which is what processors are fast at.
* Large ones are products of small matrices, one for each token: A X and B Z, s columns wide.

Experts of one size share A X and B Z. In between, each expert's share is scaled by its gate, and
one product with the kernels applies and adds them up.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.ir import Adapter, Branch, Float64, Kronecker, Routed
from eptc.ir.numbers import kron, read
from eptc.lower.branch_nodes import BranchNodes
from eptc.lower.calls import Call
from eptc.tensors import LazyTensor

__all__ = ["mix_kronecker"]

# Columns r s of kron(A, I) up to which a size is a small one. At 64 both ways cost the same in
# ONNX Runtime on processors with 16 float32 lanes; at 128 small matrices cost a third.
SMALL = 64


def mix_kronecker(adapter: Adapter, gates: ir.Value, call: Call) -> ir.Value:
    """Insert the experts of an adapter before its linear; return their sum [..., out].

    Args:
        adapter: its branches are `Kronecker` deltas of one A and B.
        gates: [..., experts], 0 for those not chosen.
        call: the linear.
    """
    pyramid = _Pyramid.of(adapter)
    nodes = BranchNodes(call)
    small = tuple(s for s in pyramid.sizes if pyramid.rank * s <= SMALL)
    sums = [_small(pyramid, small, nodes, gates)] if small else []
    sums += [_large(pyramid, s, nodes, gates) for s in pyramid.sizes if s not in small]
    total = sums[0]
    for part in sums[1:]:
        total = nodes.op("Add", total, part)
    return total


@dataclasses.dataclass(frozen=True)
class _Pyramid:
    """The experts of one adapter, by size."""

    path: str
    A: LazyTensor
    B: LazyTensor
    sizes: dict[int, list[Branch]]
    num_experts: int
    out_features: int
    in_features: int

    @classmethod
    def of(cls, adapter: Adapter) -> _Pyramid:
        first, router = adapter.branches[0].delta, adapter.input_router
        assert isinstance(first, Kronecker)
        assert router is not None
        sizes: dict[int, list[Branch]] = {}
        for branch in adapter.branches:
            delta = branch.delta
            assert isinstance(delta, Kronecker)
            if delta.A is not first.A or delta.B is not first.B:
                raise InternalError(f"the experts of {adapter.target} have no A and B in common")
            sizes.setdefault(delta.size, []).append(branch)
        return cls(
            adapter.target, first.A, first.B, dict(sorted(sizes.items())), router.num_experts,
            first.out_features, first.in_features,
        )  # fmt: skip

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def columns(self, size: int) -> int:
        """Columns of A that a size reads."""
        return math.ceil(self.in_features / size)

    def rows(self, size: int) -> int:
        """Rows of B that a size reads."""
        return math.ceil(self.out_features / size)

    def owner(self, tensor: LazyTensor) -> str:
        """Whose A or B it is: a linear's own, or one that linears share."""
        return tensor.name.partition(".ept.")[0] + ".branch"


def _small(
    pyramid: _Pyramid, sizes: tuple[int, ...], nodes: BranchNodes, gates: ir.Value
) -> ir.Value:
    """Mix the experts of small sizes: h = x [kron(A, I)...], z = (g h) [K...], z [kron(B, I)...].

    Each size has columns of its own in h [..., d] and z [..., d], and its n experts stand behind
    one another: g [..., n, d] has expert j of every size in row j, g h [..., n d].
    """
    rank, out, width = pyramid.rank, pyramid.out_features, pyramid.in_features
    starts = np.cumsum([0, *(rank * s for s in sizes)]).tolist()
    d, n = starts[-1], max(len(pyramid.sizes[s]) for s in sizes)
    places = {s: slice(a, a + rank * s) for s, a in zip(sizes, starts, strict=False)}

    def down() -> Float64:
        a = read(pyramid.A)
        parts = [kron(a[:, : pyramid.columns(s)], np.eye(s))[:, :width] for s in sizes]
        return np.concatenate(parts).T

    def spread() -> Float64:
        table = np.zeros((pyramid.num_experts, n, d))
        for s in sizes:
            for j, branch in enumerate(pyramid.sizes[s]):
                table[_expert(branch), j, places[s]] = branch.scale
        return table.reshape(pyramid.num_experts, n * d)

    def kernels() -> Float64:
        blocks = np.zeros((n, d, d))
        for s in sizes:
            for j, branch in enumerate(pyramid.sizes[s]):
                blocks[j, places[s], places[s]] = kron(np.eye(rank), _kernel(branch).T)
        return blocks.reshape(n * d, d)

    def up() -> Float64:
        b = read(pyramid.B)
        parts = [kron(b[: pyramid.rows(s)], np.eye(s))[:out] for s in sizes]
        return np.concatenate(parts, axis=1).T

    name = f"{pyramid.owner(pyramid.A)}.down_{width}"
    h = nodes.op("MatMul", nodes.call.x, nodes.weight(name, (width, d), down, name))
    name = f"{pyramid.path}.branch.gates"
    shape = (pyramid.num_experts, n * d)
    g = nodes.op("MatMul", gates, nodes.weight(name, shape, spread, name))
    if n > 1:
        h, g = nodes.reshaped(h, 1, d), nodes.reshaped(g, n, d)
    z = nodes.op("Mul", h, g)
    if n > 1:
        z = nodes.reshaped(z, n * d)
    name = f"{pyramid.path}.branch.kernels"
    z = nodes.op("MatMul", z, nodes.weight(name, (n * d, d), kernels, name))
    name = f"{pyramid.owner(pyramid.B)}.up_{out}"
    return nodes.op("MatMul", z, nodes.weight(name, (d, out), up, name))


def _large(pyramid: _Pyramid, size: int, nodes: BranchNodes, gates: ir.Value) -> ir.Value:
    """Mix the n experts of one large size: H = A' X, Z = sum_j g_j H_j K_j^T, B Z.

    A' has every row of A n times, so that H [..., r, n, s] is scaled without being copied.
    """
    rank, branches = pyramid.rank, pyramid.sizes[size]
    n, columns, rows = len(branches), pyramid.columns(size), pyramid.rows(size)

    def down() -> Float64:
        return np.repeat(read(pyramid.A)[:, :columns], n, axis=0)

    def spread() -> Float64:
        table = np.zeros((pyramid.num_experts, rank, n, size))
        for j, branch in enumerate(branches):
            table[_expert(branch), :, j] = branch.scale
        return table.reshape(pyramid.num_experts, -1)

    def kernels() -> Float64:
        return np.concatenate([_kernel(branch).T for branch in branches])

    def up() -> Float64:
        return read(pyramid.B)[:rows]

    path, x = pyramid.path, nodes.call.x
    if columns * size != pyramid.in_features:
        missing = columns * size - pyramid.in_features
        x = nodes.op("Pad", x, nodes.numbers(*[0] * (2 * nodes.leading + 1), missing))
    x = nodes.reshaped(x, columns, size)
    name = f"{pyramid.owner(pyramid.A)}.down_{columns}x{size}"
    h = nodes.op("MatMul", nodes.weight(name, (rank * n, columns), down, name), x)
    name = f"{path}.branch.gates_{size}"
    shape = (pyramid.num_experts, rank * n * size)
    g = nodes.op("MatMul", gates, nodes.weight(name, shape, spread, name))
    z = nodes.op("Mul", nodes.reshaped(h, rank * n * size), g)
    name = f"{path}.branch.kernels_{size}"
    k = nodes.weight(name, (n * size, size), kernels, name)
    z = nodes.op("MatMul", nodes.reshaped(z, rank, n * size), k)
    name = f"{pyramid.owner(pyramid.B)}.up_{rows}x{size}"
    y = nodes.op("MatMul", nodes.weight(name, (rows, rank), up, name), z)
    y = nodes.reshaped(y, rows * size)
    if rows * size == pyramid.out_features:
        return y
    ends = nodes.numbers(0), nodes.numbers(pyramid.out_features), nodes.numbers(-1)
    return nodes.op("Slice", y, *ends)


def _expert(branch: Branch) -> int:
    gate = branch.gate
    assert isinstance(gate, Routed)
    return gate.expert


def _kernel(branch: Branch) -> Float64:
    assert isinstance(branch.delta, Kronecker)
    return read(branch.delta.kernel)
