"""Remove branches whose gate is the constant zero."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from eptc.ir import AdaptedModel, Adapter, Constant
from eptc.pass_base import AdapterPass, Contract

__all__ = ["DropDeadExperts"]


@dataclasses.dataclass(frozen=True)
class DropDeadExperts(AdapterPass):
    """Remove branches whose gate is the constant zero.

    Before: y = W0 x + sum over N experts of scale_i * c_i * D_i x    c_i = 0 for most
    After:  y = W0 x + sum over the top_k experts with c_i != 0

    Exact: what is removed adds zero. A branch whose gate depends on anything is left alone,
    whatever its value. An adapter without branches stays: its linear is then the base's.
    """

    name: ClassVar[str] = "drop-dead-experts"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model without dead branches; itself where there are none."""
        return model.map_adapters(self._drop)

    def _drop(self, adapter: Adapter) -> Adapter:
        alive = tuple(branch for branch in adapter.branches if branch.gate != Constant(0.0))
        if len(alive) == len(adapter.branches):
            return adapter
        return dataclasses.replace(adapter, branches=alive)
