"""The experts of one linear: what expert i makes of x, and the matrix it stands for.

`released` (the authors' code), kernel size s, a = max(1, in // s), c = max(1, out // s)::

    h = x[..., :a] @ (A[:, :a]^T B[:c]^T)        z[.., q s + t] = h[.., q] kernel[q, t]

`paper`, a = ceil(in / s), c = ceil(out / s), x viewed as X [a, s]::

    z = vec(B[:c] (A[:, :a] X) kernel^T)         i.e. kron(B[:c] A[:, :a], kernel) x
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Experts", "Factors", "PaperExperts", "ReleasedExperts"]


class Factors(nn.Module):
    """A [r, columns] and B [rows, r]: of one linear, or shared by all linears of a model."""

    def __init__(self, rank: int, columns: int, rows: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rank, columns))
        self.B = nn.Parameter(torch.zeros(rows, rank))


class Experts(nn.Module, abc.ABC):
    """The experts of one linear [out, in].

    Args:
        factors: A and B, read by every expert.
        sizes: kernel size of each expert.
        in_features: in.
        out_features: out.
    """

    def __init__(
        self, factors: Factors, sizes: Sequence[int], in_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.factors = factors
        self.sizes = tuple(sizes)
        self.in_features = in_features
        self.out_features = out_features
        self.kernels = nn.ParameterList(torch.zeros(self.kernel_shape(s)) for s in sizes)

    @abc.abstractmethod
    def kernel_shape(self, size: int) -> tuple[int, int]:
        """Return the shape of a kernel of one size."""

    @abc.abstractmethod
    def forward(self, x: Tensor, experts: Sequence[int]) -> list[Tensor]:
        """Return the output [..., out] of each of some experts for x [..., in]."""

    @abc.abstractmethod
    def dense(self, expert: int) -> Tensor:
        """Return one expert's matrix [out, in], from its definition."""


class ReleasedExperts(Experts):
    """Low rank on a crop of the input, then every output cell scaled by a kernel row."""

    @staticmethod
    def factor_shape(in_features: int, out_features: int) -> tuple[int, int]:
        """Return the columns of A and the rows of B."""
        return in_features // 2, out_features // 2

    def kernel_shape(self, size: int) -> tuple[int, int]:
        """Return [cells, size]: each cell has weights of its own."""
        return max(1, self.out_features // size), size

    def _crops(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        kernel = self.kernels[expert]
        cells, size = kernel.shape
        columns = max(1, self.in_features // size)
        return self.factors.A[:, :columns], self.factors.B[:cells], kernel

    def forward(self, x: Tensor, experts: Sequence[int]) -> list[Tensor]:
        """Return the output [..., out] of each of some experts for x [..., in]."""
        return [self._one(x, expert) for expert in experts]

    def _one(self, x: Tensor, expert: int) -> Tensor:
        a, b, kernel = self._crops(expert)
        hidden = x[..., : a.shape[1]] @ (a.T @ b.T)
        cells = (hidden.unsqueeze(-1) * kernel).flatten(-2)
        missing = self.out_features - cells.shape[-1]
        return functional.pad(cells, (0, missing)) if missing >= 0 else cells[..., :missing]

    def dense(self, expert: int) -> Tensor:
        """D[o, i] = kernel[o // s, o % s] sum_r B[o // s, r] A[r, i] (specs, closed form)."""
        a, b, kernel = self._crops(expert)
        cells, size = kernel.shape
        rows = torch.arange(min(self.out_features, cells * size))
        matrix = a.new_zeros(self.out_features, self.in_features)
        scale = kernel[rows // size, rows % size].unsqueeze(-1)
        matrix[: len(rows), : a.shape[1]] = scale * (b @ a)[rows // size]
        return matrix


class PaperExperts(Experts):
    """A crop of B A whose entries are blown up by one s x s kernel: kron(B A, kernel)."""

    @staticmethod
    def factor_shape(in_features: int, out_features: int, sizes: Sequence[int]) -> tuple[int, int]:
        """Return the columns of A and the rows of B: the largest crops."""
        return math.ceil(in_features / min(sizes)), math.ceil(out_features / min(sizes))

    def kernel_shape(self, size: int) -> tuple[int, int]:
        """Return [size, size]: one kernel for all cells."""
        return size, size

    def forward(self, x: Tensor, experts: Sequence[int]) -> list[Tensor]:
        """Return the output [..., out] of each of some experts for x [..., in].

        The matrix [out, in] is never built: z = vec(B (A X) K^T), row by row, and B (A X) is
        shared by experts of the same size.
        """
        spread: dict[int, Tensor] = {}
        outputs = []
        for expert in experts:
            size = self.sizes[expert]
            if size not in spread:
                spread[size] = self._spread(x, size)
            cells = spread[size] @ self.kernels[expert].T
            outputs.append(cells.flatten(-2)[..., : self.out_features])
        return outputs

    def _spread(self, x: Tensor, size: int) -> Tensor:
        """Return B (A X) [..., cells, size] for x viewed as X [columns, size]."""
        columns, cells = self._crop_sizes(size)
        padded = functional.pad(x, (0, columns * size - self.in_features))
        grid = padded.reshape(*x.shape[:-1], columns, size)
        return self.factors.B[:cells] @ (self.factors.A[:, :columns] @ grid)

    def _crop_sizes(self, size: int) -> tuple[int, int]:
        return math.ceil(self.in_features / size), math.ceil(self.out_features / size)

    def dense(self, expert: int) -> Tensor:
        """kron(B[:ceil(out/s)] A[:, :ceil(in/s)], K)[:out, :in] (specs, paper)."""
        columns, cells = self._crop_sizes(self.sizes[expert])
        latent = self.factors.B[:cells] @ self.factors.A[:, :columns]
        matrix = torch.kron(latent, self.kernels[expert])
        return matrix[: self.out_features, : self.in_features]
