"""The parts of a pack's manifest: what tasks may adapt, and what each task is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from eptc.errors import BundleError, TaskError
from eptc.runtime.json_fields import Fields
from eptc.runtime.routing import RoutingSpec
from eptc.runtime.spec import FileRecord, GenerationSpec, TokenizerSpec, file_name
from eptc.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALIGNMENT", "LABELS", "HeadSpec", "LinearSpec", "PackTask"]

# The size of a head's parameter that differs from task to task.
LABELS: Final = "labels"
# Bytes: weights begin at multiples of it.
ALIGNMENT: Final = 4


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """A linear that tasks of the pack may adapt, y = x W^T + (x A) B.

    Args:
        out_features: columns of B.
        in_features: rows of A.
        graphs: the graphs that apply it.
        offset: where W begins in the weights file, in bytes; it is float32.
        transposed: whether it is stored [in, out], as MatMul reads it, or [out, in].
    """

    out_features: int
    in_features: int
    graphs: tuple[str, ...]
    offset: int
    transposed: bool

    @property
    def place(self) -> tuple[int, int]:
        """Where W begins and ends in the weights file, in bytes."""
        return self.offset, self.offset + 4 * self.in_features * self.out_features

    @classmethod
    def from_json(cls, data: object, where: str) -> LinearSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        spec = cls(
            fields.integer("out_features", at_least=1),
            fields.integer("in_features", at_least=1),
            _names(fields, "graphs"),
            fields.integer("offset"),
            fields.flag("transposed"),
        )
        fields.finish()
        return spec


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """A parameter of which each task has its own.

    Args:
        shape: its sizes; `LABELS` for how many outputs the task has.
        graphs: the graphs that read it.
    """

    shape: tuple[int | str, ...]
    graphs: tuple[str, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> HeadSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        shape = fields.items("shape")
        if not all(size == LABELS or (type(size) is int and size > 0) for size in shape):
            raise BundleError(f"{where} has the shape {shape}", expected=f"sizes or {LABELS!r}")
        spec = cls(tuple(shape), _names(fields, "graphs"))
        fields.finish()
        return spec


@dataclasses.dataclass(frozen=True)
class PackTask:
    """What a pack holds of one task.

    Args:
        file: its factors and its head, in ONNX Runtime's adapter format.
        record: that file's hash and size.
        task: the task as its checkpoint describes it; its name there may be another.
        num_labels: width of a classifier's logits; None where it writes text.
        generation: None for a classifier.
        tokenizer: how its text is cut and padded; None where the pack has no tokenizer.
        routing: what the answer to one row depends on.
        checkpoint: format, hash and description of the checkpoint.
        ranks: how many linears have a low rank of each size, by that size.
        passes: each pass that ran, with options, contract and measured error.
        tools: versions of what added it.
        parity: summary of the comparison with the reference.
    """

    file: str
    record: FileRecord
    task: Task
    num_labels: int | None
    generation: GenerationSpec | None
    tokenizer: TokenizerSpec | None
    routing: RoutingSpec
    checkpoint: Mapping[str, Any]
    ranks: Mapping[str, int]
    passes: tuple[Mapping[str, Any], ...]
    tools: Mapping[str, Any]
    parity: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "file": self.file,
            **dataclasses.asdict(self.record),
            "task": self.task.to_json(),
            "num_labels": self.num_labels,
            "generation": None if self.generation is None else self.generation.to_json(),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_json(),
            "routing": self.routing.to_json(),
            "checkpoint": dict(self.checkpoint),
            "ranks": dict(self.ranks),
            "passes": [dict(entry) for entry in self.passes],
            "tools": dict(self.tools),
            "parity": dict(self.parity),
        }

    def told(self) -> dict[str, Any]:
        """Return what is said of a task in a list: JSON values."""
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "labels": list(self.task.labels),
            "file": self.file,
            "bytes": self.record.size,
            "rank": max(map(int, self.ranks), default=0),
            "linears": sum(self.ranks.values()),
            "format": self.checkpoint["format"],
            "checkpoint": self.checkpoint["sha256"],
            "verified": self.parity["verified"],
        }

    @classmethod
    def from_json(cls, data: object, where: str) -> PackTask:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        generation, tokenizer = fields.optional("generation"), fields.optional("tokenizer")
        record = {"sha256": fields.text("sha256"), "size": fields.integer("size")}
        try:
            task = Task.from_json(fields.mapping("task"))
        except TaskError as error:
            raise BundleError(error.found, expected=error.expected) from error
        found = cls(
            file=file_name(fields.text("file"), where),
            record=FileRecord.from_json(record, where),
            task=task,
            num_labels=fields.optional_integer("num_labels", at_least=1),
            generation=generation and GenerationSpec.from_json(generation, where),
            tokenizer=tokenizer and TokenizerSpec.from_json(tokenizer, where),
            routing=RoutingSpec.from_json(fields.mapping("routing"), where),
            checkpoint=_checkpoint(fields, where),
            ranks=_ranks(fields, where),
            passes=tuple(Fields(item, "a pass").data for item in fields.items("passes")),
            tools=fields.mapping("tools"),
            parity=_parity(fields, where),
        )
        fields.finish()
        return found


def _checkpoint(fields: Fields, where: str) -> Mapping[str, Any]:
    found = Fields(fields.mapping("checkpoint"), f"the checkpoint of {where}")
    for key in ("format", "sha256"):
        found.text(key)
    return found.data


def _parity(fields: Fields, where: str) -> Mapping[str, Any]:
    found = Fields(fields.mapping("parity"), f"the parity of {where}")
    found.flag("verified")
    return found.data


def _ranks(fields: Fields, where: str) -> Mapping[str, int]:
    ranks = fields.mapping("ranks")
    if not all(rank.isdecimal() and type(count) is int for rank, count in ranks.items()):
        raise BundleError(f"{where} has the ranks {dict(ranks)}", expected="counts by rank")
    return ranks


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    names = fields.items(key)
    if not names or not all(isinstance(name, str) for name in names):
        raise BundleError(f"{key!r} is {names!r}", expected="names of graphs")
    return tuple(names)
