"""The engine that eptc makes of the task, and the one it makes of the base model.

The base's is made from the same checkpoint with factors of zero: the same road, the same head,
the base's own weights. It is the limit: an adapter cannot cost less than none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import eptc
from benchmarks.cases import Case, feeds
from benchmarks.contestants import ENGINE, Call, Contestant
from benchmarks.exports import engine_folder
from benchmarks.models import MODELS
from benchmarks.places import Files

__all__ = ["export", "load"]


def export(contestant: Contestant, files: Files, case: Case) -> None:
    """Compile the checkpoint; parity is the tests' affair, answers are compared here as well."""
    eptc.export(
        files.zero if contestant.name == "base" else files.checkpoint,
        task=MODELS[case.model].task,
        base=files.base,
        out=engine_folder(contestant, case, files),
        precision=case.precision if contestant.name == ENGINE else "fp32",
        verify=False,
        force=True,
    )


def load(contestant: Contestant, files: Files, case: Case, threads: int) -> Call:
    """Return what runs the engine once, through its public methods."""
    folder = engine_folder(contestant, case, files)
    engine = eptc.Engine.load(folder, providers=["cpu"], threads=threads)
    inputs = feeds(case, files)
    if case.mode == "generate":
        return lambda: np.array(engine.generate_ids(inputs, case.new_tokens))
    graph, output = ("encoder", "last_hidden_state") if case.mode == "encode" else (None, "logits")

    def run() -> Any:
        return engine.run(inputs, graph)[output]

    return run
