"""A pack: many tasks over one base, loaded once; each task answers as an engine of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from eptc.errors import BundleError, OptionError, TaskError
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.engine import Engine
from eptc.runtime.engine_sessions import uncached
from eptc.runtime.graph import Graph
from eptc.runtime.inputs import positive
from eptc.runtime.loading import on_best, open_graphs, open_tokenizer, written
from eptc.runtime.manifest import bundle_file, check_sizes
from eptc.runtime.pack_manifest import PackManifest, read_pack
from eptc.runtime.pack_tensors import factor_names, folded_weights, read_tensors
from eptc.runtime.prepacked import kept_in
from eptc.runtime.providers import Provider, Request, choose
from eptc.runtime.session import open_session
from eptc.runtime.spec import PACK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime.graph import NumpyArray
    from eptc.tasks import Task

__all__ = ["Pack", "only_task", "open_engine"]


class Pack:
    """A loaded pack. Make one with `Pack.load`; threads may share it.

    What tasks share is loaded once, with the first engine: another task costs its own few
    tensors. Tasks that are added later are seen by packs that are loaded later.

    Args:
        directory: the pack's folder.
        manifest: its manifest.
        requests: execution providers in order of preference.
        threads: CPU threads one operator may use.
        strict: whether a provider that fails is an error.
        cache: where optimised graphs are kept; None: nowhere.
        allow_fallback: as for `Engine.load`.
    """

    def __init__(
        self,
        directory: Path,
        manifest: PackManifest,
        requests: Sequence[Request],
        threads: int,
        *,
        strict: bool = True,
        cache: Path | None = None,
        allow_fallback: bool = False,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self._requests = requests
        self._threads = threads
        self._strict = strict
        self._cache = cache
        self._allow_fallback = allow_fallback
        self._written = written(directory, sorted(manifest.files))
        self._graphs: Mapping[str, Graph] = {}
        self._folded: weakref.WeakValueDictionary[tuple[str, str], Graph]
        self._folded = weakref.WeakValueDictionary()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        *,
        cache: bool | str | Path = False,
        allow_fallback: bool = False,
    ) -> Self:
        """Load a pack.

        Args:
            directory: the pack's folder.
            providers: as for `Engine.load`.
            threads: as for `Engine.load`.
            cache: as for `Engine.load`; of the graphs that all tasks share.
            allow_fallback: as for `Engine.load`.

        Raises:
            BundleError: not a pack, damaged, or newer than this version.
            OptionError: a provider that does not start, or a wrong number of threads.
        """
        folder = Path(directory)
        count = usable_cpus() if threads is None else positive("threads", threads)
        manifest = read_pack(folder)
        check_sizes(folder, manifest.files)
        strict = providers is not None
        return cls(
            folder, manifest, choose(providers), count,
            strict=strict, cache=kept_in(cache), allow_fallback=allow_fallback,
        )  # fmt: skip

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks by the names they have here, in the order they were added."""
        return MappingProxyType({name: entry.task for name, entry in self.manifest.tasks.items()})

    def engine(self, task: str, *, folded: bool = False) -> Engine:
        """Return the engine of one task; it answers as the engine of a bundle does.

        Engines of a pack share its sessions: each gives every run its own factors and head,
        which takes an eighth of a run's time at rank 16, and nothing to switch; keep them, for
        each is read anew. A folded engine has sessions of its own, in which the weights that the
        task adapts have its factors in them: it answers as fast as the bundle of the task alone,
        takes as much memory, and some seconds to open.

        Args:
            task: its name here, or an alias.
            folded: whether to open sessions for this task alone.

        Raises:
            TaskError: there is no such task.
            BundleError: a file of the pack was changed since it was loaded, or does not load.
            OptionError: a provider that was asked for did not start.
        """
        name = self.manifest.name_of(task)
        self._check_written()
        tensors = read_tensors(self.directory, self.manifest, name)
        manifest = self.manifest.engine(name, folded=folded)
        graphs = self._open_folded(name, tensors) if folded else self._open()
        reads = self._inputs(folded=folded)
        own = {
            role: graph.with_fixed({key: tensors[key] for key in reads[role] if key in tensors})
            for role, graph in graphs.items()
        }
        return Engine(self.directory, manifest, own, open_tokenizer(self.directory, manifest))

    def __repr__(self) -> str:
        return f"<Pack {self.manifest.kind} tasks={list(self.tasks)}: {self.directory}>"

    def _inputs(self, *, folded: bool) -> dict[str, list[str]]:
        """Return the optional inputs that each graph reads."""
        found: dict[str, list[str]] = {role: [] for role in self.manifest.graphs}
        for name, head in self.manifest.heads.items():
            for role in head.graphs:
                found[role].append(name)
        for path, linear in self.manifest.linears.items():
            for role in () if folded else linear.graphs:
                found[role] += factor_names(path)
        return found

    def _open(self) -> Mapping[str, Graph]:
        if not self._graphs:
            # Any task's: they differ in nothing that a session depends on.
            any_task = self.manifest.engine(next(iter(self.manifest.tasks)))
            shared = dataclasses.replace(any_task, files=self.manifest.files)
            self._graphs = open_graphs(
                self.directory, shared, self._requests, self._threads,
                strict=self._strict, cache=self._cache, allow_fallback=self._allow_fallback,
            )  # fmt: skip
        return self._graphs

    def _open_folded(self, name: str, tensors: Mapping[str, NumpyArray]) -> dict[str, Graph]:
        """Open a task's own sessions, or find them; two threads may both open them, one stays."""
        known = {role: self._folded.get((name, role)) for role in self.manifest.graphs}
        found = {role: graph for role, graph in known.items() if graph is not None}
        if len(found) == len(known):
            return found

        def opened(requests: Sequence[Request]) -> dict[str, Graph]:
            graphs, manifest = {}, self.manifest.engine(name, folded=True)
            own = uncached(requests, manifest.precision)
            for role, spec in manifest.graphs.items():
                session = open_session(
                    bundle_file(self.directory, spec.file), own, self._threads,
                    weights=folded_weights(self.directory, self.manifest, tensors, [role]),
                    allow_fallback=self._allow_fallback,
                )  # fmt: skip
                graphs[role] = Graph(role, spec, session)
            return graphs

        graphs = on_best(self._requests, opened, strict=self._strict)
        _give_back()
        return {
            role: self._folded.setdefault((name, role), graph) for role, graph in graphs.items()
        }

    def _check_written(self) -> None:
        """Refuse what would mix two packs: graphs of one, weights of another."""
        try:
            same = written(self.directory, sorted(self.manifest.files)) == self._written
        except BundleError:
            same = False
        if not same:
            raise BundleError(
                f"the base of the pack {self.directory} was changed since it was loaded",
                fix="load it again; engines that are open already go on answering",
            )


def _give_back() -> None:
    """Let the C library give freed memory back, where it knows how.

    Opening a session, ONNX Runtime copies each weight twice, and what it frees then, half the
    size of the weights, would stay with the process.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    trim = getattr(library, "malloc_trim", None)
    if trim is not None:
        trim(0)


def open_engine(
    directory: Path,
    *,
    task: str | None = None,
    folded: bool = False,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    allow_fallback: bool = False,
) -> Engine:
    """Return the engine in a folder: a bundle's, or of a pack the one of a task.

    Args:
        directory: the bundle or the pack.
        task: the task; None where there is one, or for an engine whose rows name theirs.
        folded: of a pack, whether the engine has sessions of its own.
        providers: as for `Engine.load`.
        threads: likewise.
        allow_fallback: likewise.

    Raises:
        BundleError: neither a bundle nor a pack, or damaged.
        OptionError: a folded engine of a bundle was asked for.
        TaskError: there is no such task; the pack has several, and none was named.
    """
    if not (directory / PACK).exists():
        if folded:
            raise OptionError(
                f"--folded was given for {directory}, which is no pack",
                fix="leave it out: a bundle has sessions of its own",
            )
        engine = Engine.load(
            directory, providers=providers, threads=threads, allow_fallback=allow_fallback
        )
        return engine if task is None else engine.for_task(task)
    pack = Pack.load(
        directory, providers=providers, threads=threads, allow_fallback=allow_fallback
    )
    return pack.engine(only_task(pack.manifest, task, directory), folded=folded)


def only_task(manifest: PackManifest, task: str | None, directory: Path) -> str:
    """Return the name in a pack of the task that is meant: the only one, where none is named.

    Raises:
        TaskError: there is no such task, or none was named where there are several.
    """
    if task is not None:
        return manifest.name_of(task)
    if len(manifest.tasks) > 1:
        raise TaskError(
            f"the pack {directory} has {len(manifest.tasks)} tasks, and none was chosen",
            expected=", ".join(manifest.tasks),
            fix="choose one with --task",
        )
    return next(iter(manifest.tasks))
