"""Stock PEFT adapters, made and run by PEFT itself, beside the engines they become."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import peft
import pytest
import torch
import transformers

import eptc
from eptc import checkpoint
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.runtime import Engine

# PEFT asks transformers by an older name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It takes a bias of the low ranks for a shard.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor:peft.utils.warning.PeftWarning"),
]

Ints = npt.NDArray[np.int64]
LABELS = 3


@dataclasses.dataclass(frozen=True)
class Made:
    """An adapter that PEFT saved, its base, and what PEFT answers."""

    ckpt: Path
    base: Path
    ids: Ints
    mask: Ints
    want: npt.NDArray[np.float32]


def _bert() -> Any:
    shape = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40, num_labels=LABELS, initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(shape)


def _llama() -> Any:
    shape = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape)


def _t5() -> Any:
    shape = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(shape)


_MODELS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "bert": (_bert, "SEQ_CLS", ["query", "value", "dense"]),
    "llama": (_llama, "CAUSAL_LM", ["q_proj", "down_proj"]),
    "t5": (_t5, "SEQ_2_SEQ_LM", ["q", "v", "wo"]),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """Return a function that lets PEFT adapt a small model, save it and answer a batch."""

    def write(name: str = "bert", **options: Any) -> Made:
        build, task_type, targets = _MODELS[name]
        resized = options.pop("resized", None)
        pickled = options.pop("pickled", False)
        torch.manual_seed(7)
        transformers.logging.set_verbosity_error()
        model = build().eval()
        # Head included: PEFT's copy of it is trained and saved with the adapter.
        model.save_pretrained(tmp_path / "base")
        if resized is not None:
            model.resize_token_embeddings(resized, mean_resizing=False)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, **settings))
        adapted.eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        adapted.save_pretrained(str(tmp_path / "ckpt"), safe_serialization=not pickled)
        if pickled:
            tensors = peft.get_peft_model_state_dict(adapted)
            torch.save(tensors, tmp_path / "ckpt" / "adapter_model.bin")
            (tmp_path / "ckpt" / "adapter_model.safetensors").unlink(missing_ok=True)
        ids = torch.randint(3, 50, (3, 9))
        mask = torch.ones_like(ids)
        if name == "bert":
            mask[1, 6:] = 0
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if name == "t5":
            given["decoder_input_ids"] = torch.tensor([[0, 5, 9]] * 3)
        with torch.no_grad():
            want = adapted(**given).logits.numpy()
        return Made(tmp_path / "ckpt", tmp_path / "base", ids.numpy(), mask.numpy(), want)

    return write


def _logits(bundle: Path, made: Made) -> npt.NDArray[np.float32]:
    """Run the files with ONNX Runtime alone."""
    sessions = {
        path.stem: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in bundle.glob("*.onnx")
    }
    if "encoder" in sessions:
        encoder, decoder = sessions["encoder"], sessions["decoder"]
        names = [value.name for value in encoder.get_outputs()]
        found = encoder.run(None, {"input_ids": made.ids, "attention_mask": made.mask})
        feeds = {
            name.replace("present.", "past_key_values."): value
            for name, value in zip(names, found, strict=True)
            if name.startswith("present.")
        }
        tokens = np.array([[0, 5, 9]] * len(made.ids))
        feeds |= {"input_ids": tokens, "encoder_attention_mask": made.mask}
        return _with_empty_cache(decoder, feeds)
    feeds = {"input_ids": made.ids, "attention_mask": made.mask}
    for value in sessions["model"].get_inputs():
        if value.name == "token_type_ids":
            feeds[value.name] = np.zeros_like(made.ids)
        if value.name == "position_ids":
            feeds[value.name] = np.tile(np.arange(made.ids.shape[1]), (len(made.ids), 1))
    return _with_empty_cache(sessions["model"], feeds)


def _with_empty_cache(session: Any, feeds: dict[str, Any]) -> npt.NDArray[np.float32]:
    for value in session.get_inputs():
        if value.name not in feeds:
            shape = [n if isinstance(n, int) else 0 for n in value.shape]
            feeds[value.name] = np.zeros([len(feeds["input_ids"]), *shape[1:]], np.float32)
    logits: npt.NDArray[np.float32] = session.run(["logits"], feeds)[0]
    return logits


def _agree(found: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", list(_MODELS))
def test_engines_answer_like_peft(make: Any, tmp_path: Path, name: str) -> None:
    made = make(name)
    bundle = eptc.export(made.ckpt, base=made.base, out=tmp_path / "out")
    assert bundle.manifest.parity["verified"]
    assert bundle.manifest.checkpoint["format"] == "lora"
    assert bundle.manifest.routing.mode == "constant"
    _agree(_logits(bundle.path, made), made.want)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 64, "layer.1.*value": 3}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"resized": 61},
        {"modules_to_save": ["classifier", "LayerNorm"]},
        {"pickled": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_peft_can_save(make: Any, tmp_path: Path, options: Any) -> None:
    made = make(**options)
    pickled = options.get("pickled", False)
    bundle = eptc.export(
        made.ckpt, base=made.base, out=tmp_path / "out", allow_pickle=pickled, optimize_for="any"
    )
    assert bundle.manifest.parity["verified"]
    _agree(_logits(bundle.path, made), made.want)


def test_the_task_is_described_by_the_caller(make: Any, tmp_path: Path) -> None:
    made = make()
    spec = tmp_path / "tasks.json"
    task = {"name": "mood", "kind": "classification", "labels": ["bad", "fair", "good"]}
    spec.write_text(json.dumps([task]))
    source = checkpoint.read(made.ckpt, made.base, task_spec=spec)
    assert source.contents.tasks[0].labels == ("bad", "fair", "good")
    assert checkpoint.read(made.ckpt, made.base).contents.tasks[0].name == "default"
    assert checkpoint.read(made.ckpt, made.base, tasks=["mood"]).contents.tasks[0].name == "mood"
    with pytest.raises(OptionError, match="names 2 tasks"):
        checkpoint.read(made.ckpt, made.base, tasks=["a", "b"])
    with pytest.raises(OptionError, match="--top-k 2"):
        checkpoint.read(made.ckpt, made.base, top_k=2)
    spec.write_text(json.dumps([{**task, "labels": ["bad", "good"]}]))
    with pytest.raises(TaskError, match="the head has 3 rows"):
        checkpoint.read(made.ckpt, made.base, task_spec=spec)


def test_a_bundle_is_compared_again(make: Any, tmp_path: Path) -> None:
    made = make()
    eptc.export(made.ckpt, base=made.base, out=tmp_path / "out")
    assert eptc.parity(tmp_path / "out", reference=made.ckpt, base=made.base).passed
    report = eptc.inspect(made.ckpt, base=made.base)
    assert (report["format"], report["ranks"]) == ("lora", [4])
    with Engine.load(tmp_path / "out", providers=["cpu"]) as engine:
        assert engine.manifest.routing.meaning.startswith("nothing is routed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base"),
        ({"target_modules": ["query", "word_embeddings"]}, "lora_embedding_A"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_more_than_a_low_rank_is_refused(make: Any, options: Any, words: str) -> None:
    made = make(**options)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(made.ckpt, made.base)


def _tie(base: Path) -> None:
    """Make the output projection of a base the embedding itself."""
    import safetensors.torch

    weights = safetensors.torch.load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_half_of_a_tied_pair_is_refused(make: Any, name: str) -> None:
    """PEFT trains a copy of the one; the other stays what it was."""
    made = make("llama", modules_to_save=[name])
    _tie(made.base)
    with pytest.raises(CheckpointError, match="which is one parameter with"):
        checkpoint.read(made.ckpt, made.base)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_tied_head_as_target_is_refused(make: Any) -> None:
    made = make("llama", target_modules=["lm_head", "q_proj"])
    _tie(made.base)
    with pytest.raises(CheckpointError, match="is the embedding itself"):
        checkpoint.read(made.ckpt, made.base)


def test_adapters_of_other_models_are_named(make: Any) -> None:
    import safetensors.torch

    made = make("llama")
    config = made.ckpt / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(CheckpointError, match="llama with a classification head"):
        checkpoint.read(made.ckpt, made.base)
    made = make()
    path = made.ckpt / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    bare = {name.replace("model.bert.", "model."): t for name, t in tensors.items()}
    safetensors.torch.save_file(bare, path)
    with pytest.raises(CheckpointError, match="the bare bert, without a head"):
        checkpoint.read(made.ckpt, made.base)


def test_several_labels_at_once_are_refused(make: Any) -> None:
    made = make()
    config = made.base / "config.json"
    several = {"problem_type": "multi_label_classification"}
    config.write_text(json.dumps(json.loads(config.read_text()) | several))
    with pytest.raises(TaskError, match="several labels at once"):
        checkpoint.read(made.ckpt, made.base)


def test_releases_that_read_a_pattern_differently(make: Any) -> None:
    """Before 0.14 the first key of either pattern was looked up in both."""
    made = make(
        target_modules=["query", "value"],
        rank_pattern={"query": 2},
        alpha_pattern={"layer.1.attention.self.query": 64},
    )
    with pytest.raises(CheckpointError, match="another alpha in PEFT before"):
        checkpoint.read(made.ckpt, made.base)


def test_damaged_files_are_named(make: Any) -> None:
    import safetensors.torch

    made = make()
    path = made.ckpt / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    for change, words in (
        ({first: None}, f"lacks {first}"),
        ({first: torch.full_like(tensors[first], torch.nan)}, "nan at"),
        ({first: torch.zeros(0, tensors[first].shape[1])}, "no rows"),
        ({"base_model.model.odd.weight": torch.zeros(2)}, "no parameter odd.weight"),
        ({"odd": torch.zeros(2)}, "none of a plain LoRA's"),
    ):
        changed = {**tensors, **change}
        safetensors.torch.save_file({n: t for n, t in changed.items() if t is not None}, path)
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read(made.ckpt, made.base)


@pytest.mark.parametrize("routing", ["frozen", "batch", "per-sample"])
def test_nothing_to_route(make: Callable[..., Made], routing: Any) -> None:
    made = make()
    with pytest.raises(OptionError, match=f"--routing {routing} .*no route reads the input"):
        checkpoint.read(made.ckpt, made.base, routing=routing)
