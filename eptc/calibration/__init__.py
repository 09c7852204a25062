"""Calibration: how far an engine's values reach on real text, and what 16 bits make of them."""

from eptc.calibration.examples import FEW, cut_rows, read_calibration
from eptc.calibration.gates import GateStatistics, observe_gates
from eptc.calibration.observe import (
    MAX_BYTES,
    Method,
    Range,
    float_values,
    least_magnitudes,
    observe,
    weight_ranges,
)
from eptc.calibration.rows import greedy_tokens
from eptc.calibration.simulate import round_values, simulated, twin

__all__ = [
    "FEW",
    "MAX_BYTES",
    "GateStatistics",
    "Method",
    "Range",
    "cut_rows",
    "float_values",
    "greedy_tokens",
    "least_magnitudes",
    "observe",
    "observe_gates",
    "read_calibration",
    "round_values",
    "simulated",
    "twin",
    "weight_ranges",
]
