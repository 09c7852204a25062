"""`--target hf`: folders for transformers, loaded by it, beside what other code answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers

import eptc
from eptc.errors import OptionError, OutputError, ParityError, TaskError
from eptc.interop import hf, hf_texts

TASKS = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
# The linears of the small native checkpoint that have experts.
ADAPTED = ("query.weight", "value.weight", "intermediate.dense.weight", "output.dense.weight")
AUTO = {
    "t5": transformers.AutoModelForSeq2SeqLM,
    "llama": transformers.AutoModelForCausalLM,
}


def load(folder: Path) -> Any:
    """Return what anybody's `from_pretrained` makes of a folder; nothing may be left over."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AUTO.get(kind, transformers.AutoModelForSequenceClassification)
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors(folder: Path) -> dict[str, Any]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


@pytest.mark.parametrize("name", ["t5-tiny", "t5-topk1", "t5-gated-tiny", "llama-tiny"])
@pytest.mark.parametrize("task", [1, 6])
def test_loads_and_equals_the_original(golden: Path, tmp_path: Path, name: str, task: int) -> None:
    """The logits that the authors' own code recorded."""
    source = golden / "ept" / name
    meta = json.loads((source / "meta.json").read_text())
    folder = eptc.export(
        source / "adapter", base=source / "base", task=task, tasks=meta["tasks"],
        top_k=meta["moe_top_k"], target="hf", out=tmp_path / "hf",
    )  # fmt: skip
    want = np.load(source / "golden" / f"task{task}.npz")
    model = load(folder.path)
    inputs = {
        key: torch.from_numpy(want[key])
        for key in ("input_ids", "attention_mask", "decoder_input_ids")
        if key in want and (key != "decoder_input_ids" or model.config.is_encoder_decoder)
    }
    if not model.config.is_encoder_decoder:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(**inputs).logits.numpy()
    where = want["attention_mask"][..., None] if got.shape[1] == want["input_ids"].shape[1] else 1
    np.testing.assert_allclose(got * where, want["logits"] * where, rtol=0, atol=1e-4)
    found = folder.parity[meta["tasks"][task]]
    assert found["mode"] == "weights and outputs"
    assert found["outputs"]["flips"] == 0
    assert model.dtype == torch.float32


def test_a_classifier(small_native: Any, tmp_path: Path) -> None:
    """Its head, its labels, its tokenizer; the engine answers the same."""
    text = "a very good film"
    for task in ("tone", "score"):
        folder = eptc.export(
            small_native.ckpt, base=small_native.base, task=task, target="hf", out=tmp_path / task
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path)
        model = load(folder.path)
        with torch.no_grad():
            got = model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
        engine = eptc.export(
            small_native.ckpt, base=small_native.base, task=task, out=tmp_path / f"{task}-onnx",
            verify=False,
        )  # fmt: skip
        with engine.load(providers=["cpu"]) as loaded:
            want = loaded.run(loaded.tokenize([text]))["logits"][0]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    labels = json.loads((tmp_path / "tone" / "config.json").read_text())
    assert labels["id2label"] == {"0": "bad", "1": "good"}
    assert labels["label2id"] == {"bad": 0, "good": 1}
    assert labels["architectures"] == ["BertForSequenceClassification"]


SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
BASES: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**SHAPE, num_labels=3, initializer_range=0.3)
        ),
        "SEQ_CLS", ["query", "value"],
    ),
    "deberta-v2": (
        lambda: transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(
                **SHAPE, num_labels=3, relative_attention=True, position_buckets=8,
                pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
                position_biased_input=False, initializer_range=0.3, type_vocab_size=0,
            )
        ),
        "SEQ_CLS", ["query_proj", "value_proj"],
    ),
    "llama, tied": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "CAUSAL_LM", ["q_proj", "down_proj"],
    ),
    "t5 v1.1": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=50, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        ),
        "SEQ_2_SEQ_LM", ["q", "wo"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_lora(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Each architecture; what PEFT answers on the same files. Tied weights are there once."""
    build, kind, targets = BASES[name]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(7)
    base = build().eval().to(dtype)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type=kind, r=4, lora_alpha=8, target_modules=targets)
    adapted = peft.get_peft_model(base.float(), config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(tmp_path / "ckpt"))
    inputs = {"input_ids": torch.randint(3, 50, (3, 9))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kind == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.tensor([[0, 5, 9]] * 3)
    with torch.no_grad():
        want = adapted(**inputs).logits.numpy()
    folder = eptc.export(tmp_path / "ckpt", base=tmp_path / "base", target="hf",
                         out=tmp_path / "hf")  # fmt: skip
    model = load(folder.path)
    with torch.no_grad():
        got = model(**inputs).logits.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * max(1.0, np.abs(want).max()))
    stored = tensors(folder.path)
    assert len(stored) == len(list(model.named_parameters()))  # which counts tied ones once
    assert {tensor.dtype.name for tensor in stored.values()} == {"float32"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keep_stores_what_the_base_stores(copy_native: Any, tmp_path: Path, dtype: Any) -> None:
    """Weights without experts to the bit, folded ones within one rounding, heads as trained."""
    model = transformers.BertModel.from_pretrained(copy_native.base).to(dtype)
    model.save_pretrained(copy_native.base)
    config = json.loads((copy_native.ckpt / "ept_config.json").read_text())
    config["base"]["sha256"] = None
    (copy_native.ckpt / "ept_config.json").write_text(json.dumps(config))
    for precision in ("keep", "fp32"):
        folder = eptc.export(
            copy_native.ckpt, base=copy_native.base, task="tone", target="hf",
            precision=precision, out=tmp_path / precision,
        )  # fmt: skip
    kept, exact, base = (
        tensors(tmp_path / "keep"), tensors(tmp_path / "fp32"), tensors(copy_native.base)
    )  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    assert kept["bert.encoder.layer.0.attention.self.query.weight"].dtype.name == name
    assert kept["classifier.weight"].dtype.name == "float32"
    for key, tensor in kept.items():
        info: Any = ml_dtypes.finfo
        low, step = (float(getattr(info(tensor.dtype), n)) for n in ("smallest_subnormal", "eps"))
        np.testing.assert_allclose(tensor.astype(float), exact[key], rtol=step / 2, atol=low)
        stored = base.get(key.removeprefix("bert."))
        if stored is not None and not key.endswith(ADAPTED):
            assert np.array_equal(tensor, stored)
    config = json.loads((tmp_path / "keep" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (name, name)
    assert folder.parity["tone"]["outputs"]["flips"] == 0
    assert json.loads((tmp_path / "keep" / "eptc.json").read_text())["precision"] == "keep"


def test_shards(small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of bounded size, an index, the same model; equal to the byte on every run."""
    monkeypatch.setattr(hf, "SHARD", 6000)
    folders = [
        eptc.export(small_native.ckpt, base=small_native.base, task=task, target="hf",
                    out=tmp_path / name).path
        for name, task in (("one", "tone"), ("two", "sentiment"))
    ]  # fmt: skip
    index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    shards = sorted(folders[0].glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    for path in shards:
        held = safetensors.numpy.load_file(path)
        total = sum(tensor.nbytes for tensor in held.values())
        assert total <= 6000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folders[0]).values())
    load(folders[0])
    one, two = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert one == two
    for name, content in one.items():
        for path in (tmp_path, small_native.root, Path(eptc.__file__).parents[1]):
            assert str(path).encode() not in content, name


def test_the_base_may_be_sharded_otherwise(
    small_native: Any, copy_native: Any, tmp_path: Path
) -> None:
    """What is written depends on the numbers, not on the files they came in."""
    transformers.BertModel.from_pretrained(copy_native.base).save_pretrained(
        copy_native.base, max_shard_size="6KB"
    )
    (copy_native.base / "model.safetensors").unlink()
    one, two = (
        eptc.export(given.ckpt, base=given.base, task="tone", target="hf", out=tmp_path / name)
        for name, given in (("one", small_native), ("two", copy_native))
    )
    for path in one.path.iterdir():
        assert path.read_bytes() == (two.path / path.name).read_bytes(), path.name


def test_what_it_says_of_itself(small_native: Any, tmp_path: Path) -> None:
    folder = eptc.export(
        small_native.ckpt, base=small_native.base, task="same", target="hf", out=tmp_path / "hf"
    )
    said = json.loads((folder.path / "eptc.json").read_text())
    assert said["target"] == "hf"
    assert [task["name"] for task in said["tasks"]] == ["same"]
    assert said["parity"] == folder.parity["same"]
    assert set(said["files"]) == {p.name for p in folder.path.iterdir()} - {"eptc.json"}
    card = (folder.path / "README.md").read_text()
    for expected in (
        "# Task `same`", said["checkpoint"]["sha256"], said["base"]["sha256"], "`fold-pyramid`",
        "Labels: `no`, `yes`", "pairs of texts: first, second",
        "pipeline_tag: text-classification",
        f"All {said['parity']['weights']['tensors']} tensors", "0 flips",
    ):  # fmt: skip
        assert expected in card
    unproven = eptc.export(
        small_native.ckpt, base=small_native.base, task="same", target="hf",
        out=tmp_path / "unproven", verify=False,
    )  # fmt: skip
    assert unproven.parity == {"same": {"verified": False}}
    assert "Nothing: `--no-verify` was given." in (unproven.path / "README.md").read_text()
    assert tensors(unproven.path).keys() == tensors(folder.path).keys()


def test_a_card_is_text_whatever_a_task_says(copy_native: Any, tmp_path: Path) -> None:
    """Signs of Markdown in prompts, labels and names stay signs."""
    path = next(copy_native.ckpt.glob("*.json"))
    config = json.loads(path.read_text())
    (task,) = [task for task in config["tasks"] if task["name"] == "tone"]
    task |= {"labels": ["a`b", "c"], "prompt": "```\n{text}"}
    path.write_text(json.dumps(config))
    folder = eptc.export(
        copy_native.ckpt, base=copy_native.base, task="tone", target="hf", out=tmp_path / "hf",
        verify=False,
    )  # fmt: skip
    card = (folder.path / "README.md").read_text()
    assert "Labels: `` a`b ``, `c`." in card
    assert "````text\n```\n{text}\n````" in card


@pytest.mark.parametrize("kept", [None, {"eos_token_id": 1, "pad_token_id": 0}])
def test_the_first_token_of_an_answer(
    copy_golden: Callable[..., Any], golden: Path, tmp_path: Path, kept: dict[str, Any] | None
) -> None:
    """It is said where the base's files say nothing: what the engine begins with."""
    copy = copy_golden("t5-tiny")
    settled = json.loads((copy.base / "config.json").read_text())
    settled.pop("decoder_start_token_id", None)
    (copy.base / "config.json").write_text(json.dumps(settled))
    (copy.base / "generation_config.json").unlink()
    if kept is not None:
        (copy.base / "generation_config.json").write_text(json.dumps(kept))
    meta = json.loads((golden / "ept" / "t5-tiny" / "meta.json").read_text())
    folder = eptc.export(
        copy.ckpt, base=copy.base, task=1, tasks=meta["tasks"], top_k=meta["moe_top_k"],
        target="hf", out=tmp_path / "hf", verify=False,
    )  # fmt: skip
    said = json.loads((folder.path / "generation_config.json").read_text())
    assert said["decoder_start_token_id"] == said["pad_token_id"] == 0
    written = load(folder.path).generate(torch.tensor([[5, 6, 1]]), max_new_tokens=2)
    assert written[0, 0] == 0


def test_texts_to_verify_on(small_native: Any, tmp_path: Path) -> None:
    probe = tmp_path / "probe.jsonl"
    probe.write_text('{"text": "a dull film"}\n')
    folder = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", target="hf", probe=probe,
        out=tmp_path / "hf",
    )  # fmt: skip
    assert folder.parity["tone"]["texts_tokenized_equally"] == 6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "int8"}, "--precision int8 was given together with --target hf"),
    "unknown precision": ({"precision": "int3"}, "--precision int3"),
    "routing": ({"routing": "frozen"}, "--routing frozen was given together with --target hf"),
    "layout": ({"layout": "optimum"}, "--layout optimum was given together with --target hf"),
    "rank": ({"max_rank": 4}, "--max-rank 4 was given together with --target hf"),
    "provider": ({"optimize_for": "cuda"}, "--optimize-for cuda"),
    "genai": ({"genai_python": "python"}, "--genai-python python was given together with"),
    "probe": ({"probe": "x", "verify": False}, "--probe was given together with --no-verify"),
    "memory": ({"max_memory": 10**6}, "writing the folder takes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_make_no_sense(small_native: Any, tmp_path: Path, name: str) -> None:
    options, found = REFUSED[name]
    with pytest.raises(OptionError) as error:
        eptc.export(
            small_native.ckpt, base=small_native.base, task="tone", target="hf",
            out=tmp_path / "hf", **options,
        )  # fmt: skip
    assert found in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_several_tasks(small_native: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="folds one of them"):
        eptc.export(small_native.ckpt, base=small_native.base, task="all", target="hf",
                    out=tmp_path / "hf")  # fmt: skip


def test_what_reads_its_input(
    small_routed: Any, write_tucka: Any, small_mept: Any, tmp_path: Path
) -> None:
    """Routes by token, TuckA, prompts: refused by name, for nothing of it is a plain weight."""
    tucka, mept = write_tucka(), small_mept()
    for given, task, options, found in (
        (small_routed, "tone", {}, "experts are chosen by the input"),
        (tucka, None, {}, "(tucka) cannot be folded"),
        (mept, None, {}, "prompts before the text"),
    ):
        with pytest.raises(OptionError, match="--target hf folds a task") as error:
            eptc.export(
                given.ckpt, base=given.base, task=task, target="hf", out=tmp_path / "hf",
                **options,
            )  # fmt: skip
        assert found in str(error.value)
    assert not (tmp_path / "hf").exists()


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Change a tensor in the folder's file."""
    path = folder / "model.safetensors"
    held = safetensors.numpy.load_file(path)
    found = edit(held.pop(name))
    held |= {} if found is None else found if isinstance(found, dict) else {name: found}
    safetensors.numpy.save_file(held, path, metadata={"format": "pt"})


def settle(folder: Path, file: str, **entries: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY = "bert.encoder.layer.0.attention.self.key.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "experts left out": (
        lambda f: change(f, QUERY, lambda w: w * np.float32(1.001)), "query.weight in the fol",
    ),
    "transposed": (lambda f: change(f, QUERY, lambda w: w.T.copy()), "query.weight in the folder"),
    "a bit off": (
        lambda f: change(f, KEY, lambda w: np.nextafter(w, np.float32(9))), "key.weight in the f",
    ),
    "not a number": (lambda f: change(f, QUERY, lambda w: w * np.nan), "query.weight in the fol"),
    "narrower": (lambda f: change(f, KEY, lambda w: w.astype(np.float16)), "has the type float16"),
    "missing": (lambda f: change(f, KEY, lambda _: None), "the folder has no bert.encoder"),
    "one too many": (
        lambda f: change(f, KEY, lambda w: {KEY: w, "extra.weight": w}), "has extra.weight",
    ),
    "another task's head": (
        lambda f: change(f, "classifier.weight", lambda w: w[::-1].copy()), "classifier.weight in",
    ),
    "labels": (
        lambda f: settle(f, "config.json", id2label={"0": "good", "1": "bad"}), "labels is",
    ),
    "activation": (lambda f: settle(f, "config.json", hidden_act="relu"), "output tensors differ"),
    "tokenizer": (lambda f: settle(f, "tokenizer_config.json", pad_token="a"), "pad_token_id is"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(
    small_native: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is off on disk is named, nothing is published, the exit code is 1."""
    plant, found = FAULTS[name]
    write = hf_texts.write_texts

    def spoil(directory: Path, *args: Any) -> None:
        write(directory, *args)
        plant(directory)

    monkeypatch.setattr(hf, "write_texts", spoil)
    done = cli("export", small_native.ckpt, "--base", small_native.base, "--task", "tone",
               "--target", "hf", "--out", tmp_path / "hf")  # fmt: skip
    assert done.code == 1, done.stderr
    assert found in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["experts left out", "a bit off", "missing", "another task's head"]
)
def test_a_model_larger_than_memory(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Tensor by tensor, a parameter of the reference at a time; faults are found all the same."""
    monkeypatch.setattr(hf, "fits", lambda _: False)
    options = {"base": small_native.base, "task": "tone", "target": "hf"}
    folder = eptc.export(small_native.ckpt, out=tmp_path / "hf", **options)
    assert folder.parity["tone"]["mode"] == "weights"
    assert "outputs" not in folder.parity["tone"]
    write = hf_texts.write_texts

    def spoil(directory: Path, *args: Any) -> None:
        write(directory, *args)
        FAULTS[name][0](directory)

    monkeypatch.setattr(hf, "write_texts", spoil)
    with pytest.raises(ParityError, match=FAULTS[name][1]):
        eptc.export(small_native.ckpt, out=tmp_path / "off", **options)
    assert not (tmp_path / "off").exists()


def test_a_swapped_task_is_found(copy_native: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The reference finds the task by its own list: a reader that takes another is found out."""
    from eptc.interop import targets

    monkeypatch.setattr(targets, "chosen", lambda *_: [1])
    with pytest.raises(ParityError):
        eptc.export(copy_native.ckpt, base=copy_native.base, task="tone", target="hf",
                    out=tmp_path / "hf")  # fmt: skip


def test_replaces_its_own(small_native: Any, tmp_path: Path) -> None:
    """--force replaces a folder in one step; without it the place is taken."""
    out = tmp_path / "hf"
    options = {"base": small_native.base, "task": "tone", "target": "hf", "out": out}
    eptc.export(small_native.ckpt, **options)
    with pytest.raises(OutputError, match="is not empty"):
        eptc.export(small_native.ckpt, **options)
    shutil.copy(out / "config.json", out / "left-over.json")
    eptc.export(small_native.ckpt, **options, force=True)
    assert not (out / "left-over.json").exists()


def test_on_the_command_line(small_native: Any, tmp_path: Path, cli: Any) -> None:
    """One JSON document, or lines for people that say what was compared."""
    command = ("export", small_native.ckpt, "--base", small_native.base, "--task", "tone",
               "--target", "hf", "--out")  # fmt: skip
    shown = cli(*command, tmp_path / "one")
    assert (shown.code, shown.stderr) == (0, "")
    assert "tensors on disk, 5 of them with experts" in shown.stdout
    assert "parity in transformers passed: " in shown.stdout
    report = cli(*command, tmp_path / "two", "--json").json
    assert report["target"] == "hf"
    assert report["parity"]["tone"]["weights"]["adapted"] == 5
    unproven = cli(*command, tmp_path / "three", "--no-verify")
    assert "NOT VERIFIED" in unproven.stdout
