"""What constant gates change of the answers of the engine that routes; no label is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eptc.calibration import greedy_tokens
from eptc.parity_gate import Answers, Example, answers, distance
from eptc.runtime import Engine

__all__ = ["compare_routed"]


def compare_routed(
    routed: Path, frozen: Path, texts: Sequence[Example], called: str
) -> dict[str, Any]:
    """Compare an engine with constant gates with the one that routes, on the same texts.

    Labels and values are compared where the task has them, else the greedy tokens.

    Args:
        routed: bundle of the engine that routes.
        frozen: that of the engine that was made of it.
        texts: what both are asked; cut as in training where they are too long.
        called: what the texts are, for people.

    Returns:
        JSON values: `text`, `rows`, `flips` (answers that are others; None of a regression),
        `error` (root mean square of the scores; None of what is written) and `cosine`.
    """
    found: dict[str, Any] = {"text": called, "rows": len(texts)}
    labelled: list[Answers] = []
    written: list[list[tuple[int, ...]]] = []
    for folder in (routed, frozen):  # never both in memory
        with Engine.load(folder, providers=["cpu"]) as engine:
            task = engine.task
            if engine.manifest.kind == "encoder-classifier" or (task and task.labels):
                labelled.append(answers(engine, texts))
            else:
                written.append([greedy_tokens(engine, text) for text in texts])
    assert task is not None
    if labelled:
        return found | distance(task, *labelled)
    flips = sum(a != b for a, b in zip(*written, strict=True))
    return found | {"flips": flips, "error": None, "cosine": None}
