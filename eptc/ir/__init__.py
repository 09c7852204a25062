"""The adapter IR: linears with gated branches beside their weight.

::

    y = W0 x + b + sum over branches of  scale * gate(context) * D x

A branch's `Delta` D is a structured operator [out, in]; its `Gate` says what it depends on.
Everything is immutable: a pass returns a new model.
"""

from eptc.ir.deltas import CellScaledLowRank, Delta, Kronecker, LowRank, Rows
from eptc.ir.factoring import low_rank, minimal_factors, singular_values
from eptc.ir.model import AdaptedModel, Adapter, Branch, Constant, Gate, OfTask, PerTask, Routed
from eptc.ir.numbers import Float64
from eptc.ir.prompts import PromptLayout, PromptSite, PromptTuning
from eptc.ir.routing import InputRouter, Normalization, Route, TaskRouter, Unit
from eptc.ir.token_router import TokenRouter
from eptc.ir.tucker import CentroidRouter, Tucker

__all__ = [
    "AdaptedModel",
    "Adapter",
    "Branch",
    "CellScaledLowRank",
    "CentroidRouter",
    "Constant",
    "Delta",
    "Float64",
    "Gate",
    "InputRouter",
    "Kronecker",
    "LowRank",
    "Normalization",
    "OfTask",
    "PerTask",
    "PromptLayout",
    "PromptSite",
    "PromptTuning",
    "Route",
    "Routed",
    "Rows",
    "TaskRouter",
    "TokenRouter",
    "Tucker",
    "Unit",
    "low_rank",
    "minimal_factors",
    "singular_values",
]
