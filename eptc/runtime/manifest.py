"""The manifest of a bundle: what the compiler writes down and the runtime relies on."""

from __future__ import annotations

import dataclasses
import functools
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from eptc.errors import BundleError, TaskError
from eptc.runtime.json_fields import Fields
from eptc.runtime.routing import STATIC, RoutingSpec
from eptc.runtime.row_tasks import check_tasks
from eptc.runtime.seal import read_sealed
from eptc.runtime.spec import (
    INTERFACES,
    MANIFEST,
    PACK,
    FileRecord,
    GenerationSpec,
    GraphSpec,
    TokenizerSpec,
    file_name,
)
from eptc.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "SCHEMA_VERSION",
    "SEALED_FROM",
    "Manifest",
    "bundle_file",
    "check_sizes",
    "load_manifest",
    "parsed",
    "plain_file",
    "read_manifest",
]

Parsed = TypeVar("Parsed")

SCHEMA_VERSION: Final = 3
# The first that has a hash of itself.
SEALED_FROM: Final = 3

_REBUILD: Final = "copy the bundle again, or build it again with `eptc export`"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a bundle says of itself; `to_json` and `from_json` are inverse.

    Args:
        kind: a key of `INTERFACES`.
        target: what the graphs were written for (`onnx`).
        opset: the graphs' ONNX opset.
        precision: `fp32`; `fp16-weights` and `bf16-weights` for matrices that are stored in 16
            bits and computed in float32; what the engine was lowered to: `fp16`, `bf16`, `int8`,
            `int8-static`, `fp8`, `int8-fp16`, `fp8-fp16`, `int8-weights`, `int4`, or `mixed`.
        task: the task it was compiled for; None for a bare model, or where there are several.
        num_labels: width of a classifier's logits, that of the widest head where there are
            several; None for an engine that writes text.
        vocab_size: token ids are below it; None where unknown.
        graphs: by role, the keys of `INTERFACES[kind]`.
        generation: None for a classifier.
        tokenizer: None where the bundle has none.
        passes: each pass that ran, with options, contract and measured error.
        checkpoint: format, hash and description of the checkpoint.
        base: hash and description of the base model.
        tools: versions of what built it.
        files: every file beside the manifest, by name.
        optimized_for: execution provider whose kernels the graphs are fused for (`cpu`, `cuda`);
            `any` where all operators are standard ones.
        parity: summary of the comparison with the reference; `verified` says whether it ran.
        routing: what the answer to one row depends on.
        tasks: where the engine serves several tasks, each; a row names its own by its place
            among them.
    """

    kind: str
    target: str
    opset: int
    precision: str
    task: Task | None
    num_labels: int | None
    vocab_size: int | None
    graphs: Mapping[str, GraphSpec]
    generation: GenerationSpec | None
    tokenizer: TokenizerSpec | None
    passes: tuple[Mapping[str, Any], ...]
    checkpoint: Mapping[str, Any]
    base: Mapping[str, Any]
    tools: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    parity: Mapping[str, Any]
    optimized_for: str = "any"
    routing: RoutingSpec = STATIC
    tasks: tuple[Task, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def fusible(self) -> bool:
        """Whether ONNX Runtime fuses the engine's operators soundly: not those around fp8."""
        return not self.precision.startswith("fp8")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, keys in the order of the class."""
        return {
            "schema_version": self.schema_version,
            "kind": self.kind,
            "target": self.target,
            "opset": self.opset,
            "precision": self.precision,
            "optimized_for": self.optimized_for,
            "task": self.task.to_json() if self.task is not None else None,
            "tasks": [task.to_json() for task in self.tasks] if self.tasks else None,
            "routing": self.routing.to_json(),
            "num_labels": self.num_labels,
            "vocab_size": self.vocab_size,
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "generation": self.generation.to_json() if self.generation is not None else None,
            "tokenizer": self.tokenizer.to_json() if self.tokenizer is not None else None,
            "passes": [dict(entry) for entry in self.passes],
            "checkpoint": dict(self.checkpoint),
            "base": dict(self.base),
            "tools": dict(self.tools),
            "files": {name: dataclasses.asdict(record) for name, record in self.files.items()},
            "parity": dict(self.parity),
        }

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Read JSON values.

        Raises:
            BundleError: a newer schema, an unknown or missing key, a value of the wrong form, a
                file name that is not a plain name, or parts that contradict each other.
        """
        fields = Fields(data, "the manifest")
        version = fields.schema_version(SCHEMA_VERSION, "the bundle")
        manifest = cls(
            kind=fields.choice("kind", tuple(INTERFACES)),
            target=fields.text("target"),
            opset=fields.integer("opset", at_least=1),
            precision=fields.text("precision"),
            optimized_for=fields.choice("optimized_for", ("any", "cpu", "cuda"), default="any"),
            task=_task(fields.optional("task")),
            num_labels=fields.optional_integer("num_labels", at_least=1),
            vocab_size=fields.optional_integer("vocab_size", at_least=1, default=None),
            graphs={
                name: GraphSpec.from_json(graph, f"graph {name!r}")
                for name, graph in fields.mapping("graphs").items()
            },
            generation=_optional(fields, "generation", GenerationSpec),
            tokenizer=_optional(fields, "tokenizer", TokenizerSpec),
            passes=tuple(Fields(item, "a pass").data for item in fields.items("passes")),
            checkpoint=fields.mapping("checkpoint"),
            base=fields.mapping("base"),
            tools=fields.mapping("tools"),
            files={
                file_name(name, "files"): FileRecord.from_json(record, f"file {name!r}")
                for name, record in fields.mapping("files").items()
            },
            parity=fields.mapping("parity"),
            routing=STATIC
            if (routing := fields.optional("routing", None)) is None
            else RoutingSpec.from_json(routing, "routing"),
            tasks=()
            if fields.optional("tasks", None) is None
            else tuple(_given_task(item) for item in fields.items("tasks")),
            schema_version=version,
        )
        fields.finish()
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raise BundleError where parts of the manifest contradict each other."""
        wanted = INTERFACES[self.kind]
        if set(self.graphs) != set(wanted):
            raise BundleError(
                f"the bundle of kind {self.kind!r} has the graphs {sorted(self.graphs)}",
                expected=", ".join(wanted),
            )
        for name, (inputs, outputs) in wanted.items():
            graph = self.graphs[name]
            missing = (inputs - {spec.name for spec in graph.inputs}) | (
                outputs - {spec.name for spec in graph.outputs}
            )
            if missing:
                raise BundleError(f"graph {name!r} has no {', '.join(sorted(missing))}")
        writes = self.kind != "encoder-classifier"
        if writes != (self.generation is not None):
            raise BundleError(
                f"the bundle of kind {self.kind!r} has generation "
                f"{'settings' if self.generation is not None else 'null'}"
            )
        if self.generation is not None and self.kind == "encoder-decoder":
            if self.generation.decoder_start_token_id is None:
                raise BundleError("an encoder-decoder has no decoder_start_token_id")
        elif not writes and self.num_labels is None:
            raise BundleError("a classifier has no num_labels")
        check_tasks(self)
        if not writes and self.task is not None and self.task.num_outputs != self.num_labels:
            raise BundleError(
                f"task {self.task.name!r} has {self.task.num_outputs} outputs, "
                f"num_labels is {self.num_labels}"
            )
        named = [graph.file for graph in self.graphs.values()]
        if self.tokenizer is not None:
            named.append(self.tokenizer.file)
            if self.tokenizer.chat_template is not None:
                named.append(self.tokenizer.chat_template)
        for file in named:
            if file not in self.files:
                raise BundleError(f"{file!r} is used but not listed under files")


def load_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a bundle and check that its files are plain files of the right size.

    Their bytes are not read: `eptc.runtime.verify` does that.

    Raises:
        BundleError: not a folder, not a bundle, a damaged or newer manifest, or a listed file
            that is missing, a link, or of another size.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest.files)
    return manifest


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise BundleError for a listed file that is missing, a link, or of another size."""
    for name, record in files.items():
        size = plain_file(folder / name)
        if size != record.size:
            raise BundleError(
                f"{folder / name} has {size} bytes", expected=f"{record.size}", fix=_REBUILD
            )


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a bundle alone, without a look at the files it lists.

    Raises:
        BundleError: not a folder, not a bundle, or a damaged or newer manifest.
    """
    folder = Path(directory)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise BundleError(f"{folder} is {what}", expected="the folder of a bundle")
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        if (folder / PACK).exists():
            raise BundleError(
                f"{folder} is a pack of several tasks, not the bundle of one engine",
                fix="load it with Pack.load and choose a task by engine(), or with --task",
            )
        checkpoint = any((folder / f).exists() for f in ("ept_config.json", "adapter_config.json"))
        raise BundleError(
            f"{folder} is {'a checkpoint, ' if checkpoint else ''}not a bundle",
            expected=f"a {MANIFEST} in it",
            fix="make a bundle from a checkpoint with `eptc export`",
        )
    read = functools.partial(read_sealed, read=Manifest.from_json, since=SEALED_FROM)
    return parsed(path, read, _REBUILD)


def parsed(path: Path, read: Callable[[object], Parsed], fix: str) -> Parsed:
    """Return what a JSON file says.

    Args:
        path: the file.
        read: makes it of the JSON value; its BundleError gets the path.
        fix: what to do about a damaged file, where `read` does not say.

    Raises:
        BundleError: not a plain file, not JSON, or what `read` refuses.
    """
    plain_file(path)
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}", fix=fix) from error
    try:
        return read(data)
    except BundleError as error:
        raise BundleError(
            f"{path}: {error.found}", expected=error.expected, fix=error.fix or fix
        ) from error


def bundle_file(directory: str | Path, name: str) -> Path:
    """Return the path of a bundle's file; raises BundleError where it is not a plain file."""
    path = Path(directory) / file_name(name, "files")
    plain_file(path)
    return path


def plain_file(path: Path) -> int:
    """Return the size of a regular file; a link could lead out of the bundle.

    Raises:
        BundleError: it is not there, or no regular file.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", fix=_REBUILD) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a file"
        raise BundleError(f"{path} is {kind}", expected="a plain file", fix=_REBUILD)
    return status.st_size


def _task(data: object) -> Task | None:
    return None if data is None else _given_task(data)


def _given_task(data: object) -> Task:
    try:
        return Task.from_json(Fields(data, "task").data)
    except TaskError as error:
        raise BundleError(error.found, expected=error.expected) from error


def _optional(fields: Fields, key: str, kind: type[Any]) -> Any:
    data = fields.optional(key)
    return None if data is None else kind.from_json(data, key)
