"""The adapters in PyTorch: what engines are compared with.

It shares no code with the reader. A reader that takes A for B, or forgets the scale, is found out
only because this one does not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eptc.nn import load_base
from eptc.nn.adapted import AdaptedLinear, ReferenceModel, SingleTaskModel
from eptc.tasks import Task

__all__ = ["load_npz"]


class LowRankLinear(AdaptedLinear):
    """y = W x + bias + scale * B (A x)."""

    def __init__(self, base: nn.Linear, path: str, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__(base, path)
        self.A, self.B = (nn.Parameter(t.float(), requires_grad=False) for t in (A, B))
        self.scale = scale

    def delta(self, x: Tensor, task_id: int | None = None) -> Tensor:  # noqa: ARG002  # there is one
        """Return what the branch adds [..., out]."""
        return self.scale * (x @ self.A.T) @ self.B.T

    def dense(self, task_id: int | None = None) -> Tensor:  # noqa: ARG002
        """Return the matrix [out, in] the branch stands for."""
        return self.scale * (self.B @ self.A)


class NpzModel(SingleTaskModel):
    """A Hugging Face model with low ranks beside its linears, and one task."""

    def __init__(self, checkpoint: Path, base: Path, task: Task) -> None:
        super().__init__(load_base(base), task)
        scale = json.loads((checkpoint / "adapter.json").read_text())["scale"]
        arrays = np.load(checkpoint / "adapter.npz", allow_pickle=False)
        layers = {}
        for name in sorted(n.removesuffix("/A") for n in arrays.files if n.endswith("/A")):
            linear = self.hf.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            a, b = (torch.from_numpy(arrays[f"{name}/{part}"]) for part in "AB")
            layers[name] = LowRankLinear(linear, name, a, b, float(scale))
            self.hf.set_submodule(name, layers[name])
        self.layers = layers


def load_npz(checkpoint: Path, base: Path, task: Task) -> ReferenceModel:
    """Return a checkpoint on its base, in eval mode."""
    return NpzModel(checkpoint, base, task).eval()
