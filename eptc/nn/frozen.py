"""A reference whose gates no longer read the input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from eptc.nn.adapted import AdaptedLinear, ReferenceModel

__all__ = ["FrozenLinear", "freeze", "frozen"]


class FrozenLinear(AdaptedLinear):
    """A routed linear under constant gates.

    Args:
        linear: the routed one, which stays as it is.
        gates: [experts].
    """

    def __init__(self, linear: AdaptedLinear, gates: Sequence[float]) -> None:
        super().__init__(linear.base, linear.path)
        # Not a submodule: the parameters of its experts are no part of this one.
        self.__dict__["routed"] = linear
        self.gates = torch.tensor(gates, dtype=torch.float32)

    def delta(self, x: Tensor, task_id: int | None = None) -> Tensor:  # noqa: ARG002  (interface)
        """Return what the branches add [..., out] for x [..., in]."""
        routed: AdaptedLinear = self.__dict__["routed"]
        return routed.mixed(x, self.gates)

    @torch.no_grad()
    def dense(self, task_id: int | None = None) -> Tensor:
        """Return the matrix [out, in] the branches stand for."""
        return self.delta(torch.eye(self.in_features), task_id).T


def freeze(model: ReferenceModel, gates: Mapping[str, Sequence[float]]) -> None:
    """Put constant gates in the place of some linears' routers.

    Args:
        model: the reference, changed in place.
        gates: of each expert, by the path of the linear.
    """
    layers = dict(model.layers)
    for path, values in gates.items():
        layers[path] = FrozenLinear(layers[path], values)
        model.hf.set_submodule(path, layers[path])
    model.layers = layers


@contextlib.contextmanager
def frozen(model: ReferenceModel, gates: Mapping[str, Sequence[float]]) -> Iterator[None]:
    """Put constant gates in the place of some linears' routers until the context is left."""
    before = model.layers
    freeze(model, gates)
    try:
        yield
    finally:
        for path in gates:
            model.hf.set_submodule(path, before[path])
        model.layers = before
