"""The reference side of a build: here, or in a process of its own.

A process of its own keeps the reference's memory away from the compiler's, and loads and runs
the reference while the compiler traces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from eptc import checkpoint, text
from eptc.errors import BundleError, EptcError, InternalError, OptionError, ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.nn.frozen import frozen
from eptc.parity_gate.blocks import prove_blocks
from eptc.parity_gate.gate import prove
from eptc.parity_gate.layers import LayerOutputs, layer_outputs
from eptc.parity_gate.probes import Example
from eptc.parity_gate.reference import frozen_gates, load_reference, stream_reference
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.several import prove_tasks
from eptc.runtime import Engine, load_manifest
from eptc.tasks import chosen

__all__ = ["ON_CPU", "LocalVerifier", "RemoteVerifier", "Subject", "Verifier", "serve"]

# How an engine is loaded that is compared: bounds were measured on the CPU.
ON_CPU: Final[Mapping[str, Any]] = MappingProxyType({"providers": ("cpu",)})

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a build is compared with; what the caller gave, not what the reader made of it.

    Args:
        source: the checkpoint.
        task: name, alias or id of the task, or several.
        examples: texts to probe with, by the name of their task where there are several; None
            for the built-in ones.
        by_block: whether one block of the model at a time is in memory.
    """

    source: checkpoint.Checkpoint
    task: str | int | Sequence[str | int]
    examples: Sequence[Example] | Mapping[str, Sequence[Example]] | None
    by_block: bool


class Verifier(Protocol):
    """Answers for the reference."""

    def layers(self) -> LayerOutputs:
        """Return what the reference's adapted linears give."""

    def prove(
        self, directory: Path, layers: Mapping[str, float], progress: Progress
    ) -> ParityReport:
        """Compare the bundle in a folder with the reference.

        Args:
            directory: the bundle's folder.
            layers: outcome of the layer gate by stage.
            progress: called with what is being done.

        Raises:
            ParityError: the engine does not load, or is off before anything is run.
        """

    def close(self) -> None:
        """Free what is held."""


class LocalVerifier:
    """Compares in this process.

    Args:
        subject: what the bundle is compared with.
        engine_options: how the engine is loaded, as for `Engine.load`.
    """

    def __init__(self, subject: Subject, engine_options: Mapping[str, Any] = ON_CPU) -> None:
        self._subject = subject
        self._engine_options = engine_options

    @functools.cached_property
    def reference(self) -> ReferenceModel:
        """The unfolded model, in memory as a whole."""
        return load_reference(self._subject.source)

    @functools.cached_property
    def tokenizer(self) -> text.TrainingTokenizer | None:
        """The tokenizer of training."""
        source = self._subject.source
        return text.find_tokenizer(source.path, source.base.path)

    def layers(self) -> LayerOutputs:
        """Return what the reference's adapted linears give."""
        subject = self._subject
        with subject.source.format.blamed("its reference fails"):
            if subject.by_block:
                streamed = stream_reference(subject.source)
                (task_id,) = chosen(subject.task, streamed.model.tasks)
                return layer_outputs(streamed.model, task_id, streamed.loaded)
            # The reference finds the task by itself: a reader that mixes up tasks is found out.
            task_ids = chosen(subject.task, self.reference.tasks)
            first, *others = (layer_outputs(self.reference, task_id) for task_id in task_ids)
            return dataclasses.replace(first, others=tuple(others))

    def prove(
        self, directory: Path, layers: Mapping[str, float], progress: Progress
    ) -> ParityReport:
        """Compare the bundle in a folder with the reference."""
        with self._subject.source.format.blamed("its reference cannot be compared with"):
            return self._prove(directory, layers, progress)

    def _prove(
        self, directory: Path, layers: Mapping[str, float], progress: Progress
    ) -> ParityReport:
        subject = self._subject
        options: dict[str, Any] = {
            "examples": subject.examples, "layers": layers, "progress": progress,
        }  # fmt: skip
        if subject.by_block:
            assert isinstance(subject.task, str | int)
            return prove_blocks(
                directory, load_manifest(directory), subject.source, subject.task,
                self.tokenizer, **options,
            )  # fmt: skip
        try:
            engine = Engine.load(directory, **self._engine_options)
        except BundleError as error:
            raise ParityError(f"the engine that was written does not load: {error}") from error
        task_ids = chosen(subject.task, self.reference.tasks)
        if len(task_ids) > 1:
            with engine:
                return prove_tasks(
                    directory, engine, self.reference, task_ids, self.tokenizer, **options
                )
        (task_id,) = task_ids
        gates = frozen_gates(engine.manifest)
        with engine, frozen(self.reference, gates):
            report = prove(directory, engine, self.reference, task_id, self.tokenizer, **options)
        if gates:
            said = f"{report.reference}, its gates replaced by the same means"
            report = dataclasses.replace(report, reference=said, constant_gates=True)
        return report

    def close(self) -> None:
        """Free the reference."""
        self.__dict__.pop("reference", None)


class RemoteVerifier:
    """Compares in a process of its own, which starts to load the reference at once."""

    def __init__(self, subject: Subject) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # this interpreter, this module
                [sys.executable, "-m", "eptc.parity_gate.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # Modules are found where this process found them.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection = Connection(ours.detach())
        try:
            with subject.source.format.blamed("what it read cannot be pickled"):
                self._send(subject)
        except EptcError:
            self.close()
            raise
        self._layers: LayerOutputs | None = None

    def layers(self) -> LayerOutputs:
        """Return what the reference's adapted linears give."""
        if self._layers is None:
            self._layers = self._receive(lambda _: None)
        assert self._layers is not None
        return self._layers

    def prove(
        self, directory: Path, layers: Mapping[str, float], progress: Progress
    ) -> ParityReport:
        """Compare the bundle in a folder with the reference."""
        self.layers()
        self._send((directory.absolute(), dict(layers)))
        report: ParityReport = self._receive(progress)
        return report

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._ended() from error

    def _receive(self, progress: Progress) -> Any:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError) as error:
                raise self._ended() from error
            if isinstance(message, BaseException):
                raise message
            if not isinstance(message, str):
                return message
            progress(message)

    def _ended(self) -> EptcError:
        code = self._process.wait()
        if code < 0:
            return OptionError(
                f"the process that verifies was killed by signal {-code}, most likely for want of "
                "memory",
                fix="give --max-memory, so that less is in memory at once, or --no-verify",
            )
        return InternalError(f"the process that verifies ended with code {code}")


def serve(connection: Connection) -> None:
    """Answer a `RemoteVerifier`, until it is closed."""
    with contextlib.suppress(EOFError, OSError), _errors_sent(connection):
        verifier = LocalVerifier(connection.recv())
        connection.send(verifier.layers())
        while True:
            directory, layers = connection.recv()
            connection.send(verifier.prove(directory, layers, connection.send))


@contextlib.contextmanager
def _errors_sent(connection: Connection) -> Iterator[None]:
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionError):
        raise
    except (EptcError, MemoryError) as error:
        connection.send(error)
    except Exception as error:  # noqa: BLE001  # said as a bug by the process that asked
        connection.send(InternalError(f"verification failed: {type(error).__name__}: {error}"))
