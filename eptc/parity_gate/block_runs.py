"""One block of an engine in ONNX Runtime, fed the reference's state: at once and in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eptc.errors import ParityError
from eptc.parity_gate.partition import PAST, PRESENT, Part, Partition
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.ort_errors import ort_errors
from eptc.runtime.session import keep_products_exact
from eptc.runtime.spec import GraphSpec, TensorSpec

__all__ = ["Piece", "Run", "Runner", "as_past"]

Array = npt.NDArray[Any]
_FATAL = 4  # errors are raised; the log would only say them twice
_WEIGHTS = "session.model_external_initializers_file_folder_path"


@dataclasses.dataclass
class Piece:
    """Some of a run's tokens, which go through the graph together.

    Args:
        start: position of the first.
        stop: position behind the last.
        feeds: the graph's inputs without its caches.
        shared: what parts have made so far that other parts read.
    """

    start: int
    stop: int
    feeds: Mapping[str, Array]
    shared: dict[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """A batch on its way through a graph, in one piece or in several with a cache in between.

    Args:
        what: the way and the batch, for the report.
        pieces: one after the other.
        cached: what another graph has cached for this one, by the names of its inputs, as that
            graph's nodes are run.
    """

    what: str
    pieces: Sequence[Piece]
    cached: dict[str, Array] = dataclasses.field(default_factory=dict)


class Runner:
    """Runs the parts of one graph.

    Args:
        directory: the bundle's folder: a part reads its weights from the bundle's file.
        partition: the graph's parts.
        spec: the graph's declared interface.
    """

    def __init__(self, directory: Path, partition: Partition, spec: GraphSpec) -> None:
        self.partition = partition
        self.caches = {t.name: t for t in spec.inputs if t.name.startswith(PAST)}
        self._answers = {t.name for t in spec.outputs if not t.name.startswith(PRESENT)}
        self._directory = directory
        _check_interface(partition, spec)

    def run(
        self,
        part: Part,
        runs: Sequence[Run],
        states: Sequence[Array | None],
        *,
        published: bool = False,
    ) -> list[dict[str, Array]]:
        """Return the outputs of a part for each run, pieces put together again.

        Args:
            part: the part; its session is open only until this returns.
            runs: the batches.
            states: the reference's state [batch, tokens, width] before the part, for each run;
                None for a part that reads tokens.
            published: whether activations are rounded as in the file; what other parts read of
                this one is what it makes without.

        Raises:
            ParityError: the part does not load or run, or reads a cache it has not filled.
        """
        session: Any = None
        results = []
        for run, state in zip(runs, states, strict=True):
            outputs: list[dict[str, Array]] = []
            cache = dict(run.cached)
            for piece in run.pieces:
                feeds = self._feeds(part, piece, state, cache)
                if session is None:
                    session = self._open(part, feeds, published)
                try:
                    values = session.run(list(part.outputs), feeds)
                except ort_errors() as error:
                    raise self._refused(part, f"does not run on {run.what}", error) from error
                made = dict(zip(part.outputs, values, strict=True))
                if not published:
                    piece.shared |= {n: made[n] for n in part.outputs if n not in part.result}
                cache |= as_past(made)
                outputs.append(made)
            whole = [n for n in part.outputs if n in part.result or n in self._answers]
            results.append(_joined(outputs, whole))
        return results

    def _feeds(
        self, part: Part, piece: Piece, state: Array | None, cache: Mapping[str, Array]
    ) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        if part.state:
            assert state is not None
            parts = _split(state[:, piece.start : piece.stop], len(part.state))
            feeds |= dict(zip(part.state, parts, strict=True))
        for name in part.inputs:
            if name in feeds:
                continue
            if name in self.caches:
                feeds[name] = self._cache(part, name, piece, cache)
            else:
                feeds[name] = piece.feeds[name] if name in piece.feeds else piece.shared[name]
        return feeds

    def _cache(self, part: Part, name: str, piece: Piece, cache: Mapping[str, Array]) -> Array:
        if name in cache:
            return cache[name]
        if part.state and piece.start:
            raise ParityError(
                f"in the graph {self.partition.file}, {part.name} reads the cache {name}, which "
                "it has not filled",
                fix="this is a bug in the lowering or in a graph pass: report it",
            )
        # Before the blocks only its length is read.
        return _zeros(self.caches[name], piece)

    def _open(self, part: Part, feeds: Mapping[str, Array], published: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = usable_cpus()
        options.add_session_config_entry(_WEIGHTS, str(self._directory))
        keep_products_exact(options)
        model = self.partition.serialize(part, feeds, published=published)
        try:
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except ort_errors() as error:
            raise self._refused(part, "does not load", error) from error

    def _refused(self, part: Part, what: str, error: Exception) -> ParityError:
        return ParityError(
            f"in the graph {self.partition.file}, {part.name} {what} in ONNX Runtime: {error}"
        )


def _check_interface(partition: Partition, spec: GraphSpec) -> None:
    """Compare a graph's inputs and outputs with what the manifest declares."""
    for side, found, declared in (
        ("inputs", partition.inputs, spec.inputs),
        ("outputs", partition.outputs, spec.outputs),
    ):
        wanted = [(tensor.name, tensor.dtype) for tensor in declared]
        if found != wanted:
            raise ParityError(
                f"the {side} of {partition.file} are {found}", expected=f"{wanted}, as the "
                "manifest says",
            )  # fmt: skip


def _split(state: Array, count: int) -> list[Array]:
    """Return arrays whose sum is the state: a part that does not add them up is found out."""
    rng = np.random.default_rng(0)
    shares = [(state * rng.random(state.shape)).astype(state.dtype) for _ in range(count - 1)]
    return [np.ascontiguousarray(state - sum(shares)), *shares]


def _zeros(spec: TensorSpec, piece: Piece) -> Array:
    """Return a cache of the length that stands before a piece."""
    batch, keys = len(piece.feeds["input_ids"]), piece.start
    if ".encoder." in spec.name:
        keys = piece.feeds["encoder_attention_mask"].shape[1]
    sizes = [size if isinstance(size, int) else keys for size in spec.shape]
    return np.zeros((batch, *sizes[1:]), spec.dtype)


def as_past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a graph caches under the names by which it is read."""
    return {
        PAST + name.removeprefix(PRESENT): value
        for name, value in outputs.items()
        if name.startswith(PRESENT)
    }


def _joined(pieces: Sequence[Mapping[str, Array]], names: Sequence[str]) -> dict[str, Array]:
    """Put together what has one entry a token; of a cache, the last is the whole."""
    if len(pieces) == 1:
        return dict(pieces[0])
    return {name: np.concatenate([piece[name] for piece in pieces], axis=1) for name in names}
