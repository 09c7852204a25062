"""Where an engine leaves its reference: every layer's output on one probe, in the graph's order.

The graphs' values are called after the module that computes them, as the reference's are, so the
last value of a module stands beside what the reference's module of that name returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from eptc.calibration.taps import Snapshot
from eptc.nn.adapted import AdaptedLinear, ReferenceModel
from eptc.parity_gate.compare import Bound, Comparison, compare
from eptc.parity_gate.outputs import check_outputs
from eptc.parity_gate.probes import Probe
from eptc.runtime import Engine

__all__ = ["LayerError", "layer_errors"]

Float32 = npt.NDArray[np.float32]
# Below this a value's largest element is taken for it.
_FLOOR = 1e-2


@dataclasses.dataclass(frozen=True)
class LayerError:
    """One layer on one probe.

    Args:
        graph: its graph's role.
        layer: the module's full name.
        adapted: whether experts adapt it.
        found: the engine's value beside the reference's.
    """

    graph: str
    layer: str
    adapted: bool
    found: Comparison

    @property
    def ratio(self) -> float:
        """The error as a part of its bound."""
        return self.found.error / self.found.bound


def layer_errors(
    engine: Engine,
    reference: ReferenceModel,
    task: str | Sequence[str],
    probe: Probe,
    bound: Bound,
    optional: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> list[LayerError]:
    """Compare what each layer gives on a probe, in the order in which the graphs run.

    Errors add up along the model: that of a layer holds what came before it.

    Args:
        engine: the engine.
        reference: the unfolded model.
        task: the engine's; with a probe that names its rows' tasks, the same for all, those of the
            engine by their places.
        probe: a batch on which the engine runs.
        bound: of the engine's outputs; a layer's is the same part of its own largest element.
        optional: what the engine gives the graphs' optional inputs, by name.
    """
    bound = dataclasses.replace(bound, floor=_FLOOR, cosine=-1.0)
    recorder, wanted = _Recorder(engine), dict[str, Float32]()
    with _remembered(reference, wanted):
        for outcome in check_outputs(recorder, reference, task, probe, bound):  # type: ignore[arg-type]
            # The first run of each graph, on all tokens at once, is enough.
            if isinstance(outcome, Comparison) and outcome.what.startswith("logits"):
                break
    errors = []
    for role, feeds in recorder.feeds.items():
        file = engine.manifest.graphs[role].file
        graph = onnx.load(engine.directory / file, load_external_data=False).graph
        values = _by_module(graph, wanted)
        tap = Snapshot(engine.directory, file, list(values.values()))
        given = {v.name: optional[v.name] for v in graph.input if v.name in optional}
        tap.run({**feeds, **given})
        for layer, value in values.items():
            found = _compare(layer, tap.found[value], wanted[layer], bound, probe)
            if found is not None:
                adapted = isinstance(reference.layers.get(layer), AdaptedLinear)
                errors.append(LayerError(role, layer, adapted, found))
    return errors


def _compare(
    layer: str, got: npt.NDArray[Any], want: Float32, bound: Bound, probe: Probe
) -> Comparison | None:
    """Compare a layer's value; None where the engine computes another part of it."""
    if got.ndim == want.ndim == 3 and got.shape[1] == 1 < want.shape[1]:
        want = want[:, :1]  # a class follows from the first token, and that one alone is computed
    if got.shape != want.shape:
        return None
    real = probe.attention_mask.astype(bool)
    where = real if got.ndim == 3 and got.shape[:2] == real.shape else None
    return compare(layer, got, want, bound, where)


class _Recorder:
    """An engine that remembers what each of its graphs was given first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.feeds: dict[str, Mapping[str, Any]] = {}

    def run(self, feeds: Mapping[str, Any], graph: str = "model") -> Mapping[str, Any]:
        self.feeds.setdefault(graph, dict(feeds))
        return self._engine.run(feeds, graph)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextlib.contextmanager
def _remembered(reference: ReferenceModel, found: dict[str, Float32]) -> Iterator[None]:
    """Keep what each module first returns, where that is one tensor."""
    with contextlib.ExitStack() as stack:
        for name, module in reference.hf.named_modules():

            def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, torch.Tensor) and name not in found:
                    found[name] = output.detach().float().numpy().copy()

            stack.callback(module.register_forward_hook(keep).remove)
        yield


def _by_module(graph: onnx.GraphProto, modules: Mapping[str, Any]) -> dict[str, str]:
    """Return the value that a graph computes last for each module, in the graph's order.

    A module whose parts compute something after its own last node returns that, not this.
    """
    last: dict[str, str] = {}
    for node in graph.node:
        module = node.name.rpartition("/")[0]
        around = [module[:end] for end, sign in enumerate(module) if sign == "."]
        for outer in (*around, module):
            last.pop(outer, None)
        if module in modules and node.output:
            last[module] = node.output[0]
    return last
