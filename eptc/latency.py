"""`eptc bench`: how long an engine takes on this machine, by batch and length."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eptc.errors import OptionError

if TYPE_CHECKING:
    from eptc.runtime import Engine, Provider

__all__ = ["bench"]

# The first calls allocate memory and wake threads.
_WARMUP = 3
_SEED = 0


def bench(
    bundle: str | Path,
    *,
    task: str | None = None,
    folded: bool = False,
    batches: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (32, 128),
    new_tokens: int | None = None,
    repeat: int = 20,
    threads: int | None = None,
    providers: Sequence[Provider] | None = None,
    allow_fallback: bool = False,
) -> dict[str, Any]:
    """Measure an engine on token ids drawn at random, without padding.

    Where the engine serves several tasks, the rows of a batch are of each in turn.

    Shapes are measured in turn, one call of each a round, so that what slows the machine down for
    a while falls on all of them.

    Args:
        bundle: the bundle's folder, or a pack's.
        task: of a pack, the task; None where there is one.
        folded: of a pack, whether the engine has sessions of its own.
        batches: rows a call.
        lengths: tokens a row.
        new_tokens: tokens an engine that writes text writes at most; None: the manifest's.
        repeat: calls of each shape that are counted, after a few that are not.
        threads: as for `Engine.load`.
        providers: likewise.
        allow_fallback: likewise.

    Returns:
        What was measured, as JSON values: the engine, how it ran, and `shapes`, each with batch,
        length, median and 95th percentile in milliseconds, and rows or new tokens a second.

    Raises:
        OptionError: a number below 1, or `new_tokens` for an engine that writes nothing.
        InputError: a length the model has no positions for.
        BundleError: not a bundle, or damaged.
    """
    import numpy as np
    import onnxruntime

    from eptc.runtime.cpus import usable_cpus
    from eptc.runtime.pack import open_engine

    for name, values in (("batch", batches), ("length", lengths), ("repeat", (repeat,))):
        if not values or min(values) < 1:
            raise OptionError(f"{name} is {list(values)}", expected="integers, 1 or more")
    with open_engine(
        Path(bundle),
        task=task,
        folded=folded,
        providers=providers,
        threads=threads,
        allow_fallback=allow_fallback,
    ) as engine:
        if new_tokens is not None and engine.manifest.generation is None:
            raise OptionError("this engine writes no tokens", fix="leave new_tokens out")
        calls = {
            (batch, length): _call(engine, batch, length, new_tokens)
            for batch in batches
            for length in lengths
        }
        measured: dict[tuple[int, int], list[tuple[float, int]]] = {shape: [] for shape in calls}
        for _ in range(_WARMUP + repeat):
            for shape, call in calls.items():
                start = time.perf_counter()
                count = call()
                measured[shape].append((time.perf_counter() - start, count))
        writes = engine.manifest.generation is not None
        shapes = []
        for (batch, length), rounds in measured.items():
            seconds = np.array([duration for duration, _ in rounds[_WARMUP:]])
            count = rounds[-1][1]
            shapes.append({
                "batch": batch,
                "length": length,
                "median_ms": float(np.median(seconds) * 1e3),
                "p95_ms": float(np.percentile(seconds, 95) * 1e3),
                "new_tokens": count if writes else None,
                "tokens_per_second" if writes else "rows_per_second": float(
                    count / np.median(seconds)
                ),
            })  # fmt: skip
        return {
            "bundle": str(bundle),
            "kind": engine.manifest.kind,
            "precision": engine.manifest.precision,
            "tasks": [task.name for task in engine.tasks],
            "providers": list(engine.providers),
            "threads": threads or usable_cpus(),
            "onnxruntime": onnxruntime.__version__,
            "repeat": repeat,
            "shapes": shapes,
        }


def _call(engine: Engine, batch: int, length: int, new_tokens: int | None) -> Callable[[], int]:
    """Return what runs the engine once and counts the tokens it wrote, else the rows."""
    feeds = _feeds(engine, batch, length)
    if engine.manifest.generation is None:

        def classify() -> int:
            engine.run(feeds)
            return batch

        return classify
    return lambda: sum(map(len, engine.generate_ids(feeds, new_tokens)))


def _feeds(engine: Engine, batch: int, length: int) -> Mapping[str, Any]:
    import numpy as np

    from eptc.runtime.spec import TASK_IDS

    vocabulary = engine.manifest.vocab_size or 1
    ids = np.random.default_rng(_SEED).integers(0, vocabulary, (batch, length))
    graph = next(iter(engine.manifest.graphs.values()))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if any(tensor.name == "token_type_ids" for tensor in graph.inputs):
        feeds["token_type_ids"] = np.zeros_like(ids)
    if engine.manifest.tasks:
        feeds[TASK_IDS] = np.arange(batch) % len(engine.tasks)
    return feeds
