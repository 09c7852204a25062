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
import torch

from eptc.checkpoint import Checkpoint
from eptc.errors import ParityError
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.block_probes import Batch, few, make_batch
from eptc.parity_gate.block_runs import Runner, as_past
from eptc.parity_gate.compare import FP32, Bound, Comparison, compare, not_run
from eptc.parity_gate.gate import make_probes, with_outcomes
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.outputs import Decision, decide
from eptc.parity_gate.partition import AFTER, BEFORE, Partition
from eptc.parity_gate.probes import Example
from eptc.parity_gate.reference import stream_reference
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.weights import check_stored, plain_name
from eptc.runtime import Manifest
from eptc.runtime.inputs import prepare
from eptc.runtime.manifest import bundle_file
from eptc.runtime.tokenizer import TextTokenizer
from eptc.tasks import resolve
from eptc.text import TrainingTokenizer

__all__ = ["prove_blocks"]

Float32 = npt.NDArray[np.float32]
Outcome = Comparison | Decision
STATE = Bound(
    3e-5,
    1e-3,
    "float32 on both sides of one block, as a part of the token's largest number before or after "
    "it: sums in another order move elements by up to 2e-6 of that over the tested models",
)


def prove_blocks(
    directory: Path,
    manifest: Manifest,
    source: Checkpoint,
    task: str | int,
    tokenizer: TrainingTokenizer | None,
    *,
    top_k: int | None,
    tasks: Sequence[str] | None,
    allow_pickle: bool = False,
    examples: Sequence[Example] | None = None,
    layers: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run the gates of `prove` with one block of either side in memory at a time.

    The weights are read twice: to be compared, and to run the reference. The first block that
    fails is the last.

    Args:
        directory: the bundle's folder.
        manifest: its manifest.
        source: the checkpoint it was made from.
        task: name, alias or id of the engine's task.
        tokenizer: the tokenizer of training.
        top_k: as the caller gave it (as for `load_reference`).
        tasks: likewise.
        allow_pickle: whether `adapter_model.bin` may be read.
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
    reference = stream_reference(source, top_k=top_k, tasks=tasks, allow_pickle=allow_pickle)
    model = reference.model
    task_id = resolve(task, model.tasks)
    check_manifest(manifest, model, task_id)
    runners = {
        role: Runner(directory, Partition(directory / spec.file, reference.blocks), spec)
        for role, spec in manifest.graphs.items()
    }
    progress("parity: weights")
    files = [spec.file for spec in manifest.graphs.values()]
    parameters = _Parameters(reference, task_id)
    weights = check_stored(directory, files, parameters, model.layers, task_id)
    text = _BundleText.open(directory, manifest)
    probes, tokenized = make_probes(text, model, task_id, tokenizer, examples)
    batches = [make_batch(manifest, probe) for probe in few(probes, given=examples is not None)]
    walk = _Walk(reference, runners, batches)
    report = ParityReport(
        (), walk.bound, dict(layers or {}), weights, (), (), tokenized, mode="block by block"
    )
    if walk.rounded:
        report = dataclasses.replace(
            report, reference="PyTorch model, float32, adapted weights rounded as they are stored"
        )
    for batch in batches:
        report = with_outcomes(report, batch.probe, [])
    for outcomes in walk.outcomes(task_id, progress):
        report = dataclasses.replace(
            report,
            tensors=(*report.tensors, *(o for o in outcomes if isinstance(o, Comparison))),
            decisions=(*report.decisions, *(o for o in outcomes if isinstance(o, Decision))),
        )
        if not report.passed:
            break
    return report


class _Walk:
    """Both sides, from the tokens to the logits, one part after the other."""

    def __init__(
        self, reference: StreamedModel, runners: Mapping[str, Runner], batches: Sequence[Batch]
    ) -> None:
        self._reference = reference
        self._runners = runners
        self._batches = batches
        self._role = {
            block: role for role, runner in runners.items() for block in runner.partition.blocks
        }
        layers = reference.model.layers
        self.rounded = _rounded(layers, [runner.partition for runner in runners.values()])
        self._encoded: Sequence[Float32] = ()
        self._tokens: dict[int, int] = {}  # that the engine's last part gave, by batch

    def outcomes(self, task_id: int, progress: Callable[[str], None]) -> Iterator[list[Outcome]]:
        """Yield what was found for each part."""
        answers: list[Any] = []
        state: Sequence[Float32] = ()  # the reference's, after the last block
        role = ""
        feeds = [batch.reference for batch in self._batches]
        for visit in self._reference.run(task_id, feeds, answers, self.rounded):
            if visit.path in self._role:
                progress(f"parity: {visit.path}")
                before, after = _numpy(visit.inputs), _numpy(visit.outputs)
                role = self._role[visit.path]
                if visit.path == self._runners[role].partition.blocks[0]:
                    yield self._compare(role, BEFORE, None, before)
                self._hand_over(role, visit.path)
                yield self._compare(role, visit.path, before, after)
                state = [new[:, : self._tokens[i]] for i, new in enumerate(after)]
            elif role == "encoder" and not self._encoded:
                # The norm that ends the encoder.
                yield self._compare(role, AFTER, state, _numpy(visit.outputs))
                self._encoded = _numpy(visit.outputs)
        progress(f"parity: {AFTER}")
        yield self._compare(role, AFTER, state, [a.logits.numpy() for a in answers])

    def _hand_over(self, role: str, block: str) -> None:
        """Give a decoder's block the keys and values that the encoder's graph caches for it."""
        if role != "decoder":
            return
        wanted = set(self._runners[role].partition.parts[block].inputs)
        encoder = self._runners["encoder"]
        cached: list[dict[str, Any]] = [{} for _ in self._batches]
        for part in encoder.partition.parts.values():
            if not wanted.isdisjoint(as_past(dict.fromkeys(part.outputs))):
                runs = [batch.runs["encoder"][0] for batch in self._batches]
                for cache, made in zip(
                    cached, encoder.run(part, runs, self._encoded), strict=True
                ):
                    cache |= as_past(made)
        for batch, cache in zip(self._batches, cached, strict=True):
            for run in batch.runs[role]:
                run.cached = cache

    def _compare(
        self,
        role: str,
        name: str,
        before: Sequence[Float32] | None,
        after: Sequence[Float32],
    ) -> list[Outcome]:
        """Run a part on every batch in every way, and compare what it makes of the state.

        Args:
            role: the graph.
            name: the part.
            before: the reference's state before it, by batch; None: it reads tokens.
            after: what the reference makes of it.
        """
        runner = self._runners[role]
        part = runner.partition.parts[name]
        jobs = [(i, run) for i, batch in enumerate(self._batches) for run in batch.runs[role]]
        states = [None if before is None else before[i] for i, _ in jobs]
        title = name if name in self._role else f"{name} of {runner.partition.file}"
        try:
            results = runner.run(part, [run for _, run in jobs], states)
        except ParityError as error:
            return [not_run(f"{title}: {error.found}")]
        outcomes: list[Outcome] = []
        for (i, run), made in zip(jobs, results, strict=True):
            batch, what = self._batches[i], f"{title}, {run.what}"
            if "logits" in made:
                outcomes += _logits(what, batch, role, made["logits"], after[i])
                continue
            got: Float32 = np.sum([made[value] for value in part.result], axis=0)
            self._tokens[i] = got.shape[1]
            want, old, valid = after[i], None if before is None else before[i], batch.valid[role]
            if batch.decided is None and name == runner.partition.blocks[-1] and len(got[0]) == 1:
                # A class follows from the first token: the last block may make that one alone.
                want, old, valid = want[:, :1], None if old is None else old[:, :1], None
            sizes = _by_token(want if old is None else np.maximum(np.abs(old), np.abs(want)))
            outcomes.append(compare(what, got, want, STATE, valid, sizes=sizes))
        return outcomes


def _logits(what: str, batch: Batch, role: str, got: Float32, want: Float32) -> Iterator[Outcome]:
    """Yield the comparison of logits, and of the choices made of them."""
    valid = batch.valid[role] if batch.decided is not None else None
    comparison = compare(f"logits, {what}", got, want, FP32, valid)
    yield comparison
    if got.shape != want.shape or want.shape[-1] == 1:
        return
    start = batch.decided or 0
    steps = (
        [(got, want)]
        if batch.decided is None
        else [(got[:, i], want[:, i]) for i in range(start, want.shape[1])]
    )
    for step, (mine, theirs) in enumerate(steps):
        for row in range(len(theirs)):
            yield decide(what, row, step, mine[row], theirs[row], 2 * comparison.bound)


def _rounded(layers: Iterable[str], partitions: Iterable[Partition]) -> dict[str, torch.dtype]:
    """Return the 16-bit types that the engine's adapted weights were rounded to, by linear.

    What that rounding moves is seen where the weights are compared. In a block's state it would
    hide what else is wrong, so the reference rounds its own sums of weight and experts.
    """
    narrow = {name: kind for graph in partitions for name, kind in graph.narrow.items()}
    return {
        path: getattr(torch, kind)
        for path in layers
        for name, kind in narrow.items()
        if f"{path}.weight" in name  # a weight packed with others is called after all of them
    }


def _by_token(state: Float32) -> Float32:
    """Return each token's largest magnitude [batch, tokens, 1].

    A trained model's state may be thousands of times larger at its first token than at the rest.
    """
    largest: Float32 = np.abs(state).max(axis=-1, keepdims=True)
    return largest


def _numpy(tensors: Iterable[Any]) -> list[Float32]:
    return [tensor.numpy() for tensor in tensors]


class _Parameters(Mapping[str, Float32]):
    """The reference's parameters by their names in the plain task model, read when asked for."""

    def __init__(self, reference: StreamedModel, task_id: int) -> None:
        self._reference = reference
        self._owners = {}
        for name, _ in reference.model.hf.named_parameters(remove_duplicate=False):
            if plain := plain_name(name, reference.model, task_id):
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
