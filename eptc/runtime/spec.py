"""The parts of a bundle's manifest: graphs, tensors, tokenizer, generation, files."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Final

from eptc.errors import BundleError
from eptc.runtime.json_fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DTYPES",
    "INTERFACES",
    "MANIFEST",
    "PACK",
    "TASK_IDS",
    "FileRecord",
    "GenerationSpec",
    "GraphSpec",
    "TensorSpec",
    "TokenizerSpec",
    "file_name",
]

MANIFEST: Final = "manifest.json"
# In its place where a folder holds many tasks over one base.
PACK: Final = "pack.json"
# The input of an engine of several tasks: of each row, the place of its task in the list.
TASK_IDS: Final = "task_ids"

DTYPES: Final = ("bfloat16", "bool", "float16", "float32", "int32", "int64")

# What the runtime feeds and reads, by kind of engine and graph; more may be there.
INTERFACES: Final[dict[str, dict[str, tuple[frozenset[str], frozenset[str]]]]] = {
    "encoder-classifier": {
        "model": (frozenset({"input_ids", "attention_mask"}), frozenset({"logits"})),
    },
    "encoder-decoder": {
        "encoder": (
            frozenset({"input_ids", "attention_mask"}),
            frozenset({"last_hidden_state"}),
        ),
        "decoder": (frozenset({"input_ids", "encoder_attention_mask"}), frozenset({"logits"})),
    },
    "decoder-only": {
        "model": (frozenset({"input_ids", "attention_mask"}), frozenset({"logits"})),
    },
}

# A flat folder of plain names: nothing that a file system somewhere reads as a path.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Args:
        name: its name.
        dtype: one of `DTYPES`.
        shape: a size, or the name of a symbolic dimension (`batch`, `sequence`), per axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: object, where: str) -> TensorSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        shape = fields.items("shape")
        if not all(isinstance(dim, int | str) and not isinstance(dim, bool) for dim in shape):
            raise BundleError(f"{where}: a dimension of {shape} is neither a size nor a name")
        spec = cls(fields.text("name"), fields.choice("dtype", DTYPES), tuple(shape))
        fields.finish()
        return spec


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: its file, and its inputs and outputs in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> frozenset[str]:
        """Names of the inputs."""
        return frozenset(tensor.name for tensor in self.inputs)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "file": self.file,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, data: object, where: str) -> GraphSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        inputs, outputs = (
            tuple(
                TensorSpec.from_json(item, f"{where}.{side}[{i}]")
                for i, item in enumerate(fields.items(side))
            )
            for side in ("inputs", "outputs")
        )
        spec = cls(file_name(fields.text("file"), where), inputs, outputs)
        fields.finish()
        return spec


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """How an engine that writes text starts, stops and sizes its cache.

    Args:
        decoder_start_token_id: first token of an encoder-decoder's answer; None otherwise.
        eos_token_id: tokens that end an answer; may be empty.
        pad_token_id: what follows a finished answer in a batch.
        max_new_tokens: tokens written where the caller does not say.
        num_layers: decoder layers.
        num_key_value_heads: heads of the cache.
        head_dim: width of one head of the cache.
        max_positions: prompt and answer together may not be longer; None where the positions
            have no bound.
        answer_prefix: tokens that training put before each answer (a BOS of its own).
        answer_ends: whether training ended each answer with a stop token.
        task_max_new_tokens: of an engine of several tasks, `max_new_tokens` of each.
    """

    decoder_start_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int | None = None
    answer_prefix: tuple[int, ...] = ()
    answer_ends: bool = True
    task_max_new_tokens: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self) | {
            "eos_token_id": list(self.eos_token_id),
            "answer_prefix": list(self.answer_prefix),
            "task_max_new_tokens": list(self.task_max_new_tokens),
        }

    @classmethod
    def from_json(cls, data: object, where: str) -> GenerationSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        spec = cls(
            fields.optional_integer("decoder_start_token_id"),
            fields.token_ids("eos_token_id"),
            fields.integer("pad_token_id"),
            fields.integer("max_new_tokens", at_least=1),
            fields.integer("num_layers", at_least=1),
            fields.integer("num_key_value_heads", at_least=1),
            fields.integer("head_dim", at_least=1),
            fields.optional_integer("max_positions", at_least=1, default=None),
            fields.token_ids("answer_prefix", default=[]),
            fields.flag("answer_ends", default=True),
            fields.counts("task_max_new_tokens", default=[]),
        )
        fields.finish()
        return spec


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer's file and how its output is padded and cut.

    Args:
        file: a `tokenizers` file.
        source: `base` or `checkpoint`, where it came from (`from` in the manifest).
        padding_side: `right`, or `left` where the answer continues the text.
        pad_token_id: what fills a short row; it is masked.
        pad_token: its text; None where the tokenizer has none of its own.
        max_length: longest input in tokens, special tokens included; None where unbounded.
        return_token_type_ids: whether the engine reads token_type_ids.
        truncation_side: the end that truncation takes tokens from.
        pair_types: whether training told the texts of a pair apart by token_type_ids; where its
            tokenizer passed none to the model, they were all zero.
        chat_template: the file of the model's chat template; None where it has none.
        special_tokens: tokens that a chat template knows by name, such as `bos_token`.
    """

    file: str
    source: str
    padding_side: str
    pad_token_id: int
    pad_token: str | None
    max_length: int | None
    return_token_type_ids: bool
    truncation_side: str = "right"
    pair_types: bool = True
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = dataclasses.asdict(self)
        return {"from" if key == "source" else key: value for key, value in values.items()}

    @classmethod
    def from_json(cls, data: object, where: str) -> TokenizerSpec:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        template = fields.optional_text("chat_template", default=None)
        spec = cls(
            file_name(fields.text("file"), where),
            fields.choice("from", ("base", "checkpoint")),
            fields.choice("padding_side", ("left", "right")),
            fields.integer("pad_token_id"),
            fields.optional_text("pad_token"),
            fields.optional_integer("max_length", at_least=1),
            fields.flag("return_token_type_ids"),
            fields.choice("truncation_side", ("left", "right"), default="right"),
            fields.flag("pair_types", default=True),
            None if template is None else file_name(template, where),
            fields.texts("special_tokens", default={}),
        )
        fields.finish()
        return spec


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """SHA-256 (hex) and size in bytes of one file."""

    sha256: str
    size: int

    @classmethod
    def from_json(cls, data: object, where: str) -> FileRecord:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, where)
        record = cls(fields.text("sha256"), fields.integer("size"))
        if not _SHA256.fullmatch(record.sha256):
            raise BundleError(f"{where}: sha256 is {record.sha256!r}", expected="64 hex digits")
        fields.finish()
        return record


def file_name(name: str, where: str) -> str:
    """Return the name; raises BundleError where it is not the plain name of a bundle's file."""
    if not _FILE_NAME.fullmatch(name) or name in (MANIFEST, PACK):
        raise BundleError(
            f"{where}: {name!r} is not a file name of a bundle",
            expected="a plain name of letters, digits, '.', '_' and '-'",
        )
    return name
