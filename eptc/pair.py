"""A bundle beside the checkpoint it was made from, before anything is compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import checkpoint
from eptc.calibration import twin
from eptc.errors import BundleError, OptionError, OutputError
from eptc.examples_file import Example, read_examples
from eptc.lossy import budget_of
from eptc.machine import available_memory
from eptc.options import Options
from eptc.parity_gate.answers import Budget, answers, compare_answers, right_answers
from eptc.parity_gate.compare import FP32, bound_of
from eptc.parity_gate.memory import verified_by_block, whole_model_bytes
from eptc.parity_gate.reference_answers import reference_answers
from eptc.parity_gate.verifier import LocalVerifier, Subject
from eptc.precision import SCHEMES
from eptc.runtime import Engine, Manifest, load_manifest
from eptc.tasks import Task

__all__ = ["Pair"]

_CALIBRATED, _SIMULATED = (
    {str(name) for name, scheme in SCHEMES.items() if getattr(scheme, what)}
    for what in ("calibrated", "simulated")
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A bundle and the checkpoint it was made from.

    Args:
        folder: the bundle's.
        manifest: its manifest.
        task: the engine's.
        source: the checkpoint.
        examples: labelled examples; None where there are none.
        by_block: whether one block of the model at a time is compared.
    """

    folder: Path
    manifest: Manifest
    task: Task
    source: checkpoint.Checkpoint
    examples: Sequence[Example] | None
    by_block: bool

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        reference: str | Path,
        base: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        top_k: int | None = None,
        task_spec: str | Path | None = None,
        data: str | Path | None = None,
        allow_pickle: bool = False,
        format: str | None = None,
    ) -> Pair:
        """Read both; arguments as for `eptc.parity`.

        Raises:
            InputError: the bundle, the checkpoint or the data cannot be used, or the bundle was
                made from another checkpoint or base.
        """
        folder = Path(bundle)
        manifest = load_manifest(folder)
        task = manifest.task
        if task is None:
            raise BundleError(f"{folder} was built for no task", expected="a task's bundle")
        recorded = manifest.checkpoint
        kind = _format(folder, recorded) if format is None else checkpoint.find_format(format)
        specs = None
        if not kind.describes_tasks:
            specs = {t["name"]: Task.from_json(t) for t in recorded["tasks"]}
            tasks = tasks or list(specs)
            top_k = top_k if top_k is not None else recorded["top_k"]
        source = checkpoint.read(
            Path(reference),
            Path(base) if base is not None else None,
            top_k=top_k,
            tasks=tasks,
            task_spec=Path(task_spec) if task_spec is not None else None,
            specs=specs,
            allow_pickle=allow_pickle,
            format=kind.name,
            routing=_routing(manifest),
        )
        _check_origin(folder, manifest, source)
        names = [t.name for t in source.contents.tasks]
        if task.name not in names:
            raise BundleError(
                f"{folder} was built for task {task.name!r}, which the checkpoint does not have",
                expected=", ".join(names),
            )
        examples = read_examples(Path(data), task, labelled=True) if data is not None else None
        if examples is not None and task.kind == "generation":
            raise OptionError(f"task {task.name!r} has no labels to score", fix="leave --data out")
        by_block = _by_block(folder, manifest.precision, source)
        return cls(folder, manifest, task, source, examples, by_block)

    @property
    def subject(self) -> Subject:
        """What the bundle is compared with."""
        return Subject(self.source, self.task.name, self.examples, self.by_block)

    @property
    def budget(self) -> Budget:
        """What the engine may cost on labelled data: what its build was allowed, or is usual."""
        if not self.fixes:
            return Budget(max_flips=0.0)
        recorded = (self.manifest.parity.get("scores") or {}).get("budget")
        if recorded is None:
            return budget_of(Options(self.task.name), self.task)
        return Budget(recorded["max_drop"], recorded["max_flips"])

    @property
    def fixes(self) -> list[str]:
        """What to do about what the engine loses by design; nothing of an exact one."""
        fixes = []
        if self.manifest.routing.mode == "frozen":
            fixes.append("build with --routing exact, which keeps the routes")
        if bound_of(self.manifest.precision) != FP32:
            fixes.append("build with a precision that loses less")
        return [*fixes, "or with a larger budget (--max-drop, --max-flips)"] if fixes else []

    @contextlib.contextmanager
    def comparable(self) -> Iterator[Path]:
        """Yield the folder that is compared: of a 16-bit engine its twin, removed afterwards.

        Raises:
            OutputError: there is no room for it where temporary files are kept.
        """
        if self.manifest.precision not in _SIMULATED:
            yield self.folder
            return
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(twin(self.folder))
            except OSError as error:
                raise _no_room(self.folder, self.manifest, error) from error
            yield folder

    def scores(self, folder: Path, verifier: LocalVerifier) -> dict[str, Any] | None:
        """Return how both answer the examples; None without any, or without a tokenizer.

        Args:
            folder: what `comparable` yields.
            verifier: the reference side.
        """
        if self.examples is None or verifier.tokenizer is None:
            return None
        with Engine.load(folder, providers=["cpu"]) as engine:
            got = answers(engine, self.examples)
        want = reference_answers(
            self.manifest, verifier.reference, self.task, verifier.tokenizer, self.examples
        )
        right = right_answers(self.task, self.examples)
        return compare_answers(self.task, want, got, right, precision=self.manifest.precision)


def _no_room(folder: Path, manifest: Manifest, error: OSError) -> OutputError:
    size = sum(record.size for record in manifest.files.values())
    return OutputError(
        f"{folder} is an engine in {manifest.precision}, compared by a simulation of it, and "
        f"that cannot be written: {error.strerror or error}"
        + (f": {error.filename}" if error.filename else ""),
        expected=f"{size / 1e6:.0f} MB free where temporary files are kept",
        fix="free some space, or name another folder with the environment variable TMPDIR",
    )


def _format(folder: Path, recorded: Mapping[str, Any]) -> checkpoint.Format:
    """Return the format of the checkpoint that a bundle was made from.

    Raises:
        BundleError: a package reads it that is not installed.
    """
    try:
        return checkpoint.find_format(recorded["format"])
    except OptionError as error:
        if (origin := recorded.get("origin")) is None:
            raise
        package, _, version = origin.rpartition(" ")
        raise BundleError(
            f"{folder} was made from a checkpoint of the format {recorded['format']!r}, which the "
            f"package {package} reads, and it is not installed",
            fix=f"install {package} ({version} made the bundle)",
        ) from error


def _routing(manifest: Manifest) -> checkpoint.Routing:
    """Return what a build was asked to do with routes that depend on the input."""
    mode = manifest.routing.mode
    return mode if mode in ("batch", "per-sample") else "exact"


def _by_block(folder: Path, precision: str, source: checkpoint.Checkpoint) -> bool:
    """Return whether a bundle is verified block by block.

    Raises:
        OptionError: it has to be for want of memory, and cannot be.
    """
    available = available_memory()
    found = verified_by_block(source, precision, available)
    if found and precision in _CALIBRATED:
        assert available is not None
        raise OptionError(
            f"{folder} is an engine in {precision}, whose ranges hold for the model as a whole: "
            f"comparing it takes {whole_model_bytes(source) / 1e9:.1f} GB, {available / 1e9:.1f} "
            "GB are available",
            fix="compare it where there is more memory",
        )
    return found


def _check_origin(folder: Path, manifest: Manifest, source: checkpoint.Checkpoint) -> None:
    for what, recorded, found in (
        ("checkpoint", manifest.checkpoint["sha256"], source.sha256),
        ("base model", manifest.base["sha256"], source.base.sha256),
    ):
        if recorded != found:
            raise BundleError(
                f"{folder} was made from another {what}: SHA-256 {recorded[:16]}..., "
                f"the one given has {found[:16]}...",
                fix=f"give the {what} it was made from, or build it again",
            )
    # The hash covers the tensors; this is said beside them.
    given: dict[str, object] = {
        "variant": source.contents.variant,
        "top_k": source.contents.top_k,
        "kernel_sizes": list(source.contents.kernel_sizes),
    }
    for key, value in given.items():
        if manifest.checkpoint.get(key) != value:
            raise BundleError(
                f"{folder} was made with {key} {manifest.checkpoint.get(key)}, the checkpoint "
                f"given has {value}",
                fix="give the checkpoint it was made from, or build it again",
            )
