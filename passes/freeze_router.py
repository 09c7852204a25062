"""Replace gates that depend on the input by their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from eptc.errors import InternalError
from eptc.ir import AdaptedModel, Adapter, Constant, Routed
from eptc.pass_base import AdapterPass, Contract

__all__ = ["FreezeRouter"]


@dataclasses.dataclass(frozen=True)
class FreezeRouter(AdapterPass):
    """Replace gates that depend on the input by their mean over calibration text.

    Before: y = W0 x + sum_i scale_i * g_i(x) * D_i x    D_i [out, in]
    After:  y = W0 x + sum_i scale_i * c_i * D_i x       c_i the mean of g_i(x)

    Lossy: every input then gets the same mixture of experts, which can be folded. Only on
    request. Gates that do not read the input are left alone.

    Args:
        gates: mean gate of each expert, by the path of the linear.
        spread: standard deviation of the same gates: what is thrown away, for the record.
    """

    name: ClassVar[str] = "freeze-router"
    contract: ClassVar[Contract] = "lossy"
    gates: Mapping[str, Sequence[float]]
    spread: Mapping[str, Sequence[float]]

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model with constant gates; itself where no gate reads the input."""
        routed = {path: a for path, a in model.adapters.items() if a.input_router is not None}
        if not routed:
            return model
        if missing := sorted(routed.keys() - self.gates.keys()):
            raise InternalError(f"there are no mean gates for {missing[0]}")
        frozen = {path: self._freeze(adapter) for path, adapter in routed.items()}
        return model.replace(adapters={**model.adapters, **frozen})

    def _freeze(self, adapter: Adapter) -> Adapter:
        gates = self.gates[adapter.target]
        branches = tuple(
            dataclasses.replace(branch, gate=Constant(gates[branch.gate.expert]))
            if isinstance(branch.gate, Routed)
            else branch
            for branch in adapter.branches
        )
        return dataclasses.replace(adapter, branches=branches)
