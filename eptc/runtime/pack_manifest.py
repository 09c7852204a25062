"""The manifest of a pack: many tasks over one base, what each file is, where weights lie."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from eptc.errors import BundleError
from eptc.runtime.json_fields import Fields
from eptc.runtime.manifest import Manifest, parsed
from eptc.runtime.pack_spec import ALIGNMENT, HeadSpec, LinearSpec, PackTask
from eptc.runtime.seal import read_sealed
from eptc.runtime.spec import INTERFACES, MANIFEST, PACK, FileRecord, GraphSpec, file_name
from eptc.tasks import resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PackManifest", "read_pack"]

# Since 2 with a hash of itself.
_SCHEMA: Final = 2
_REBUILD: Final = "copy the pack again, or build it again with `eptc export --layout pack`"


@dataclasses.dataclass(frozen=True)
class PackManifest:
    """Everything a pack says of itself; `to_json` and `from_json` are inverse.

    Args:
        kind: a key of `INTERFACES`.
        opset: the graphs' ONNX opset.
        optimized_for: execution provider whose kernels the graphs are fused for.
        vocab_size: token ids are below it.
        graphs: by role: over the base's own weights, with the tasks' tensors as optional inputs.
        folded: by role, the file of the same graph without branches.
        weights: the file of the base's weights, which all graphs share.
        linears: by path, what tasks may adapt: inputs `<path>.A` [in, rank] and `<path>.B`
            [rank, out].
        heads: by name, the parameters that are inputs.
        base: hash and description of the base model.
        passes: each pass over the graphs, with options and contract.
        tools: versions of what built it.
        files: every file that all tasks share, by name.
        tasks: by the name they have in this pack, in the order they were added.
        schema_version: of this description.
    """

    kind: str
    opset: int
    optimized_for: str
    vocab_size: int | None
    graphs: Mapping[str, GraphSpec]
    folded: Mapping[str, str]
    weights: str
    linears: Mapping[str, LinearSpec]
    heads: Mapping[str, HeadSpec]
    base: Mapping[str, Any]
    passes: tuple[Mapping[str, Any], ...]
    tools: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    tasks: Mapping[str, PackTask]
    schema_version: int = _SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, keys in the order of the class."""
        return {
            "schema_version": self.schema_version,
            "layout": "pack",
            "kind": self.kind,
            "opset": self.opset,
            "optimized_for": self.optimized_for,
            "vocab_size": self.vocab_size,
            "graphs": {role: graph.to_json() for role, graph in self.graphs.items()},
            "folded": dict(self.folded),
            "weights": self.weights,
            "linears": {
                path: dataclasses.asdict(spec) | {"graphs": list(spec.graphs)}
                for path, spec in self.linears.items()
            },
            "heads": {
                name: {"shape": list(spec.shape), "graphs": list(spec.graphs)}
                for name, spec in self.heads.items()
            },
            "base": dict(self.base),
            "passes": [dict(entry) for entry in self.passes],
            "tools": dict(self.tools),
            "files": {name: dataclasses.asdict(record) for name, record in self.files.items()},
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
        }

    @classmethod
    def from_json(cls, data: object) -> PackManifest:
        """Read JSON values.

        Raises:
            BundleError: a newer schema, an unknown or missing key, a value of the wrong form, or
                parts that contradict each other.
        """
        fields = Fields(data, "the pack's manifest")
        version = fields.schema_version(_SCHEMA, "the pack", oldest=_SCHEMA)
        fields.choice("layout", ("pack",))
        found = cls(
            kind=fields.choice("kind", tuple(INTERFACES)),
            opset=fields.integer("opset", at_least=1),
            optimized_for=fields.choice("optimized_for", ("any", "cpu")),
            vocab_size=fields.optional_integer("vocab_size", at_least=1),
            graphs={
                role: GraphSpec.from_json(graph, f"graph {role!r}")
                for role, graph in fields.mapping("graphs").items()
            },
            folded={
                role: file_name(name, "folded") for role, name in fields.texts("folded").items()
            },
            weights=file_name(fields.text("weights"), "weights"),
            linears={
                path: LinearSpec.from_json(spec, f"linear {path!r}")
                for path, spec in fields.mapping("linears").items()
            },
            heads={
                name: HeadSpec.from_json(spec, f"head {name!r}")
                for name, spec in fields.mapping("heads").items()
            },
            base=_base(fields.mapping("base")),
            passes=tuple(Fields(item, "a pass").data for item in fields.items("passes")),
            tools=fields.mapping("tools"),
            files={
                file_name(name, "files"): FileRecord.from_json(record, f"file {name!r}")
                for name, record in fields.mapping("files").items()
            },
            tasks={
                name: PackTask.from_json(task, f"task {name!r}")
                for name, task in fields.mapping("tasks").items()
            },
            schema_version=version,
        )
        fields.finish()
        found.check()
        return found

    def check(self) -> None:
        """Raise BundleError where parts of the manifest contradict each other."""
        if not self.tasks:
            raise BundleError("the pack has no task", expected="at least one")
        if set(self.folded) != set(self.graphs):
            raise BundleError(
                f"the pack has the folded graphs {sorted(self.folded)}",
                expected=", ".join(self.graphs),
            )
        written = [*(graph.file for graph in self.graphs.values()), *self.folded.values()]
        for name in (*written, self.weights):
            if name not in self.files:
                raise BundleError(f"the pack's manifest lists no file {name}")
        read = [spec.graphs for spec in self.linears.values()]
        read += [spec.graphs for spec in self.heads.values()]
        if unknown := sorted({role for roles in read for role in roles} - set(self.graphs)):
            raise BundleError(f"the pack's manifest names the unknown graph {unknown[0]!r}")
        self._check_places()
        taken = {*self.files, MANIFEST, PACK}
        for name, task in self.tasks.items():
            if task.file in taken:
                raise BundleError(f"the file of task {name!r} is another's too: {task.file}")
            taken.add(task.file)
            self.engine(name).check()

    def _check_places(self) -> None:
        """Raise BundleError where weights do not lie in their file, or into one another."""
        room = self.files[self.weights].size
        end, before = 0, ""
        for path, spec in sorted(self.linears.items(), key=lambda item: item[1].place):
            begin, stop = spec.place
            said = f"the weight of {path} begins at byte {begin} of {self.weights}"
            if stop > room:
                raise BundleError(said, expected=f"the whole of it within {room} bytes")
            if begin % ALIGNMENT:
                raise BundleError(said, expected=f"a multiple of {ALIGNMENT}")
            # Linears that are tied have one weight.
            if begin < end and spec.place != self.linears[before].place:
                raise BundleError(said, expected=f"{end} or more, where that of {before} ends")
            end, before = stop, path

    def name_of(self, wanted: str) -> str:
        """Return the name that a task has here.

        Args:
            wanted: that name, or an alias.

        Raises:
            TaskError: no such task (the nearest names are given), or an alias of several.
        """
        named = [dataclasses.replace(entry.task, name=name) for name, entry in self.tasks.items()]
        return named[resolve(wanted, named)].name

    def engine(self, name: str, *, folded: bool = False) -> Manifest:
        """Return the manifest of one task's engine.

        Args:
            name: the task's name here.
            folded: whether its graphs are those without branches.
        """
        entry = self.tasks[name]
        graphs = {
            role: dataclasses.replace(spec, file=self.folded[role]) if folded else spec
            for role, spec in self.graphs.items()
        }
        return Manifest(
            kind=self.kind,
            target="onnx",
            opset=self.opset,
            precision="fp32",
            task=entry.task,
            num_labels=entry.num_labels,
            vocab_size=self.vocab_size,
            graphs=graphs,
            generation=entry.generation,
            tokenizer=entry.tokenizer,
            passes=(*entry.passes, *self.passes),
            checkpoint=entry.checkpoint,
            base=self.base,
            tools=entry.tools,
            files={**self.files, entry.file: entry.record},
            parity=entry.parity,
            optimized_for=self.optimized_for,
            routing=entry.routing,
        )


def _base(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is said of the base; raises BundleError where its hash is not."""
    Fields(data, "the pack's base").text("sha256")
    return data


def read_pack(directory: str | Path) -> PackManifest:
    """Read the manifest of a pack alone, without a look at the files it lists.

    Raises:
        BundleError: not a folder, not a pack, or a damaged or newer manifest.
    """
    folder = Path(directory)
    path = folder / PACK
    if not path.exists() and not path.is_symlink():
        if (folder / MANIFEST).exists():
            raise BundleError(
                f"{folder} is a bundle of one engine, not a pack",
                expected=f"a {PACK} in it",
                fix="load it with Engine.load, or build a pack with `eptc export --layout pack`",
            )
        raise BundleError(
            f"{folder} is not a pack" if folder.is_dir() else f"{folder} is no folder",
            expected=f"a folder with a {PACK} in it",
            fix="make one from a checkpoint with `eptc export --layout pack`",
        )
    read = functools.partial(read_sealed, read=PackManifest.from_json, since=_SCHEMA)
    return parsed(path, read, _REBUILD)
