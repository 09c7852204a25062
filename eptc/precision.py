"""What an engine may be stored and computed in, and where that runs."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from eptc.errors import OptionError

__all__ = [
    "SCHEMES",
    "TENSORRT",
    "OptimizeFor",
    "Precision",
    "Scheme",
    "check_runs",
    "check_target",
]

# The target whose graphs have every type and scale in the file.
TENSORRT: Final = "tensorrt"

OptimizeFor = Literal["any", "cpu", "cuda"]
Precision = Literal[
    "fp32",
    "keep",
    "fp16",
    "bf16",
    "int8",
    "int8-static",
    "fp8",
    "int8-fp16",
    "fp8-fp16",
    "int8-weights",
    "int4",
    "auto",
]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to store and compute an engine.

    Args:
        lossy: whether answers may change beyond rounding in float32.
        quantized: whether weights become numbers of 8 bits or fewer; they are rounded from the
            float64 they were folded in.
        calibrated: whether the float32 engine has to be run on text first.
        number: what products are quantised to where every range is fixed; None: they are not.
        half: the type that what is not quantised is computed in, where it is one of 16 bits.
        runs_on: what graphs of this kind can be optimised for; where they run.
        why_not: why they do not run elsewhere.
        for_tensorrt: whether TensorRT reads it, with every type in the file.
        targets: the only targets that can have it; None: any.
    """

    lossy: bool = True
    quantized: bool = False
    calibrated: bool = False
    number: Literal["int8", "fp8"] | None = None
    half: Literal["float16", "bfloat16"] | None = None
    runs_on: tuple[OptimizeFor, ...] = ("cpu", "cuda", "any")
    why_not: str = ""
    for_tensorrt: bool = False
    targets: tuple[str, ...] | None = None

    @property
    def simulated(self) -> bool:
        """Whether a CPU computes it in another type, so that only a simulation shows rounding."""
        return self.half is not None


_BETWEEN_HALVES: Final = Scheme(
    quantized=True,
    calibrated=True,
    half="float16",
    runs_on=("any",),
    why_not="8 bits between 16-bit values are for TensorRT, which reads standard operators",
    for_tensorrt=True,
    targets=("onnx", TENSORRT),
)

SCHEMES: Final[dict[Precision, Scheme]] = {
    "fp32": Scheme(lossy=False, for_tensorrt=True),
    "keep": Scheme(lossy=False, for_tensorrt=True),
    "fp16": Scheme(calibrated=True, half="float16", for_tensorrt=True),
    "bf16": Scheme(
        calibrated=True,
        half="bfloat16",
        runs_on=("cuda", "any"),
        why_not="ONNX Runtime's CPU provider has no bfloat16 kernels",
        for_tensorrt=True,
    ),
    "int8": Scheme(
        quantized=True,
        runs_on=("cpu", "any"),
        why_not="ONNX Runtime's CUDA provider has no kernels for dynamic quantisation",
    ),
    "int8-static": Scheme(quantized=True, calibrated=True, number="int8", for_tensorrt=True),
    "fp8": Scheme(
        quantized=True,
        calibrated=True,
        number="fp8",
        runs_on=("any",),
        why_not="8-bit floating point is for TensorRT, which reads standard operators",
        for_tensorrt=True,
        targets=("onnx", TENSORRT),
    ),
    "int8-fp16": dataclasses.replace(_BETWEEN_HALVES, number="int8"),
    "fp8-fp16": dataclasses.replace(_BETWEEN_HALVES, number="fp8"),
    "int8-weights": Scheme(
        quantized=True,
        runs_on=("cpu", "cuda"),
        why_not="blocks of integers are no standard operator",
    ),
    "int4": Scheme(
        quantized=True,
        runs_on=("cpu", "cuda"),
        why_not="blocks of integers are no standard operator",
    ),
    "auto": Scheme(
        quantized=True,
        runs_on=("cpu",),
        why_not="what it mixes, int8 and int4, runs together on ONNX Runtime's CPU provider alone",
    ),
}


def check_target(precision: Precision, target: str) -> None:
    """Raise OptionError where what is to be written cannot have a precision."""
    scheme = SCHEMES.get(precision)
    if scheme is None:
        return  # which is refused elsewhere
    if target == TENSORRT and not scheme.for_tensorrt:
        others = [name for name, s in SCHEMES.items() if s.for_tensorrt]
        raise OptionError(
            f"--precision {precision} was given together with --target {TENSORRT}, which reads "
            "QuantizeLinear and DequantizeLinear with scales that are in the file, and no blocks",
            expected=f"--precision {', '.join(others)}; of 8-bit integers, int8-static with "
            "--calibration FILE",
        )
    if scheme.targets is not None and target not in scheme.targets:
        raise OptionError(
            f"--precision {precision} was given together with --target {target}: {scheme.why_not}",
            expected=f"--target {' or '.join(scheme.targets)}",
        )


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
