"""A precision for each weight: a file that a user can read, edit and pass back."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir

from eptc.errors import InputError, OptionError
from eptc.lower.weights import PART
from eptc.similar_names import did_you_mean

__all__ = ["FILE", "LEVELS", "PrecisionPlan", "stored_weights"]

FILE: Final = "precision.json"
SCHEMA_VERSION: Final = 1
# What a weight of a plan can be stored as, from the largest to the smallest.
LEVELS: Final = ("fp32", "int8", "int4")
_SHOWN = 3

_STORED: Final = {
    onnx_ir.DataType.FLOAT: "fp32",
    onnx_ir.DataType.FLOAT16: "fp16",
    onnx_ir.DataType.BFLOAT16: "bf16",
    onnx_ir.DataType.INT8: "int8",
    onnx_ir.DataType.FLOAT8E4M3FN: "fp8",
}
_MICROSOFT_BLOCKS: Final = ("MatMulNBits", "GatherBlockQuantized")


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """What each weight is stored as.

    Args:
        weights: a level for each weight, by the parameter's name.
    """

    weights: Mapping[str, str]

    def of(self, level: str) -> tuple[str, ...]:
        """Return the weights of one level, sorted."""
        return tuple(sorted(name for name, found in self.weights.items() if found == level))

    @classmethod
    def read(cls, path: Path) -> PrecisionPlan:
        """Read a plan.

        Raises:
            InputError: the file cannot be read, or is no plan; what is wrong is named.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"the precision plan {path} cannot be read: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("weights"), dict):
            raise InputError(
                f"the precision plan {path} has no 'weights'",
                expected=f"{{'weights': {{NAME: {' or '.join(LEVELS)}}}}}, as {FILE} of a bundle "
                "that was built with --precision auto",
            )
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"the precision plan {path} has schema_version {version!r}",
                expected=str(SCHEMA_VERSION),
            )
        for name, level in data["weights"].items():
            if level not in LEVELS:
                raise InputError(
                    f"the precision plan {path} stores {name} as {level!r}",
                    expected=" or ".join(LEVELS),
                )
        return cls(dict(data["weights"]))

    def check_names(self, known: Mapping[str, Sequence[str]]) -> None:
        """Raise OptionError unless the plan has these weights, in levels they can have.

        A weight that has but one level may be left out.
        """
        for name in self.weights:
            if name not in known:
                raise OptionError(
                    f"the precision plan names the weight {name!r}, which the engine does not have"
                    + did_you_mean(name, known),
                    fix="leave it out",
                )
            if self.weights[name] not in known[name]:
                raise OptionError(
                    f"the precision plan stores {name} as {self.weights[name]}",
                    expected=" or ".join(known[name]),
                )
        choices = [name for name, found in known.items() if len(found) > 1]
        if missing := [name for name in choices if name not in self.weights]:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise OptionError(
                f"the precision plan lacks {', '.join(missing[:_SHOWN])}{more}",
                expected="a level for every weight that can be stored in integers",
                fix="add them, as fp32 where nothing is to change",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "weights": {name: self.weights[name] for name in sorted(self.weights)},
        }


def stored_weights(graphs: Mapping[str, onnx_ir.Model]) -> dict[str, str]:
    """Return what each matrix of some graphs is stored as, by its name; nothing is read."""
    found: dict[str, str] = {}
    for model in graphs.values():
        for name, value in model.graph.initializers.items():
            if value.shape is None or len(value.shape) < 2 or PART in name:
                continue
            bits = [
                node.attributes.get_int("bits", 4)
                for node in _readers(value)
                if node.op_type in _MICROSOFT_BLOCKS
            ]
            if bits:
                found[name] = "int4" if bits[0] == 4 else "int8-weights"
            elif value.dtype in _STORED:
                found[name] = _STORED[value.dtype]
    return dict(sorted(found.items()))


def _readers(value: onnx_ir.Value) -> list[onnx_ir.Node]:
    """Return the nodes that read a value, or it in another shape."""
    found: list[onnx_ir.Node] = []
    pending = collections.deque([value])
    while pending:
        for node in pending.popleft().consumers():
            found.append(node)
            if node.op_type in ("Reshape", "Transpose"):
                pending.extend(node.outputs)
    return found
