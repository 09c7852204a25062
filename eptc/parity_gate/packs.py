"""The parity gate of packs: every task, as it will be served, against the unfolded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from eptc import text
from eptc.checkpoint import Checkpoint
from eptc.errors import BundleError, ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.compare import FP32
from eptc.parity_gate.gate import prove_outputs, refuse
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.layers import LayerGate, layer_outputs
from eptc.parity_gate.probes import Example
from eptc.parity_gate.reference import load_reference
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.stored import read
from eptc.parity_gate.weights import check_arrays, plain_parameters
from eptc.runtime.pack import Pack
from eptc.runtime.pack_tensors import folded_weights, read_tensors
from eptc.tasks import resolve

__all__ = ["PackGate", "check_pack_weights", "pack_summary"]


class PackGate:
    """Compares tasks of packs with a checkpoint's unfolded model, loaded once.

    Args:
        source: the checkpoint.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        with source.format.blamed("its reference fails"):
            self.reference: ReferenceModel = load_reference(source)
        self.tokenizer = text.find_tokenizer(source.path, source.base.path)

    def linears(self, task: str) -> LayerGate:
        """Return what compares linears of the IR with the reference's.

        Args:
            task: by name; the reference finds it by itself.
        """
        with self._source.format.blamed("its reference fails"):
            return LayerGate(layer_outputs(self.reference, resolve(task, self.reference.tasks)))

    def prove(
        self,
        pack: Pack,
        name: str,
        *,
        examples: Sequence[Example] | None = None,
        layers: Mapping[str, float] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> tuple[ParityReport, ParityReport]:
        """Compare both engines of a task, the one that is fed its factors and the folded one.

        Args:
            pack: the pack.
            name: the task's name there.
            examples: texts to probe with; None for the built-in ones.
            layers: outcome of the layer gate by stage.
            progress: called with what is being done.

        Returns:
            Their reports; both have passed.

        Raises:
            ParityError: one of them does not give the reference's answers.
        """
        with self._source.format.blamed("its reference cannot be compared with"):
            task_id = resolve(pack.tasks[name].name, self.reference.tasks)
            try:
                engines = [pack.engine(name, folded=folded) for folded in (False, True)]
            except BundleError as error:
                raise ParityError(f"the engine of {name} does not load: {error}") from error
            progress(f"parity: weights of {name}")
            weights = check_pack_weights(pack, name, self.reference, task_id)
            reports: list[ParityReport] = []
            for engine, deviation in zip(engines, weights, strict=True):
                check_manifest(engine.manifest, self.reference, task_id)
                report = prove_outputs(
                    engine, self.reference, task_id, self.tokenizer,
                    ParityReport((), FP32, dict(layers or {}), deviation, (), (), 0),
                    examples=examples, progress=progress,
                )  # fmt: skip
                which = "folded" if reports else "switched"
                refuse(report, f"this is a bug in the {which} graphs of the pack: report it")
                reports.append(report)
                engine.close()
        switched, merged = reports
        return switched, merged


def check_pack_weights(
    pack: Pack, name: str, reference: ReferenceModel, task_id: int
) -> tuple[float, float]:
    """Compare what either engine of a task has in its weights; return the largest deviations.

    The graphs that are fed factors hold the base, to the bit. What the folded ones have, as the
    runtime makes it, is compared with base and experts.

    Args:
        pack: the pack.
        name: the task's name there.
        reference: the unfolded model.
        task_id: position of the task in the reference's list.

    Raises:
        BundleError: the task's file is damaged.
        ParityError: a weight is off.
    """
    folder, manifest = pack.directory, pack.manifest
    parameters = plain_parameters(reference, task_id)
    tensors = read_tensors(folder, manifest, name)
    heads = [(key, tensors[key]) for key in manifest.heads]
    files = [graph.file for graph in manifest.graphs.values()]
    base = check_arrays(_stored(folder, files), parameters, {}, task_id)

    def served() -> Iterator[tuple[str, Any]]:
        adapted = set()
        for key, array in folded_weights(folder, manifest, tensors, list(manifest.graphs)):
            adapted.add(key)
            yield key, array
        for key, array in _stored(folder, list(manifest.folded.values())):
            if key not in adapted:
                yield key, array
        yield from heads

    return base, check_arrays(served(), parameters, reference.layers, task_id)


def _stored(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield each initializer of some graphs once, read when it is asked for; no optional input."""
    seen = set()
    for file in files:
        graph = onnx_ir.load(folder / file).graph
        for name, value in graph.initializers.items():
            if name not in seen and not value.is_graph_input() and value.const_value is not None:
                seen.add(name)
                yield name, read(value.const_value)


def pack_summary(reports: tuple[ParityReport, ParityReport]) -> dict[str, Any]:
    """Return what a pack's manifest says of a task that was compared."""
    switched, folded = reports
    return switched.summary() | {"folded": folded.summary()}
