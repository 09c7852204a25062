"""What every pass is: a frozen dataclass with a name, a contract, options and one method."""

from __future__ import annotations

import abc
import dataclasses
import logging
from typing import Any, ClassVar, Literal

import onnx_ir

from eptc.ir import AdaptedModel

__all__ = ["AdapterPass", "Contract", "GraphPass", "LossyPass", "QuantizingPass"]

Contract = Literal["exact", "lossy"]


@dataclasses.dataclass(frozen=True)
class AdapterPass(abc.ABC):
    """A named rewrite of an adapted model, before it is lowered; nothing is changed in place.

    Options are the dataclass fields, so two passes with the same options are equal and print
    alike. The pipeline validates the model after every pass and checks its contract.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]

    @abc.abstractmethod
    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the rewritten model; `model` itself where there is nothing to do."""

    def options(self) -> dict[str, Any]:
        """Return the pass's options as JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class GraphPass(onnx_ir.passes.InPlacePass):
    """A named rewrite of one ONNX graph, in place.

    The graph is valid before and after (the pipeline checks both), and its interface is kept;
    a pass that `retypes` may change the types of inputs and outputs, not their names and shapes.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    retypes: ClassVar[bool] = False

    @abc.abstractmethod
    def rewrite(self, model: onnx_ir.Model) -> int:
        """Rewrite `model` in place and return how many sites changed (0 means untouched)."""

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Run `rewrite` as the onnx_ir pass protocol asks."""
        return onnx_ir.passes.PassResult(model, modified=self.rewrite(model) > 0)

    def options(self) -> dict[str, Any]:
        """Return the pass's options as JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LossyPass(GraphPass):
    """A graph pass that lowers precision, and says what it leaves in float32."""

    contract: ClassVar[Contract] = "lossy"

    @abc.abstractmethod
    def plan(self, model: onnx_ir.Model) -> dict[str, str]:
        """Return why each thing that stays in float32 does, by its name; nothing is changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizingPass(LossyPass):
    """A pass that stores weights as integers.

    Args:
        keep: parameters that stay float32; a packed weight stays with any of its parts.
        only: the parameters to quantize; None: all.
    """

    keep: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Take lists for tuples: JSON has none."""
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "only", None if self.only is None else tuple(self.only))

    def options(self) -> dict[str, Any]:
        """Return the pass's options as JSON values."""
        only = None if self.only is None else list(self.only)
        return {**super().options(), "keep": list(self.keep), "only": only}

    def left(self, weight: str, reason: str) -> None:
        """Log why a weight is left alone."""
        logging.getLogger(type(self).__module__).debug(
            "%s: left %s alone: %s", self.name, weight, reason
        )
