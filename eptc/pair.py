"""A bundle beside the checkpoint it was made from, before anything is compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eptc import checkpoint
from eptc.calibration import twin
from eptc.errors import BundleError, OptionError, OutputError
from eptc.examples_file import Example, read_examples, read_task_examples
from eptc.lossy import budget_of
from eptc.machine import available_memory
from eptc.options import Options
from eptc.origin import check_origin, format_of
from eptc.parity_gate.answers import Budget, answers, compare_answers, right_answers
from eptc.parity_gate.compare import FP32, bound_of
from eptc.parity_gate.memory import verified_by_block, whole_model_bytes
from eptc.parity_gate.reference_answers import reference_answers
from eptc.parity_gate.verifier import ON_CPU, LocalVerifier, Subject
from eptc.precision import SCHEMES
from eptc.runtime import Engine, Manifest, load_manifest
from eptc.runtime.pack import Pack, only_task, open_engine
from eptc.runtime.providers import CPU, Provider
from eptc.runtime.row_tasks import of_task
from eptc.runtime.spec import PACK
from eptc.stacking import refused_blocks
from eptc.tasks import Task

if TYPE_CHECKING:
    from eptc.parity_gate.packs import PackGate

__all__ = ["Pair"]

_CALIBRATED, _SIMULATED = (
    {str(name) for name, scheme in SCHEMES.items() if getattr(scheme, what)}
    for what in ("calibrated", "simulated")
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A bundle, or one task of a pack, and the checkpoint it was made from.

    Args:
        folder: the bundle's, or the pack's.
        manifest: its manifest; of a pack, that of the task's engine.
        tasks: the engine's.
        source: the checkpoint.
        labelled: labelled examples by the name of their task; None where there are none.
        by_block: whether one block of the model at a time is compared.
        pack: the pack; None where it is a bundle.
        packed: the task's name in the pack.
        engine_options: how the engine is loaded, as for `Engine.load`.
    """

    folder: Path
    manifest: Manifest
    tasks: tuple[Task, ...]
    source: checkpoint.Checkpoint
    labelled: Mapping[str, Sequence[Example]] | None
    by_block: bool
    pack: Pack | None = None
    packed: str = ""
    engine_options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: ON_CPU)

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        reference: str | Path,
        task: str | None = None,
        base: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        top_k: int | None = None,
        task_spec: str | Path | None = None,
        data: str | Path | None = None,
        allow_pickle: bool = False,
        format: str | None = None,
        providers: Sequence[Provider] | None = None,
        allow_fallback: bool = False,
    ) -> Pair:
        """Read both; arguments as for `eptc.parity`.

        Raises:
            InputError: the bundle, the checkpoint or the data cannot be used, or the bundle was
                made from another checkpoint or base.
        """
        folder = Path(bundle)
        options: dict[str, Any] = {
            "providers": providers or ["cpu"],
            "allow_fallback": allow_fallback,
        }
        pack = _pack(folder, task, options)
        packed = "" if pack is None else only_task(pack.manifest, task, folder)
        manifest = load_manifest(folder) if pack is None else pack.manifest.engine(packed)
        tasks_of = manifest.tasks or (() if manifest.task is None else (manifest.task,))
        if not tasks_of:
            raise BundleError(f"{folder} was built for no task", expected="a task's bundle")
        recorded = manifest.checkpoint
        kind = format_of(folder, recorded) if format is None else checkpoint.find_format(format)
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
        check_origin(folder, manifest, source)
        _check_tasks(folder, tasks_of, source)
        labelled = None if data is None else _labelled(Path(data), manifest)
        _check_labelled(tasks_of, labelled or {})
        by_block = pack is None and _by_block(folder, manifest.precision, source)
        if by_block and manifest.tasks:
            raise refused_blocks(source, manifest.precision)
        if by_block and not _on_cpu(options["providers"]):
            raise OptionError(
                f"{folder} is compared block by block, which runs on the CPU",
                fix="leave --provider out, or compare it where there is more memory",
            )
        return cls(folder, manifest, tasks_of, source, labelled, by_block, pack, packed, options)

    def of_packed(self, name: str, examples: Sequence[Example] | None) -> Pair:
        """Return another task of the same pack beside the same checkpoint.

        Args:
            name: the task's name in the pack.
            examples: its labelled examples.

        Raises:
            InputError: the task was made from another checkpoint, or has no labels.
        """
        assert self.pack is not None
        manifest = self.pack.manifest.engine(name)
        assert manifest.task is not None
        tasks = (manifest.task,)
        check_origin(self.folder, manifest, self.source)
        _check_tasks(self.folder, tasks, self.source)
        labelled = None if examples is None else {manifest.task.name: examples}
        _check_labelled(tasks, labelled or {})
        return dataclasses.replace(
            self, manifest=manifest, tasks=tasks, labelled=labelled, packed=name
        )

    @property
    def task(self) -> Task:
        """The task of an engine that has one."""
        (task,) = self.tasks
        return task

    def manifest_of(self, task: Task) -> Manifest:
        """Return the manifest of the engine as one of a single task."""
        return (
            of_task(self.manifest, self.tasks.index(task))
            if self.manifest.tasks
            else self.manifest
        )

    @property
    def examples(self) -> Sequence[Example] | None:
        """Labelled examples of an engine of one task; None where there are none."""
        return None if self.labelled is None else self.labelled[self.task.name]

    @property
    def subject(self) -> Subject:
        """What the bundle is compared with."""
        if self.manifest.tasks:
            names = [task.name for task in self.tasks]
            return Subject(self.source, names, self.labelled, self.by_block)
        return Subject(self.source, self.task.name, self.examples, self.by_block)

    def budget(self, task: str) -> Budget:
        """Return what the engine may cost on labelled data: what its build was allowed, or usual.

        Args:
            task: name of the task the data is for.
        """
        if not self.fixes:
            return Budget(max_flips=0.0)
        recorded = (self.manifest.parity.get("scores") or {}).get("budget")
        if recorded is None:
            return budget_of(Options(task), next(t for t in self.tasks if t.name == task))
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

        On another provider than the CPU's it is the engine itself: there it computes in 16 bits.

        Raises:
            OutputError: there is no room for it where temporary files are kept.
        """
        on_cpu = _on_cpu(self.engine_options["providers"])
        if self.manifest.precision not in _SIMULATED or not on_cpu:
            yield self.folder
            return
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(twin(self.folder))
            except OSError as error:
                raise _no_room(self.folder, self.manifest, error) from error
            yield folder

    def scores(
        self, folder: Path, verifier: LocalVerifier | PackGate
    ) -> dict[str, dict[str, Any]] | None:
        """Return how both answer the examples, by task; None without any, or a tokenizer.

        Args:
            folder: what `comparable` yields.
            verifier: the reference side.
        """
        if self.labelled is None or verifier.tokenizer is None:
            return None
        with open_engine(folder, task=self.packed or None, **self.engine_options) as engine:
            return {
                name: _scores(engine.for_task(name), verifier, rows)
                for name, rows in self.labelled.items()
            }


def _on_cpu(providers: Sequence[Provider]) -> bool:
    """Return whether nothing but the CPU's provider is asked for."""
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    return all(name.lower() in ("cpu", CPU.lower()) for name in names)


def _pack(folder: Path, task: str | None, options: Mapping[str, Any]) -> Pack | None:
    """Return the pack in a folder; None where it is a bundle, of which every task is compared."""
    if (folder / PACK).exists():
        return Pack.load(folder, **options)
    if task is not None:
        raise OptionError(
            f"--task {task} was given for {folder}, which is no pack",
            fix="leave it out: every task of a bundle is compared",
        )
    return None


def _check_tasks(folder: Path, tasks: Sequence[Task], source: checkpoint.Checkpoint) -> None:
    """Raise BundleError where a checkpoint does not have the tasks of an engine."""
    names = [t.name for t in source.contents.tasks]
    if lost := [task.name for task in tasks if task.name not in names]:
        raise BundleError(
            f"{folder} was built for task {lost[0]!r}, which the checkpoint does not have",
            expected=", ".join(names),
        )


def _check_labelled(tasks: Sequence[Task], labelled: Mapping[str, Sequence[Example]]) -> None:
    """Raise OptionError where there are examples of a task without labels."""
    for task in tasks:
        if task.name in labelled and task.kind == "generation":
            raise OptionError(f"task {task.name!r} has no labels to score", fix="leave --data out")


def _labelled(path: Path, manifest: Manifest) -> dict[str, list[Example]]:
    """Return the labelled rows of a file by the name of their task."""
    if manifest.tasks:
        return read_task_examples(path, manifest.tasks, labelled=True)
    assert manifest.task is not None
    return {manifest.task.name: read_examples(path, manifest.task, labelled=True)}


def _scores(
    engine: Engine, verifier: LocalVerifier | PackGate, examples: Sequence[Example]
) -> dict[str, Any]:
    """Return how an engine of one task and the reference answer examples."""
    manifest, task = engine.manifest, engine.task
    assert task is not None
    assert verifier.tokenizer is not None
    got = answers(engine, examples)
    want = reference_answers(manifest, verifier.reference, task, verifier.tokenizer, examples)
    right = right_answers(task, examples)
    return compare_answers(task, want, got, right, precision=manifest.precision)


def _no_room(folder: Path, manifest: Manifest, error: OSError) -> OutputError:
    size = sum(record.size for record in manifest.files.values())
    return OutputError(
        f"{folder} is an engine in {manifest.precision}, compared by a simulation of it, and "
        f"that cannot be written: {error.strerror or error}"
        + (f": {error.filename}" if error.filename else ""),
        expected=f"{size / 1e6:.0f} MB free where temporary files are kept",
        fix="free some space, or name another folder with the environment variable TMPDIR",
    )


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
