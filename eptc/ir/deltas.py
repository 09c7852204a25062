"""Structured operators that branches add to a linear."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from eptc.ir.numbers import Float64, eliminate, kron, product, read
from eptc.tensors import LazyTensor

__all__ = ["CellScaledLowRank", "Delta", "Kronecker", "LowRank", "Rows"]


Rows = Callable[[int, int], Float64]
"""Computes rows start to stop of an operator [out, in]: [<= stop - start, <= in].

What is beyond the rows and columns that come back is zero.
"""


class Delta(abc.ABC):
    """A structured operator [out_features, in_features] that a branch adds to its linear."""

    out_features: int
    in_features: int

    @abc.abstractmethod
    def factors(self) -> tuple[Float64, Float64]:
        """Return U [out, k] and V [k, in], exact low-rank factors: D = U V."""

    @abc.abstractmethod
    def reader(self) -> Rows:
        """Return what computes rows of D in float64, the same bits on every machine.

        The tensors are read once, here.
        """

    def dense(self) -> Float64:
        """Return D [out, in] in float64, the same to the bit on every machine."""
        d = np.zeros((self.out_features, self.in_features))
        rows = self.reader()(0, self.out_features)
        d[: rows.shape[0], : rows.shape[1]] = rows
        return d

    @property
    @abc.abstractmethod
    def rank_bound(self) -> int:
        """An upper bound of D's rank."""

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The tensors D is made of."""


@dataclasses.dataclass(frozen=True, eq=False)
class CellScaledLowRank(Delta):
    """The released code's expert: a cropped low rank whose output cells are scaled one by one.

    With s the kernel size, a = max(1, in // s) and c = max(1, out // s):

        D[o, i] = K[o // s, o % s] * sum_r B[o // s, r] A[r, i]    for i < a, o < min(out, c s)

    and zero elsewhere.

    Args:
        A: [r, in // 2].
        B: [out // 2, r].
        kernel: K [c, s], or [1, c, s, 1] as the released code stores it.
        out_features: out.
        in_features: in.
    """

    A: LazyTensor
    B: LazyTensor
    kernel: LazyTensor
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """The kernel size s."""
        return self._cells_and_size[1]

    @property
    def _cells_and_size(self) -> tuple[int, int]:
        shape = self.kernel.shape
        return (shape[1], shape[2]) if len(shape) == 4 else (shape[0], shape[1])

    @property
    def _columns(self) -> int:
        """How many inputs it reads: a."""
        return max(1, self.in_features // self.size)

    def factors(self) -> tuple[Float64, Float64]:
        """Return U [out, r] = K[o // s, o % s] B[o // s] and V [r, in] = A, cropped and padded."""
        cells, s = self._cells_and_size
        kernel = read(self.kernel).reshape(cells, s, 1)
        rows = (kernel * read(self.B)[:cells, None, :]).reshape(cells * s, -1)
        u = np.zeros((self.out_features, rows.shape[1]))
        kept = min(self.out_features, cells * s)
        u[:kept] = rows[:kept]
        v = np.zeros((self.A.shape[0], self.in_features))
        v[:, : self._columns] = read(self.A)[:, : self._columns]
        return u, v

    def reader(self) -> Rows:
        """Return what computes rows of D: each cell's row of B A repeated s times and scaled."""
        cells, s = self._cells_and_size
        A, B = read(self.A)[:, : self._columns], read(self.B)[:cells]
        kernel = read(self.kernel).reshape(cells, s, 1)

        def rows(start: int, stop: int) -> Float64:
            first, last = min(start // s, cells), min(-(-stop // s), cells)
            scaled = kernel[first:last] * product(B[first:last], A)[:, None, :]
            flat = scaled.reshape((last - first) * s, A.shape[1])
            return flat[max(0, start - first * s) : stop - first * s]

        return rows

    @property
    def rank_bound(self) -> int:
        """The smallest of r, a and out."""
        return min(self.A.shape[0], self._columns, self.out_features)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """A, B and the kernel."""
        return self.A, self.B, self.kernel


@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """The paper's expert: a crop of B A, every entry replaced by a multiple of an s x s kernel.

        D = kron(B[:ceil(out/s)] @ A[:, :ceil(in/s)], K)[:out, :in]

    Args:
        A: [r, >= ceil(in / s)].
        B: [>= ceil(out / s), r].
        kernel: K [s, s].
        out_features: out.
        in_features: in.
    """

    A: LazyTensor
    B: LazyTensor
    kernel: LazyTensor
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """The kernel size s."""
        return self.kernel.shape[0]

    def _crops(self) -> tuple[Float64, Float64, Float64]:
        s = self.size
        rows, columns = math.ceil(self.out_features / s), math.ceil(self.in_features / s)
        return read(self.B)[:rows], read(self.A)[:, :columns], read(self.kernel)

    def factors(self, kernel: Float64 | None = None) -> tuple[Float64, Float64]:
        """Return kron(B, P) [out, r q] and kron(A, Q) [r q, in], cropped.

        P [s, q] Q [q, s] is the kernel, q its rank; where that is full, P the kernel itself.

        Args:
            kernel: another kernel than its own.
        """
        b, a, own = self._crops()
        p, q = _kernel_factors(own if kernel is None else kernel)
        return kron(b, p)[: self.out_features], kron(a, q)[:, : self.in_features]

    def kernel_matrix(self) -> Float64:
        """Return the kernel [s, s] in float64."""
        return read(self.kernel)

    def reader(self) -> Rows:
        """Return what computes rows of D straight from its definition."""
        b, a, kernel = self._crops()
        s = self.size

        def rows(start: int, stop: int) -> Float64:
            first = start // s
            blocks = kron(product(b[first : -(-stop // s)], a), kernel)
            return blocks[start - first * s : stop - first * s, : self.in_features]

        return rows

    @property
    def rank_bound(self) -> int:
        """rank(Z) rank(K) is at most r s."""
        return min(self.A.shape[0] * self.size, self.out_features, self.in_features)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """A, B and the kernel."""
        return self.A, self.B, self.kernel


def _kernel_factors(kernel: Float64) -> tuple[Float64, Float64]:
    """Return P [s, q] and Q [q, s] whose product is a kernel [s, s] of rank q."""
    size = len(kernel)
    values = np.linalg.svd(kernel, compute_uv=False)
    # What float64 made of a zero.
    rank = int(np.count_nonzero(values > size * 2.0**-50 * values.max(initial=0.0)))
    return (kernel, np.eye(size)) if rank == size else eliminate(kernel, rank)


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """Plain LoRA: D = B A.

    Args:
        A: [r, in].
        B: [out, r].
        out_features: out.
        in_features: in.
    """

    A: LazyTensor
    B: LazyTensor
    out_features: int
    in_features: int

    def factors(self) -> tuple[Float64, Float64]:
        """Return B [out, r] and A [r, in]."""
        return read(self.B), read(self.A)

    def reader(self) -> Rows:
        """Return what computes rows of D."""
        b, a = self.factors()
        return lambda start, stop: product(b[start:stop], a)

    @property
    def rank_bound(self) -> int:
        """The smallest of r, in and out."""
        return min(self.A.shape[0], self.in_features, self.out_features)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """A and B."""
        return self.A, self.B
