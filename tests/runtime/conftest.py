"""Bundles to load: toy graphs written here, and tiny real models that `eptc.lower` wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from eptc.runtime import (
    MANIFEST,
    FileRecord,
    GenerationSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    TokenizerSpec,
)
from eptc.runtime.seal import sealed
from eptc.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

SENTENCES = (
    "the film was a quiet triumph and the actors were good",
    "a dull plot, bad sound, and an ending nobody wanted",
    "she wrote three letters before the train left the station",
    "prices rose again in spring while wages stayed where they were",
    "does the cat sleep on the warm stone or under the old tree",
    "rain fell all night; in the morning the river was high",
)
SENTIMENT = Task("sentiment", "classification", labels=("negative", "neutral", "positive"))


@dataclasses.dataclass(frozen=True)
class Toy:
    """A bundle whose graph is small enough to be computed by hand."""

    path: Path
    weights: Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A bundle made from a real model, the model, and its Hugging Face tokenizer."""

    path: Path
    model: Any
    tokenizer: Any


def word_pieces() -> list[str]:
    """Return special tokens, letters, every other word of the sentences, and some endings."""
    words = sorted({word.strip(",;") for text in SENTENCES for word in text.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", ";", ":"]
    pieces = [*special, *letters, *words[::2], "##ing", "##ed", "##tion"]
    return list(dict.fromkeys([*pieces, *(f"##{letter}" for letter in letters)]))


def tokenizer(kind: str) -> tokenizers.Tokenizer:
    """Make a tokenizer: `pair` ([CLS] a [SEP] b [SEP]), `end` (a </s>) or `start` (<s> a)."""
    if kind == "pair":
        # Not trained: the trainer of word pieces breaks ties by chance.
        vocabulary = {piece: i for i, piece in enumerate(word_pieces())}
        made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    else:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", "</s>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(SENTENCES, trainer)
    templates = {
        "pair": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")),
        "end": ("$A </s>", "$A </s> $B </s>", ("</s>",)),
        "start": ("<s> $A", "<s> $A <s> $B", ("<s>",)),
    }
    single, pair, names = templates[kind]
    made.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, made.token_to_id(name)) for name in names]
    )
    return made


def specs(model: onnx.ModelProto, file: str) -> GraphSpec:
    """Read a graph's interface."""
    names: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}

    def one(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        return TensorSpec(value.name, names[tensor.elem_type], shape)

    return GraphSpec(file, tuple(map(one, model.graph.input)), tuple(map(one, model.graph.output)))


def save(model: onnx.ModelProto, folder: Path, weights: Mapping[str, Any]) -> None:
    """Write model.onnx and weights.bin."""
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(
        model,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )


def write_manifest(folder: Path, kind: str, **values: Any) -> Path:
    """Complete and write a manifest over the files of a folder."""
    graphs = values.pop("graphs", None) or {
        path.stem: specs(onnx.load(path, load_external_data=False), path.name)
        for path in sorted(folder.glob("*.onnx"))
    }
    files = {
        path.name: FileRecord(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    defaults: dict[str, Any] = {
        "target": "onnx", "opset": 20, "precision": "fp32", "task": None, "num_labels": None,
        "vocab_size": None, "generation": None, "tokenizer": None, "passes": (),
        "checkpoint": {}, "base": {}, "tools": {}, "parity": {"verified": True},
    }  # fmt: skip
    manifest = Manifest(kind=kind, graphs=graphs, files=files, **(defaults | values))
    (folder / MANIFEST).write_text(
        json.dumps(sealed(manifest.to_json()), indent=2), encoding="utf-8"
    )
    return folder


CLASSIFIER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
   int64[batch, sequence] token_type_ids) => (float[batch, 3] logits) {
  words = Gather(E, input_ids)
  types = Gather(T, token_type_ids)
  sum = Add(words, types)
  mask = Cast<to = 1>(attention_mask)
  last = Constant<value_ints = [-1]>()
  column = Unsqueeze(mask, last)
  kept = Mul(sum, column)
  along = Constant<value_ints = [1]>()
  total = ReduceSum<keepdims = 0>(kept, along)
  count = ReduceSum<keepdims = 0>(column, along)
  mean = Div(total, count)
  logits = MatMul(mean, W)
}
"""

# What it caches is its input's embedding; a row's logits are a weighted sum over what is visible.
WRITER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch, sequence] input_ids, int64[batch, total_sequence] attention_mask,
   int64[batch, sequence] position_ids, float[batch, 1, past_sequence, 8] PAST)
=> (float[batch, sequence, 400] logits, float[batch, 1, total_sequence, 8] PRESENT) {
  words = Gather(E, input_ids)
  places = Gather(P, position_ids)
  new = Mul(words, places)
  head = Constant<value_ints = [1]>()
  row = Unsqueeze(new, head)
  PRESENT = Concat<axis = 2>(PAST, row)
  mask = Cast<to = 1>(attention_mask)
  outer = Constant<value_ints = [1, -1]>()
  column = Unsqueeze(mask, outer)
  kept = Mul(PRESENT, column)
  along = Constant<value_ints = [2]>()
  total = ReduceSum<keepdims = 0>(kept, along)
  sum = Add(total, new)
  logits = MatMul(sum, W)
}
"""


def rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give values names that the text form of ONNX cannot spell."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]


def toy_writer(folder: Path, **generation: Any) -> Toy:
    """Write a decoder-only bundle; `reference` in test_generate.py computes it without a cache."""
    random = np.random.default_rng(3)
    weights = {
        "E": random.normal(size=(400, 8)).astype(np.float32),
        "P": random.normal(size=(32, 8)).astype(np.float32),
        "W": random.normal(size=(8, 400)).astype(np.float32),
    }
    model = onnx.parser.parse_model(WRITER)
    rename_values(model.graph, {"PAST": "past_key_values.0.key", "PRESENT": "present.0.key"})
    save(model, folder, weights)
    tokenizer("start").save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "eos_token_id": (1,),
        "max_new_tokens": 6,
        "max_positions": 32,
    } | generation
    write_manifest(
        folder, "decoder-only", vocab_size=400,
        task=Task("story", "generation"),
        generation=GenerationSpec(
            decoder_start_token_id=None, pad_token_id=0, num_layers=1, num_key_value_heads=1,
            head_dim=8, **settings,
        ),
        tokenizer=TokenizerSpec("tokenizer.json", "base", "left", 0, "<pad>", 24, False),
    )  # fmt: skip
    return Toy(folder, weights)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], tokenizers.Tokenizer]:
    return tokenizer


@pytest.fixture(scope="session")
def make_writer() -> Callable[..., Toy]:
    return toy_writer


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Path]:
    """Complete and write the manifest of a folder again."""
    return write_manifest


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    return SENTENCES


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Return a three-label classifier of one text, 16 tokens at most."""
    folder = tmp_path_factory.mktemp("classifier")
    random = np.random.default_rng(2)
    words = tokenizer("pair")
    size = words.get_vocab_size()
    weights = {
        "E": random.normal(size=(size, 4)).astype(np.float32),
        "T": random.normal(size=(2, 4)).astype(np.float32),
        "W": random.normal(size=(4, 3)).astype(np.float32),
    }
    save(onnx.parser.parse_model(CLASSIFIER), folder, weights)
    words.save(str(folder / "tokenizer.json"))
    spec = TokenizerSpec("tokenizer.json", "base", "right", 0, "[PAD]", 16, True)
    write_manifest(
        folder, "encoder-classifier", task=SENTIMENT, num_labels=3, vocab_size=size, tokenizer=spec
    )
    return Toy(folder, weights)


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Return a decoder-only engine with prompts of 24 tokens at most and 32 positions."""
    return toy_writer(tmp_path_factory.mktemp("writer"))


def lower(folder: Path, config: Any, **model_values: Any) -> Any:
    """Make a model with random weights, write its graphs into a folder and return the model."""
    import torch
    import transformers

    from eptc.architectures import architecture
    from eptc.lower import bind, trace, write
    from eptc.tensors import ArrayTensor

    torch.manual_seed(5)
    model = getattr(transformers, architecture(config).task_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than at the start of training: answers then depend on every part.
            if "norm" in name.lower():
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, model_values.get("spread", 0.2))
    weights = {
        name: ArrayTensor(name, parameter.detach().numpy())
        for name, parameter in model.named_parameters()
    }
    graphs = trace(config)
    bind(graphs, weights)
    write(graphs, folder)
    return model


def hugging_face(words: tokenizers.Tokenizer, **values: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=words, **values)


@pytest.fixture(scope="session")
def lowered_bert(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Return a classifier of a pair of texts, 64 tokens at most."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    words = tokenizer("pair")
    config = BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_labels=3,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = lower(folder, config)
    words.save(str(folder / "tokenizer.json"))
    write_manifest(
        folder, "encoder-classifier", num_labels=3, vocab_size=config.vocab_size,
        task=Task("nli", "classification", ("premise", "hypothesis"), labels=("yes", "no", "?")),
        tokenizer=TokenizerSpec("tokenizer.json", "base", "right", 0, "[PAD]", 64, True),
    )  # fmt: skip
    return Lowered(folder, model, hugging_face(words, pad_token="[PAD]"))


@pytest.fixture(scope="session")
def lowered_t5(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Return a text-to-text engine with two labels that random weights never write."""
    from transformers import T5Config

    folder = tmp_path_factory.mktemp("t5")
    words = tokenizer("end")
    config = T5Config(
        vocab_size=400, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_heads=3, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, relative_attention_num_buckets=8,
    )  # fmt: skip
    model = lower(folder, config)
    words.save(str(folder / "tokenizer.json"))
    write_manifest(
        folder, "encoder-decoder", vocab_size=400,
        task=Task("mood", "text-to-text", ("sentence",), "mood: {sentence}", ("good", "bad")),
        generation=GenerationSpec(0, (1,), 0, 8, 2, 3, 12),
        tokenizer=TokenizerSpec("tokenizer.json", "base", "right", 0, "<pad>", 64, False),
    )  # fmt: skip
    return Lowered(folder, model, hugging_face(words, pad_token="<pad>", eos_token="</s>"))


@pytest.fixture(scope="session")
def lowered_llama(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Return a decoder-only engine with two heads to each group of the cache."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    words = tokenizer("start")
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = lower(folder, config)
    words.save(str(folder / "tokenizer.json"))
    write_manifest(
        folder, "decoder-only", vocab_size=400, task=Task("story", "generation"),
        generation=GenerationSpec(None, (1,), 0, 8, 2, 2, 8, max_positions=128),
        tokenizer=TokenizerSpec("tokenizer.json", "base", "left", 0, "<pad>", 64, False),
    )  # fmt: skip
    values = {"pad_token": "<pad>", "eos_token": "</s>", "padding_side": "left"}
    return Lowered(folder, model, hugging_face(words, **values))
