"""What an engine may be stored and computed in, and where that runs."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from eptc.errors import OptionError

__all__ = ["SCHEMES", "OptimizeFor", "Precision", "Scheme", "check_runs"]

OptimizeFor = Literal["any", "cpu", "cuda"]
Precision = Literal[
    "fp32", "keep", "fp16", "bf16", "int8", "int8-static", "int8-weights", "int4", "auto"
]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to store and compute an engine.

    Args:
        lossy: whether answers may change beyond rounding in float32.
        integers: whether weights become integers; they are rounded from the float64 they were
            folded in.
        calibrated: whether the float32 engine has to be run on text first.
        simulated: whether a CPU computes it in another type, so that only a simulation shows
            what rounding does.
        runs_on: what graphs of this kind can be optimised for; where they run.
        why_not: why they do not run elsewhere.
    """

    lossy: bool = True
    integers: bool = False
    calibrated: bool = False
    simulated: bool = False
    runs_on: tuple[OptimizeFor, ...] = ("cpu", "cuda", "any")
    why_not: str = ""


SCHEMES: Final[dict[Precision, Scheme]] = {
    "fp32": Scheme(lossy=False),
    "keep": Scheme(lossy=False),
    "fp16": Scheme(calibrated=True, simulated=True),
    "bf16": Scheme(
        calibrated=True,
        simulated=True,
        runs_on=("cuda", "any"),
        why_not="ONNX Runtime's CPU provider has no bfloat16 kernels",
    ),
    "int8": Scheme(
        integers=True,
        runs_on=("cpu", "any"),
        why_not="ONNX Runtime's CUDA provider has no kernels for dynamic quantisation",
    ),
    "int8-static": Scheme(integers=True, calibrated=True),
    "int8-weights": Scheme(
        integers=True,
        runs_on=("cpu", "cuda"),
        why_not="blocks of integers are no standard operator",
    ),
    "int4": Scheme(
        integers=True,
        runs_on=("cpu", "cuda"),
        why_not="blocks of integers are no standard operator",
    ),
    "auto": Scheme(
        integers=True,
        runs_on=("cpu",),
        why_not="what it mixes, int8 and int4, runs together on ONNX Runtime's CPU provider alone",
    ),
}


def check_runs(precision: Precision, optimize_for: OptimizeFor) -> None:
    """Raise OptionError where no provider that is optimised for runs a precision."""
    scheme = SCHEMES[precision]
    if optimize_for not in scheme.runs_on:
        others = [name for name, s in SCHEMES.items() if optimize_for in s.runs_on]
        raise OptionError(
            f"--precision {precision} does not run where --optimize-for {optimize_for} is for: "
            f"{scheme.why_not}",
            expected=f"--optimize-for {' or '.join(scheme.runs_on)}, or, for {optimize_for}, "
            f"--precision {', '.join(others)}",
        )
