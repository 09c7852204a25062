"""What the answer to one row depends on: how an engine routes."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal, get_args

from eptc.runtime.json_fields import Fields

__all__ = ["MODES", "STATIC", "RoutingMode", "RoutingSpec"]

RoutingMode = Literal["static", "constant", "token", "per-sample", "batch", "frozen"]
MODES: Final[tuple[RoutingMode, ...]] = get_args(RoutingMode)

_MEANINGS: Final[dict[RoutingMode, str]] = {
    "static": "routes depend on the task alone and are part of the weights; an answer depends on "
    "its own text only",
    "constant": "nothing is routed; an answer depends on its own text only",
    "token": "each token is routed by itself; an answer depends on its own text only",
    "per-sample": "each row is routed by itself; an answer does not depend on the other rows of "
    "its batch",
    "batch": "the rows of a batch are routed together, as the system's own code does: an answer "
    "depends on the other rows of its batch; batch size 1 gives the answer to a text alone",
    "frozen": "routes were replaced by their mean over calibration text and are part of the "
    "weights; an answer depends on its own text only",
}


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """How an engine routes.

    Args:
        mode: what has a route of its own.
        reads_padding: whether padding changes the route, and with it the answer.
    """

    mode: RoutingMode = "static"
    reads_padding: bool = False

    @property
    def meaning(self) -> str:
        """What that is to a server that puts requests into batches."""
        text = _MEANINGS[self.mode]
        return f"{text}; padding changes it" if self.reads_padding else text

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "meaning": self.meaning}

    @classmethod
    def from_json(cls, data: object, where: str) -> RoutingSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        mode = next(m for m in MODES if m == fields.choice("mode", MODES))
        spec = cls(mode, fields.flag("reads_padding"))
        fields.text("meaning")
        fields.finish()
        return spec


STATIC: Final = RoutingSpec()
