"""The parity gate for a model that does not fit in memory: one block of it after the other.

Each block of the engine is given the state that the reference has before it, and must give the
state that the reference has after it. What errors add up to over all blocks is not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eptc.checkpoint import Checkpoint
from eptc.nn.frozen import freeze
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.block_probes import few, make_batch
from eptc.parity_gate.block_runs import Runner
from eptc.parity_gate.block_walk import STATE, Walk, rounded_bound
from eptc.parity_gate.gate import make_probes, with_outcomes
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.partition import Partition
from eptc.parity_gate.probes import Example
from eptc.parity_gate.reference import frozen_gates, stream_reference
from eptc.parity_gate.report import AsPublished, ParityReport
from eptc.parity_gate.weights import check_stored
from eptc.runtime import Manifest
from eptc.runtime.inputs import prepare
from eptc.runtime.manifest import bundle_file
from eptc.runtime.tokenizer import TextTokenizer
from eptc.tasks import resolve
from eptc.text import TrainingTokenizer

__all__ = ["StreamedParameters", "prove_blocks"]

Float32 = npt.NDArray[np.float32]


def prove_blocks(
    directory: Path,
    manifest: Manifest,
    source: Checkpoint,
    task: str | int,
    tokenizer: TrainingTokenizer | None,
    *,
    examples: Sequence[Example] | None = None,
    layers: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run the gates of `prove` with one block of either side in memory at a time.

    The weights are read twice: to be compared, and to run the reference. The first block that
    fails is the last. A block that rounds activations runs twice: with activations in float32,
    under a bound that shows what else is wrong, and as it is published, under its precision's.

    Args:
        directory: the bundle's folder.
        manifest: its manifest.
        source: the checkpoint it was made from.
        task: name, alias or id of the engine's task.
        tokenizer: the tokenizer of training.
        examples: texts to probe with; None for the built-in ones.
        layers: outcome of the layer gate by stage.
        progress: called with what is being done.

    Returns:
        The report, with a comparison for every block, batch and way; it has passed or not.

    Raises:
        ParityError: a weight, a tokenized text or what the manifest says is not the reference's,
            or a graph does not have the model's blocks in the model's order.
        InputError: the checkpoint or the base cannot be read.
    """
    progress("parity: read the checkpoint")
    reference = stream_reference(source)
    model = reference.model
    freeze(model, frozen_gates(manifest))
    task_id = resolve(task, model.tasks)
    check_manifest(manifest, model, task_id)
    runners = {
        role: Runner(directory, Partition(directory / spec.file, reference.blocks), spec)
        for role, spec in manifest.graphs.items()
    }
    progress("parity: weights")
    files = [spec.file for spec in manifest.graphs.values()]
    parameters = StreamedParameters(reference, task_id)
    weights = check_stored(directory, files, parameters, model.layers, task_id)
    text = _BundleText.open(directory, manifest)
    probes, tokenized = make_probes(text, model, task_id, tokenizer, examples)
    batches = [make_batch(manifest, probe) for probe in few(probes, given=examples is not None)]
    rounded = rounded_bound(manifest.precision)
    walk = Walk(reference, task_id, runners, batches, rounded)
    report = ParityReport(
        (), STATE, dict(layers or {}), weights, (), (), tokenized, mode="block by block"
    )
    if walk.stored:
        said = "PyTorch model, float32, weights as they are stored"
        report = dataclasses.replace(report, reference=said)
    parts = [part for runner in runners.values() for part in runner.partition.parts.values()]
    if any(part.rounds for part in parts):
        report = dataclasses.replace(report, published=AsPublished(rounded))
    for batch in batches:
        report = with_outcomes(report, batch.probe, [])
    for found in walk.outcomes(progress):
        report = report.extended(found.exact, found.published)
        if not found.sound:
            break
    return report


class StreamedParameters(Mapping[str, Float32]):
    """The reference's parameters by their names in the plain task model, read when asked for."""

    def __init__(self, reference: StreamedModel, task_id: int) -> None:
        self._reference = reference
        self._owners = {}
        for name, _ in reference.model.hf.named_parameters(remove_duplicate=False):
            if plain := reference.model.plain_name(name, task_id):
                path, _, attribute = name.rpartition(".")
                self._owners[plain] = (reference.model.hf.get_submodule(path), attribute)

    def __getitem__(self, name: str) -> Float32:
        module, attribute = self._owners[name]
        with self._reference.loaded(module):
            array: Float32 = getattr(module, attribute).detach().numpy()
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._owners  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


@dataclasses.dataclass(frozen=True)
class _BundleText:
    """A bundle that tokenizes as its engine does, without one."""

    directory: Path
    manifest: Manifest
    tokenizer: TextTokenizer | None

    @classmethod
    def open(cls, directory: Path, manifest: Manifest) -> _BundleText:
        spec = manifest.tokenizer
        found = TextTokenizer(bundle_file(directory, spec.file), spec) if spec else None
        return cls(directory, manifest, found)

    def tokenize(
        self, texts: Iterable[Any], *, truncate: bool = False
    ) -> dict[str, npt.NDArray[Any]]:
        assert self.tokenizer is not None
        rows = self.tokenizer.encode(prepare(texts, self.manifest.task), truncate=truncate)
        return self.tokenizer.pad(rows)
