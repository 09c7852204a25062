"""Who competes: a table. Imported in every environment; each entry's module is not."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.cases import Mode

__all__ = [
    "BESIDE_LOSSY",
    "CONTESTANTS",
    "ENGINE",
    "EXACT",
    "Call",
    "Contestant",
    "Environment",
    "Family",
]

Environment = Literal["eptc", "optimum"]
Family = Literal["engine", "base", "pytorch", "exporter"]
Call = Callable[[], Any]
_ALL: tuple[Mode, ...] = ("classify", "encode", "generate")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to run the task.

    Args:
        name: unique.
        label: what reports call it.
        family: `engine` and `base` are eptc's; the base computes other answers.
        module: has `load(contestant, files, case, threads) -> Call`, which returns what runs the
            work once and returns its answer as an array, and where `exports` is true
            `export(contestant, files, case)`.
        modes: the cases it takes part in.
        environment: whose packages it runs with.
        exports: whether something has to be exported beforehand.
        kept: whether that may be kept for the next run, because it does not depend on eptc.
    """

    name: str
    label: str
    family: Family
    module: str
    modes: tuple[Mode, ...] = _ALL
    environment: Environment = "eptc"
    exports: bool = False
    kept: bool = True

    def function(self, name: str) -> Callable[..., Any]:
        """Import the contestant's module and return one of its functions."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), name)
        return found


ENGINE = "eptc"
# The float32 engine, where the engine is one of lower precision.
EXACT = "eptc-float32"
# Who is compared with an engine of lower precision: nobody else's answers are worse.
BESIDE_LOSSY = (ENGINE, EXACT, "unfolded", "folded")

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            ENGINE, "eptc engine", "engine", "benchmarks.eptc_engines", exports=True, kept=False
        ),
        Contestant(
            EXACT, "eptc engine, float32", "engine", "benchmarks.eptc_engines",
            exports=True, kept=False,
        ),
        Contestant(
            "base", "base model's eptc engine", "base", "benchmarks.eptc_engines",
            exports=True, kept=False,
        ),
        Contestant("unfolded", "PyTorch, unfolded EPT", "pytorch", "benchmarks.pytorch"),
        Contestant("folded", "PyTorch, folded", "pytorch", "benchmarks.pytorch"),
        Contestant("compiled", "PyTorch, folded, torch.compile", "pytorch", "benchmarks.pytorch"),
        Contestant(
            "torch-onnx", "torch.onnx.export", "exporter", "benchmarks.stock_exporters",
            modes=("classify", "encode"), exports=True,
        ),
        Contestant(
            "transformers", "transformers exporter", "exporter", "benchmarks.stock_exporters",
            exports=True,
        ),
        Contestant(
            "transformers-fused", "transformers exporter, ORT fusions", "exporter",
            "benchmarks.stock_exporters", exports=True,
        ),
        Contestant(
            "optimum", "optimum-onnx, ORTModel", "exporter", "benchmarks.optimum_engines",
            environment="optimum", exports=True,
        ),
        Contestant(
            "optimum-session", "optimum-onnx, bare session", "exporter",
            "benchmarks.optimum_engines", environment="optimum",
        ),
        Contestant(
            "optimum-O2", "optimum-onnx -O2, bare session", "exporter",
            "benchmarks.optimum_engines", modes=("classify",), environment="optimum",
            exports=True,
        ),
    )
}  # fmt: skip
