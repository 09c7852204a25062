"""How far float32's own rounding moves a model's outputs, where a bound does not know it.

Attention that is nearly a choice, or many layers of large numbers, carry the last digits far: two
sound float32 programs then differ by more than they do on ordinary models. That shows in the
reference alone, which is run once more with its last digits disturbed. Where that
moves it by less than a quarter of the bound, nothing is wider.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eptc.parity_gate.compare import FP32, Bound, Comparison, compare

__all__ = ["compare_beside_rounding", "disturbed", "widened"]

Float32 = npt.NDArray[np.float32]
# Half a unit in the last place of a row's largest element: what one rounding may do to it.
_ROUNDING = 2.0**-24
# Sums have more roundings than the one that is disturbed, and on two sides. A sound engine of a T5
# was off by 1.8 times it at most, with scores of one to thirty times the usual.
_TIMES = 4
# What is further off is taken for a fault, whatever the model: faults start at twice that.
_MOST = 5e-4


def compare_beside_rounding(
    what: str,
    got: Float32,
    want: Float32,
    bound: Bound,
    where: npt.NDArray[np.bool_] | None = None,
    *,
    sizes: npt.NDArray[np.floating[Any]] | None = None,
    model: nn.Module,
    again: Callable[[], Float32],
) -> tuple[Comparison, Bound]:
    """Compare as `compare` does; what float32 has more of than its bound is looked into.

    Args:
        what: name for the report.
        got: what is proven.
        want: the reference's.
        bound: what is allowed; one for fewer bits is wide enough for any rounding of float32.
        where: elements that count; None: all.
        sizes: magnitudes that the elements' bounds go by; None: the tensor's largest.
        model: the reference.
        again: computes what `want` is once more.

    Returns:
        The comparison, and the bound it was made by: a wider one only where that passes.
    """
    found = compare(what, got, want, bound, where, sizes=sizes)
    if found.passed or got.shape != want.shape or bound != FP32:
        return found, bound
    with disturbed(model):
        moved = again()
    wider = widened(bound, want, moved, where)
    closer = compare(what, got, want, wider, where, sizes=sizes)
    if not closer.passed:
        return found, bound
    return dataclasses.replace(closer, why=wider.why), wider


@contextlib.contextmanager
def disturbed(model: nn.Module) -> Iterator[None]:
    """Move what each linear and each table of a model gives by one rounding, in seeded directions.

    Args:
        model: it; unchanged on leaving.
    """
    drawn = torch.Generator().manual_seed(0)

    def move(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=drawn) * 2 - 1
        return output + _ROUNDING * output.abs().amax(-1, keepdim=True) * signs

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                stack.callback(module.register_forward_hook(move).remove)
        yield


def widened(
    bound: Bound, want: Float32, moved: Float32, where: npt.NDArray[np.bool_] | None
) -> Bound:
    """Return a bound that allows what the reference's own rounding does to its outputs.

    Args:
        bound: of float32 on both sides.
        want: what the reference gives.
        moved: what it gives `disturbed`.
        where: elements that count (broadcast over trailing axes); None: all.
    """
    a, b = want.astype(np.float64), moved.astype(np.float64)
    if where is not None:
        counted = where.reshape(where.shape + (1,) * (a.ndim - where.ndim))
        a, b = np.where(counted, a, 0.0), np.where(counted, b, 0.0)
    share = float(np.abs(a - b).max()) / max(bound.floor, float(np.abs(a).max()))
    if not share * _TIMES > bound.relative:
        return bound
    return dataclasses.replace(
        bound,
        relative=min(_TIMES * share, _MOST),
        why=f"{FP32.why}; one rounding a layer moves the reference itself by {share:.2g}",
    )
