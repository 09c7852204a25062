"""From an engine that routes on its input to constant gates: what they are, and what is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from eptc.calibration import cut_rows, observe_gates
from eptc.errors import OptionError
from eptc.examples_file import Example
from eptc.ir import AdaptedModel
from eptc.linear_probe import LinearProbe
from eptc.lower import merged_gates, routed_by
from eptc.parity_lines import thrown_away
from eptc.pipeline import freezing_passes
from eptc.run_passes import PassRecord, run_adapter_passes
from eptc.runtime import Engine

__all__ = ["Frozen", "freeze", "routes_on_input"]

Progress = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What freezing a model's routers came to.

    Args:
        model: the model, its experts folded.
        records: what the passes did.
        notes: what a user should know.
    """

    model: AdaptedModel
    records: Sequence[PassRecord]
    notes: tuple[str, ...]


def routes_on_input(model: AdaptedModel) -> bool:
    """Whether a gate of a model depends on its input."""
    return any(adapter.input_router is not None for adapter in model.adapters.values())


def freeze(
    model: AdaptedModel,
    graphs: Mapping[str, onnx_ir.Model],
    exact: Path,
    texts: Sequence[Example],
    *,
    dtype: str | None,
    progress: Progress = lambda _: None,
) -> Frozen:
    """Replace the gates of a model by their mean over text, and fold its experts.

    Args:
        model: specialised for its task.
        graphs: its graphs, after every exact pass.
        exact: the bundle written from them.
        texts: what the gates are seen on.
        dtype: type of the folded weights; None: each base weight's own.
        progress: called with what is being done, and with each finished pass.

    Raises:
        OptionError: no text ran through some linear.
        InputError: a text that is none of the task's.
    """
    assert model.task_id is not None
    gates = {name: routed_by(graph.graph) for name, graph in graphs.items()}
    progress(f"gates of {sum(map(len, gates.values()))} linears on {len(texts)} texts")
    found = observe_gates(exact, texts, gates)
    routed = [path for path, a in model.adapters.items() if a.input_router is not None]
    # Linears whose gates no input changes have no others to be replaced by.
    known = {p: g for graph in graphs.values() for p, g in merged_gates(graph.graph).items()}
    if unseen := sorted(set(routed) - set(found) - set(known)):
        raise OptionError(
            f"no text went through {unseen[0]}, so that its gates have no mean",
            fix="give text that makes the engine write an answer, with --calibration",
        )
    passes = freezing_passes(
        {path: list(gates) for path, gates in known.items()}
        | {path: list(seen.mean) for path, seen in found.items()},
        {path: [0.0] * len(gates) for path, gates in known.items()}
        | {path: list(seen.spread) for path, seen in found.items()},
        dtype,
    )
    frozen, first = run_adapter_passes(
        model, passes[:1], task_id=model.task_id, probe=None, after=lambda r, _: progress(r)
    )
    folded, others = run_adapter_passes(
        frozen, passes[1:], task_id=model.task_id, probe=LinearProbe(),
        after=lambda r, _: progress(r),
    )  # fmt: skip
    with Engine.load(exact, providers=["cpu"]) as engine:
        cut = cut_rows(engine, texts)
    notes = [
        f"the gates of {len(found)} linears were replaced by their means; thrown away is "
        + thrown_away({path: seen.spread for path, seen in found.items()})
    ]
    if cut:
        notes.append(f"{cut} of {len(texts)} texts were longer than training's and cut")
    return Frozen(folded, [*first, *others], tuple(notes))
