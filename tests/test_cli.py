"""The command line: bad input ends with a message, good input with one document."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import eptc

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"
NATIVE, NATIVE_CONFIG = "ept_model.safetensors", "ept_config.json"
NAMES = "cola,mnli,mrpc,qnli,qqp,rte,sst2,stsb"
FIRST = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
COMPLETE = ("--task", "sst2", "--top-k", "2", "--tasks", NAMES)

Damage = Callable[[Any], object]


def tree(root: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Everything below a folder: what a refused command must leave as it was."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: bytes | str = b""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def tensors(where: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the tensors of a file, given as `ckpt/name` or `base/name`."""

    def damage(folders: Any) -> None:
        file = folders.root / "in" / where
        content = dict(safetensors.numpy.load_file(file))
        change(content)
        safetensors.numpy.save_file(content, file)

    return damage


def config(where: str, **entries: Any) -> Damage:
    """Change entries of a JSON file; None removes one."""

    def damage(folders: Any) -> None:
        file = folders.root / "in" / where
        content = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


def text(where: str, content: str | bytes | None) -> Damage:
    """Replace a file's content; None removes it."""

    def damage(folders: Any) -> None:
        file = folders.root / "in" / where
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(where: str, size: int) -> Damage:
    def damage(folders: Any) -> None:
        file = folders.root / "in" / where
        file.write_bytes(file.read_bytes()[:size])

    return damage


def several(*damages: Damage) -> Damage:
    def damage(folders: Any) -> None:
        for one in damages:
            one(folders)

    return damage


def nothing(_: Any) -> None:
    pass


def put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({name: value})


def poison(name: str, value: float) -> Callable[[dict[str, Any]], object]:
    """Put one number into a tensor."""

    def change(content: dict[str, Any]) -> None:
        array = content[name].copy()
        array.reshape(-1)[-1] = value
        content[name] = array

    return change


class Malicious:
    """What a hostile pickle looks like: a call while it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def malicious(folders: Any) -> None:
    (folders.ckpt / ADAPTER).unlink()
    data = pickle.dumps({"base_model.model.x": Malicious(folders.root / "owned")})
    (folders.ckpt / "adapter_model.bin").write_bytes(data)


def malicious_zip(folders: Any) -> None:
    import torch

    (folders.ckpt / ADAPTER).unlink()
    content = {"base_model.model.x": Malicious(folders.root / "owned")}
    torch.save(content, folders.ckpt / "adapter_model.bin")


def pickled(make: Callable[[dict[str, Any]], object]) -> Damage:
    """Replace the adapters by a pickle of something made of their tensors."""

    def damage(folders: Any) -> None:
        import torch
        from safetensors.torch import load_file

        content = load_file(folders.ckpt / ADAPTER)
        (folders.ckpt / ADAPTER).unlink()
        torch.save(make(content), folders.ckpt / "adapter_model.bin")

    return damage


def first_as(convert: Callable[[Any], object]) -> Damage:
    name = f"{FIRST}.lora_A.weight"
    return pickled(lambda content: {**content, name: convert(content[name])})


def untrusted_tokenizer(folders: Any) -> None:
    """A tokenizer that wants to run a program of its own."""
    (folders.base / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Owned", "auto_map": {"AutoTokenizer": ["own.Owned", None]}}
        )
    )
    (folders.base / "own.py").write_text(
        f"import os\nos.mkdir({str(folders.root / 'owned')!r})\nclass Owned: pass\n"
    )


def occupied(folders: Any) -> None:
    folders.out.mkdir()
    (folders.out / "notes.txt").write_text("mine")


def case(
    name: str,
    damage: Damage,
    words: str,
    *extra: str,
    arguments: tuple[str, ...] = COMPLETE,
    golden: str = "t5-tiny",
) -> Any:
    return pytest.param(golden, damage, (*arguments, *extra), words.split("|"), id=name)


def without(*names: str) -> tuple[str, ...]:
    """The complete arguments without some options."""
    pairs = zip(COMPLETE[::2], COMPLETE[1::2], strict=True)
    return tuple(item for pair in pairs if pair[0] not in names for item in pair)


def replaced(name: str, value: str) -> tuple[str, ...]:
    return (*without(name), name, value)


RELEASED = [
    # the command line
    case("unknown-task", nothing,
         "no task 'sst3': did you mean 'sst', 'sst2' or 'sst-2'?|expected: 0 cola, 1 mnli",
         arguments=replaced("--task", "sst3")),
    case("unknown-id", nothing, "no task '8'|7 stsb", arguments=replaced("--task", "8")),
    case("negative-id", nothing, "no task '-1'", arguments=replaced("--task", "-1")),
    case("empty-task", nothing, "no task ''", arguments=replaced("--task", "")),
    case("task-beyond-the-list", nothing, "no task 'rte'",
         arguments=("--task", "rte", "--top-k", "2", "--tasks", "cola,mnli")),
    case("no-top-k", nothing,
         "does not say how many experts|saves it nowhere|32 of 32 linears|suggests 2 or more|"
         "not a proof|--moe_top_k in the training command", arguments=without("--top-k")),
    case("no-top-k-of-one", nothing, "0 of 32 linears|suggests 1",
         arguments=without("--top-k"), golden="t5-topk1"),
    case("top-k-zero", nothing, "top-k is 0|1 to 8", arguments=replaced("--top-k", "0")),
    case("top-k-nine", nothing, "top-k is 9|1 to 8", arguments=replaced("--top-k", "9")),
    case("top-k-text", nothing, "Invalid value for '--top-k'",
         arguments=replaced("--top-k", "two")),
    case("no-tasks", nothing, "does not say which tasks|--tasks cola,mnli,mrpc",
         arguments=without("--tasks")),
    case("nine-tasks", nothing, "names 9 tasks|at most 8",
         arguments=replaced("--tasks", f"{NAMES},more")),
    case("repeated-task", nothing, "'sst2' is listed twice",
         arguments=replaced("--tasks", "sst2,cola,sst2")),
    case("empty-name", nothing, "--tasks is 'sst2,,cola'",
         arguments=replaced("--tasks", "sst2,,cola")),
    case("no-task", nothing, "none was chosen|choose with --task", arguments=without("--task")),
    case("unknown-target", nothing, "target is 'coreml'|expected: onnx", "--target", "coreml"),
    case("unknown-option", nothing, "No such option", "--colour", "red"),
    case("probe-without-verification", nothing, "--probe was given together with --no-verify",
         "--probe", "x.jsonl", "--no-verify"),
    case("no-probe-file", nothing, "x.jsonl cannot be read", "--probe", "{in}/x.jsonl"),
    case("probe-of-another-task", text("x.jsonl", '{"premise": "a"}'),
         "line 1|without 'sentence'", "--probe", "{in}/x.jsonl"),
    case("probe-no-json", text("x.jsonl", "a film"), "x.jsonl, line 1", "--probe",
         "{in}/x.jsonl"),
    case("empty-probe", text("x.jsonl", "\n"), "no examples", "--probe", "{in}/x.jsonl"),
    case("no-task-spec", nothing, "x.json cannot be read", "--task-spec", "{in}/x.json"),
    case("bad-task-spec",
         text("x.json", '[{"name": "sst2", "kind": "text-to-text", "lables": []}]'),
         "unknown key 'lables': did you mean 'labels'?", "--task-spec", "{in}/x.json"),
    case("classifier-spec-for-t5", text(
        "x.json", '[{"name": "sst2", "kind": "classification", "labels": ["a", "b"]}]'),
         "classification task|text-to-text or generation", "--task-spec", "{in}/x.json"),
    # the checkpoint's folder
    case("no-config", text("ckpt/adapter_config.json", None), "neither ept_config.json nor"),
    case("both-configs", text("ckpt/ept_config.json", "{}"), "native, released|--format native"),
    case("config-not-json", text("ckpt/adapter_config.json", "r: 4"), "as JSON|copy the file"),
    case("config-not-utf8", text("ckpt/adapter_config.json", b"\xff{}"), "as JSON"),
    case("config-a-list", text("ckpt/adapter_config.json", "[]"), "holds a list"),
    case("dora", config("ckpt/adapter_config.json", use_dora=True), "uses DoRA: use_dora = True"),
    case("no-rank", config("ckpt/adapter_config.json", r=None), "lacks a sound r"),
    case("other-rank", config("ckpt/adapter_config.json", r=8), r"[4, 32]|expected: [8, 32]"),
    case("another-method", config("ckpt/adapter_config.json", peft_type="IA3"),
         "'IA3', which no format reads"),
    case("no-adapters", text(f"ckpt/{ADAPTER}", None), f"no {ADAPTER}"),
    case("empty-adapters", tensors(f"ckpt/{ADAPTER}", dict.clear), "has no tensors"),
    case("adapters-of-no-bytes", text(f"ckpt/{ADAPTER}", b""), "sound safetensors|0 bytes"),
    case("adapters-cut-in-the-header", cut(f"ckpt/{ADAPTER}", 1000), "truncated|copy or download"),
    case("adapters-cut-in-the-data", cut(f"ckpt/{ADAPTER}", 200_000), "truncated"),
    case("adapters-not-safetensors", text(f"ckpt/{ADAPTER}", b"PK\x03\x04" * 99), "sound"),
    case("missing-tensor",
         tensors(f"ckpt/{ADAPTER}", lambda t: t.pop(f"{FIRST}.lora_expert_kernels.3")),
         "lacks 1 tensors|SelfAttention.q.lora_expert_kernels.3"),
    case("extra-tensor", tensors(f"ckpt/{ADAPTER}", put("base_model.model.x.lora_C", np.ones(2))),
         "1 tensors that are no part|base_model.model.x.lora_C"),
    case("base-layer-tensor", tensors(
        f"ckpt/{ADAPTER}", put(FIRST.replace(".q", ".q.base_layer.weight"), np.ones(2))),
         "no part of an EPT adapter"),
    case("misshapen-tensor", tensors(
        f"ckpt/{ADAPTER}", put(f"{FIRST}.lora_B.weight", np.zeros((23, 4), np.float32))),
         "SelfAttention.q is [48, 64], adapted as [46, 64]"),
    case("kernel-sizes-differ", tensors(f"ckpt/{ADAPTER}", put(
        f"{FIRST}.lora_expert_kernels.0", np.zeros((1, 16, 3, 1), np.float32))),
         "one list of kernel sizes for all linears"),
    case("nan-in-an-adapter", tensors(f"ckpt/{ADAPTER}", poison(f"{FIRST}.lora_A.weight", np.nan)),
         f"{FIRST}.lora_A.weight|has nan at [3, 31]"),
    case("inf-in-an-adapter",
         tensors(f"ckpt/{ADAPTER}", poison(f"{FIRST}.lora_task_embedding.weight", -np.inf)),
         "lora_task_embedding.weight|has -inf"),
    case("integers-in-an-adapter",
         tensors(f"ckpt/{ADAPTER}", put(f"{FIRST}.lora_gate.0.bias", np.zeros(8, np.int64))),
         "type int64|floating point"),
    # pickles
    case("pickle-without-the-flag", pickled(dict), "--allow-pickle|weights_only"),
    case("malicious-pickle", malicious, "cannot be read as weights only", "--allow-pickle"),
    case("malicious-zip", malicious_zip, "cannot be read as weights only", "--allow-pickle"),
    case("pickle-of-a-list", pickled(lambda t: list(t.values())), "dict of tensors",
         "--allow-pickle"),
    case("pickle-of-numbers", pickled(lambda _: {"a": 1}), "dict of tensors", "--allow-pickle"),
    case("pickle-of-sparse-tensors", first_as(lambda a: a.to_sparse()), "dense tensor",
         "--allow-pickle"),
    case("pickle-of-complex-numbers", first_as(lambda a: a * 1j), "complex64", "--allow-pickle"),
    case("pickle-cut-off", several(text(f"ckpt/{ADAPTER}", None),
                                   text("ckpt/adapter_model.bin", b"\x80\x04\x95")),
         "cannot be read as weights only", "--allow-pickle"),
    # the base
    case("base-is-missing", nothing, "the base model|nowhere is not a folder", "--base",
         "{in}/nowhere"),
    case("base-is-a-file", nothing, "is not a folder", "--base", "{in}/base/config.json"),
    case("base-without-config", text("base/config.json", None), "has no config.json"),
    case("base-unsupported", config("base/config.json", model_type="gpt2"),
         "'gpt2'|expected: bert"),
    case("base-config-not-json", text("base/config.json", "{"), "config.json|as JSON"),
    case("base-config-without-type", config("base/config.json", model_type=None), "type is None"),
    case("base-config-with-a-bad-value", config("base/config.json", d_model="many"),
         "config.json"),
    case("base-config-with-an-impossible-value", config("base/config.json", num_layers=-1),
         "17 tensors without a place|encoder.block.0"),
    case("base-config-with-an-unknown-activation",
         config("base/config.json", dense_act_fn="magic"), "config.json|KeyError: 'magic'"),
    case("base-config-with-heads-that-do-not-fit", config("base/config.json", num_heads=5),
         "SelfAttention.q.weight is [48, 64], not [60, 64]"),
    case("gptq", config("base/config.json", quantization_config={"quant_method": "gptq"}),
         "quantised (GPTQ)"),
    case("awq", config("base/config.json", quantization_config={"quant_method": "awq"}),
         "quantised (AWQ)"),
    case("bitsandbytes", config("base/config.json", quantization_config={"load_in_4bit": True}),
         "quantised (BITSANDBYTES)"),
    case("base-without-weights", text(f"base/{MODEL}", None), f"no {MODEL}"),
    case("base-with-pickles", several(text(f"base/{MODEL}", None),
                                      text("base/pytorch_model.bin", b"")),
         "only pytorch_model.bin|save_pretrained"),
    case("base-cut-off", cut(f"base/{MODEL}", 300_000), "truncated"),
    case("base-tensor-missing",
         tensors(f"base/{MODEL}", lambda t: t.pop("decoder.final_layer_norm.weight")),
         "decoder.final_layer_norm.weight [64] is missing"),
    case("base-tensors-missing", tensors(f"base/{MODEL}", lambda t: [t.pop(k) for k in list(t)
                                                                    if "layer_norm" in k]),
         "in 12 tensors|encoder.block.0.layer.0.layer_norm.weight [64] is missing;"),
    case("base-tensor-misshapen",
         tensors(f"base/{MODEL}", put("shared.weight", np.zeros((130, 65), np.float32))),
         "shared.weight is [130, 65], not [130, 64]"),
    case("base-tensor-extra", tensors(f"base/{MODEL}", put(
        "encoder.block.2.layer.0.SelfAttention.q.weight", np.zeros((48, 64), np.float32))),
         "encoder.block.2.layer.0.SelfAttention.q.weight|without a place"),
    case("fewer-layers-than-stored", config("base/config.json", num_decoder_layers=1),
         "decoder.block.1"),
    case("nan-in-the-base", tensors(f"base/{MODEL}", poison("shared.weight", np.nan)),
         "shared.weight|has nan at [129, 63]"),
    case("inf-in-the-base", tensors(f"base/{MODEL}", poison("shared.weight", np.inf)),
         "shared.weight|has inf"),
    case("index-outside", text("base/model.safetensors.index.json",
                               '{"weight_map": {"a": "../ckpt/adapter_model.safetensors"}}'),
         "outside its folder|'../ckpt/adapter_model.safetensors'"),
    case("config-outside", config("base/config.json", transformers_weights="../x.safetensors"),
         "transformers_weights|outside its folder"),
    case("tokenizer-outside", config("base/tokenizer_config.json", vocab_file="/etc/passwd"),
         "vocab_file|outside its folder"),
    case("tokenizer-damaged", text("base/spiece.model", b"\x01\x02"),
         "tokenizer|cannot be loaded"),
    case("tokenizer-with-a-program", untrusted_tokenizer, "tokenizer|cannot be loaded"),
    case("generation-config-not-json", text("base/generation_config.json", "{"),
         "generation_config.json|as JSON"),
    case("generation-config-a-list", text("base/generation_config.json", "[]"), "a list"),
    case("generation-config-nonsense", config("base/generation_config.json", eos_token_id="x"),
         "eos_token_id"),
    # the place
    case("out-not-empty", occupied, "is not empty: it holds notes.txt|--force"),
    case("out-with-folders", lambda f: (f.out / "sub").mkdir(parents=True),
         "holds folders", "--force"),
    case("out-a-file", lambda f: f.out.write_text("x"), "is not a folder", "--force"),
    case("out-a-link", lambda f: f.out.symlink_to(f.base), "is not a folder", "--force"),
    case("out-a-dangling-link", lambda f: f.out.symlink_to("nowhere"), "is not a folder"),
    case("out-below-a-file", nothing, "config.json is not a folder",
         "-o", "{in}/base/config.json/x"),
    case("out-with-a-long-name", nothing, "cannot be written|File name too long",
         "-o", "{in}/" + "x" * 300),
    case("out-is-the-checkpoint", nothing, "is or holds the checkpoint",
         "-o", "{in}/ckpt", "--force"),
    case("out-is-the-base", nothing, "is or holds the base model", "-o", "{in}/base", "--force"),
    case("out-is-the-base-by-another-name", lambda f: (f.root / "l").symlink_to(f.root / "in"),
         "is or holds the base model", "-o", "{in}/../l/base", "--force"),
    case("out-holds-the-task-description",
         lambda f: (f.out.mkdir(), (f.out / "t.json").write_text("[]")),
         "is or holds the task description", "--force", "--task-spec", "{in}/../out/t.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "arguments", "words"), RELEASED)
def test_bad_input(
    copy_golden: Callable[..., Any],
    cli: Callable[..., Any],
    name: str,
    damage: Damage,
    arguments: tuple[str, ...],
    words: list[str],
) -> None:
    folders = copy_golden(name)
    damage(folders)
    _refused(folders, cli, arguments, words)


def _refused(
    folders: Any, cli: Callable[..., Any], arguments: tuple[str, ...], words: list[str]
) -> None:
    """An export ends with a message and leaves everything below the test's folder as it was."""
    before = tree(folders.root)
    filled = [argument.replace("{in}", str(folders.root / "in")) for argument in arguments]
    verify = ("--no-verify",) if "--probe" not in filled else ()
    result = cli(
        "export", folders.ckpt, "--base", folders.base, "-o", folders.out, *verify, *filled
    )
    assert result.code == 2, result
    message = " ".join(result.stderr.split())
    assert [word for word in words if word not in message] == [], result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert tree(folders.root) == before


def of_another(name: str) -> Callable[[Any, Path], None]:
    """Put another recorded set's base in the place of the right one."""

    def damage(folders: Any, golden: Path) -> None:
        for path in (golden / "ept" / name / "base").iterdir():
            (folders.base / path.name).write_bytes(path.read_bytes())

    return damage


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("t5-tiny", "llama-tiny",
         ["in 32 of 32 linears", "SelfAttention.k is missing;", "--base"]),
        ("llama-tiny", "t5-tiny", ["in 12 of 12 linears", "self_attn.k_proj is missing"]),
        ("t5-tiny", "t5-gated-tiny",
         ["decoder.block.0.layer.0.SelfAttention.k is [44, 56], adapted as [48, 64];"]),
    ],
)  # fmt: skip
def test_a_base_of_another_shape(
    copy_golden: Callable[..., Any],
    cli: Callable[..., Any],
    golden: Path,
    name: str,
    other: str,
    words: list[str],
) -> None:
    """The first three linears that do not fit are named."""
    folders = copy_golden(name)
    of_another(other)(folders, golden)
    _refused(folders, cli, COMPLETE, words)


NATIVE_TASK = ("--task", "tone")
QUERY = "bert.encoder.layer.0.attention.self.query"
NATIVE_CASES = [
    case("unknown-task", nothing, "no task 'tune': did you mean 'tone'?|0 tone, 1 same, 2 score",
         "--task", "tune"),
    case("top-k-contradicts", nothing, "--top-k 3 contradicts the checkpoint, which says 2",
         "--top-k", "3"),
    case("tasks-contradict", nothing, "--tasks tone,same contradicts", "--tasks", "tone,same"),
    case("task-spec", nothing, "describes its tasks itself", "--task-spec", "x.json"),
    case("allow-pickle-changes-nothing", text(f"ckpt/{NATIVE}", None), f"no {NATIVE}",
         "--allow-pickle"),
    case("newer-schema", config(f"ckpt/{NATIVE_CONFIG}", schema_version=2),
         "schema version 2|expected: 1 or older|upgrade ept-compiler"),
    case("config-not-json", text(f"ckpt/{NATIVE_CONFIG}", "{"), "as JSON"),
    case("unknown-key", config(f"ckpt/{NATIVE_CONFIG}", colour="red"), "'colour' was unexpected"),
    case("no-top-k", config(f"ckpt/{NATIVE_CONFIG}", top_k=None), "'top_k' is a required"),
    case("other-base-type", config(f"ckpt/{NATIVE_CONFIG}", base={"model_type": "roberta"}),
         "trained on a roberta model|is a bert"),
    case("empty", tensors(f"ckpt/{NATIVE}", dict.clear), "adapts no linear"),
    case("cut-off", cut(f"ckpt/{NATIVE}", 5000), "truncated"),
    case("missing-tensor", tensors(f"ckpt/{NATIVE}", lambda t: t.pop(f"{QUERY}.ept.kernels.2")),
         f"no tensor {QUERY}.ept.kernels.2"),
    case("extra-tensor", tensors(f"ckpt/{NATIVE}", put(f"{QUERY}.ept.kernels.4", np.ones((2, 2)))),
         f"nothing uses: {QUERY}.ept.kernels.4"),
    case("nan", tensors(f"ckpt/{NATIVE}", poison(f"{QUERY}.ept.B", np.nan)), f"{QUERY}.ept.B|nan"),
    case("inf-in-a-head",
         tensors(f"ckpt/{NATIVE}", poison("heads.tone.classifier.weight", np.inf)),
         "heads.tone.classifier.weight|inf"),
    case("inf-in-the-head-of-another-task",
         tensors(f"ckpt/{NATIVE}", poison("heads.score.classifier.bias", np.inf)),
         "heads.score.classifier.bias|inf"),
    case("head-of-no-task", tensors(f"ckpt/{NATIVE}", put("heads.mood.x", np.ones(2))),
         "heads.mood.x|names no task"),
    case("head-with-an-unknown-parameter",
         tensors(f"ckpt/{NATIVE}", put("heads.tone.classifer.weight", np.ones(2, np.float32))),
         "head of task 'tone'|the parameter classifer.weight"),
    case("head-of-another-shape", tensors(f"ckpt/{NATIVE}", put(
        "heads.tone.classifier.weight", np.ones((3, 34), np.float32))),
         "classifier.weight is [3, 34], not [2, 34]"),
    case("another-base-of-that-shape", tensors(
        f"base/{MODEL}", poison("pooler.dense.weight", 1.0)),
         "trained on another base model|(small-bert)|--base"),
    case("nan-in-the-base", tensors(f"base/{MODEL}", poison("pooler.dense.weight", np.nan)),
         "pooler.dense.weight|has nan at [33, 33]"),
    case("base-tensor-missing", tensors(f"base/{MODEL}", lambda t: t.pop("pooler.dense.weight")),
         "bert.pooler.dense.weight [34, 34] is missing"),
    case("checkpoint-with-a-bad-tokenizer", text("ckpt/tokenizer.json", "{"),
         "tokenizer in|ckpt cannot be loaded"),
    case("checkpoint-with-a-tokenizer-outside",
         text("ckpt/tokenizer_config.json", '{"vocab_file": "../base/vocab.txt"}'),
         "vocab_file of|ckpt points outside"),
]  # fmt: skip


def lines(*rows: dict[str, Any]) -> Damage:
    """Write a file of JSON lines."""
    return text("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


ROWS = "{in}/rows.jsonl"
STATIC = ("--precision", "int8-static", "--calibration", ROWS)
AUTO = ("--precision", "auto", "--precision-plan", "{in}/plan.json")
PAIR = {"first": "good", "second": "bad"}
PRECISION_CASES = [
    # text to calibrate on
    case("calibration-without-the-fields", lines({"text": "good"}, {"sentence": "bad"}),
         "rows.jsonl, line 2|the fields text", *STATIC),
    case("calibration-for-another-task", lines(PAIR), "rows.jsonl, line 1|the fields text",
         *STATIC),
    case("calibration-empty", text("rows.jsonl", "\n"), "has no examples", *STATIC),
    case("calibration-missing", nothing, "rows.jsonl cannot be read", *STATIC),
    case("calibration-not-json", text("rows.jsonl", "good"), "rows.jsonl, line 1", *STATIC),
    case("calibration-of-one-class",
         lines({"text": "good", "label": "good"}, {"text": "quiet", "label": "good"}),
         "every row of|has the label 'good'|rows of several labels", *STATIC),
    case("calibration-with-an-unknown-label", lines({"text": "a", "label": "fine"}),
         "line 1: the label is 'fine'|one of bad, good", *STATIC),
    case("calibration-not-given", nothing, "was given no text|--calibration FILE",
         "--precision", "int8-static"),
    case("calibration-not-needed", nothing, "--precision int8 needs none|--precision int8-static",
         "--precision", "int8", "--calibration", ROWS),
    # where it runs
    case("bf16-on-the-cpu", nothing, "no bfloat16 kernels|--optimize-for cuda or any|int8",
         "--precision", "bf16"),
    case("int8-on-cuda", nothing, "no kernels for dynamic|--optimize-for cpu or any|int8-static",
         "--precision", "int8", "--optimize-for", "cuda"),
    case("int4-anywhere", nothing, "no standard operator|--optimize-for cpu or cuda",
         "--precision", "int4", "--optimize-for", "any"),
    case("unknown-precision", nothing, "'int3' is not one of|'int4'", "--precision", "int3"),
    # what it may cost
    case("budget-without-data", nothing, "--max-drop was given, and no data|--data FILE",
         "--precision", "int8", "--max-drop", "1"),
    case("data-without-labels", lines({"text": "good"}), "line 1: the label is None|bad, good",
         "--precision", "int8", "--data", ROWS),
    case("flips-of-a-regression", lines({"text": "good", "label": 1.0}),
         "--max-flips was given|'score' is a regression|--max-drop",
         "--task", "score", "--precision", "int8", "--data", ROWS, "--max-flips", "1%"),
    case("flips-no-share", nothing, "--max-flips is 'abc'|1% or 0.01",
         "--precision", "int8", "--data", ROWS, "--max-flips", "abc"),
    case("flips-more-than-all", nothing, "--max-flips is 3|a share of the rows",
         "--precision", "int8", "--data", ROWS, "--max-flips", "300%"),
    case("flips-one-of-what", nothing, "--max-flips is '1'|every row|1% or 0.01",
         "--precision", "int8", "--data", ROWS, "--max-flips", "1"),
    case("data-of-one-class",
         lines({"text": "good", "label": "good"}, {"text": "quiet", "label": "good"}),
         "every row of|has the label 'good'|rows of several labels",
         "--precision", "int8", "--data", ROWS),
    case("method-without-ranges", nothing, "--calibration-method entropy was given|int8-static",
         "--precision", "int8", "--calibration-method", "entropy"),
    case("evaluations-that-find-nothing", lines({"text": "good", "label": "good"}),
         "--search-evaluations is 4|5 or more", "--precision", "auto", "--data", ROWS,
         "--max-drop", "1", "--search-evaluations", "4"),
    case("evaluations-without-a-search", nothing,
         "--search-evaluations was given, and nothing is searched for --precision int8|leave",
         "--precision", "int8", "--search-evaluations", "100"),
    case("minutes-for-a-plan", nothing,
         "--search-minutes was given, and nothing is searched for a plan|without --precision-plan",
         *AUTO, "--search-minutes", "1"),
    case("data-for-float32", nothing, "--precision fp32 changes no answer|eptc parity --data",
         "--data", ROWS),
    # plans
    case("auto-without-a-budget", nothing, "no budget to keep|--max-drop|--precision-plan",
         "--precision", "auto"),
    case("plan-missing", nothing, "plan.json cannot be read", *AUTO),
    case("plan-with-a-wrong-name", text("plan.json", json.dumps(
        {"schema_version": 1, "weights": {"bert.pooler.dense.weigth": "int8"}})),
         "the weight 'bert.pooler.dense.weigth'|did you mean 'bert.pooler.dense.weight'?", *AUTO),
    case("plan-with-an-impossible-level", text("plan.json", json.dumps(
        {"schema_version": 1, "weights": {"bert.pooler.dense.weight": "int4"}})),
         "stores bert.pooler.dense.weight as int4|expected: fp32 or int8", *AUTO),
    case("plan-of-a-head", text("plan.json", json.dumps(
        {"schema_version": 1, "weights": {"classifier.weight": "int8"}})),
         "stores classifier.weight as int8|expected: fp32", *AUTO),
    case("plan-that-lacks-weights", text("plan.json", json.dumps(
        {"schema_version": 1, "weights": {"bert.pooler.dense.weight": "int8"}})),
         "lacks bert.embeddings.position_embeddings.weight|and 6 more", *AUTO),
    case("plan-without-auto", nothing, "--precision-plan was given together with --precision int8",
         "--precision", "int8", "--precision-plan", "{in}/plan.json"),
    # all of them
    case("all-without-data", nothing, "was given no data to score on", "--precision", "all"),
    case("all-with-minutes-for-no-search", lines({"text": "good", "label": "good"}),
         "no budget to keep|--max-drop", "--precision", "all", "--data", ROWS,
         "--search-minutes", "1"),
    case("all-of-a-dry-run", nothing, "given together with --dry-run",
         "--precision", "all", "--data", ROWS, "--dry-run"),
]  # fmt: skip


@pytest.mark.parametrize(("_", "damage", "arguments", "words"), [*NATIVE_CASES, *PRECISION_CASES])
def test_bad_native_input(
    copy_native: Any,
    cli: Callable[..., Any],
    _: str,
    damage: Damage,
    arguments: tuple[str, ...],
    words: list[str],
) -> None:
    damage(copy_native)
    extra = arguments[len(COMPLETE) :]
    _refused(copy_native, cli, (*NATIVE_TASK, *extra), words)


@pytest.mark.parametrize("verb", ["export", "inspect", "convert"])
def test_no_base(copy_golden: Callable[..., Any], cli: Callable[..., Any], verb: str) -> None:
    folders = copy_golden()
    before = tree(folders.root)
    out = {"export": ("--task", "sst2", "-o", folders.out), "convert": ("-o", folders.out)}
    result = cli(verb, folders.ckpt, *out.get(verb, ()), "--top-k", 2, "--tasks", NAMES)
    assert result.code == 2
    assert "no base model was given" in result.stderr
    assert "calls './bases/t5-tiny'" in result.stderr
    assert "pass --base DIR" in result.stderr
    assert tree(folders.root) == before


# ---- what works


@pytest.fixture(scope="module")
def bundles(
    small_native: Any, cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Bundles of each task of the small native checkpoint, `tone` verified."""
    root = tmp_path_factory.mktemp("bundles")
    for task in ("tone", "same", "score"):
        verify = () if task == "tone" else ("--no-verify",)
        place = ("--base", small_native.base, "-o", root / task)
        result = cli("export", small_native.ckpt, "--task", task, *place, *verify)
        assert result.code == 0, result
    return root


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "eptc", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"eptc, version {eptc.__version__}\n"


def test_export_says_what_it_did(copy_native: Any, cli: Callable[..., Any], bundles: Path) -> None:
    """One line for parity, one for the bundle; a pipe sees nothing else."""
    place = ("--base", copy_native.base, "-o", copy_native.out)
    result = cli("export", copy_native.ckpt, "--task", "sentiment", *place)
    assert (result.code, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()
    assert first.startswith("parity passed: 11 tensors, largest error ")
    assert first.endswith(", 0 flips")
    assert second.startswith(f"{copy_native.out}: ")
    assert sorted(p.name for p in copy_native.out.iterdir()) == sorted(
        p.name for p in (bundles / "tone").iterdir()
    )


def test_export_as_json(copy_native: Any, cli: Callable[..., Any]) -> None:
    place = ("--base", copy_native.base, "-o", copy_native.out, "--no-verify")
    result = cli("export", copy_native.ckpt, "--task", 1, *place, "--json")
    assert (result.code, result.stderr) == (0, "")
    report = result.json
    assert report["bundle"] == str(copy_native.out)
    assert report["task"] == "same"
    assert report["parity"] == {"verified": False}
    assert report["files"].keys() == {p.name for p in copy_native.out.iterdir()} - {
        "manifest.json"
    }
    names = [record["name"] for record in report["passes"]]
    assert names == [s["name"] for s in cli("inspect", copy_native.out, "--json").json["passes"]]
    assert all(record["seconds"] >= 0 for record in report["passes"])
    assert report["seconds"].keys() >= {"trace", "write"}


def test_export_without_parity_says_so(copy_native: Any, cli: Callable[..., Any]) -> None:
    place = ("--base", copy_native.base, "-o", copy_native.out, "--no-verify")
    result = cli("export", copy_native.ckpt, "--task", "tone", *place)
    assert "NOT VERIFIED" in result.stdout
    assert "was not compared" in cli("verify", copy_native.out).stderr
    assert "not verified" in cli("inspect", copy_native.out).stdout


def test_verbose_shows_stages_and_passes(copy_native: Any, cli: Callable[..., Any]) -> None:
    place = ("--base", copy_native.base, "-o", copy_native.out, "--no-verify", "--verbose")
    result = cli("export", copy_native.ckpt, "--task", "tone", *place)
    lines = [line.split()[0] for line in result.stderr.splitlines() if line.strip()]
    assert [w for w in lines if w in ("read", "hash", "trace", "write")] == [
        "read", "trace", "hash", "write",
    ]  # fmt: skip
    assert {"specialize-router", "fold-pyramid", "stable-names"} <= set(lines)


def test_a_budget_on_a_task_without_labels(
    copy_golden: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    folders = copy_golden("llama-tiny")
    lines({"text": "a", "label": "b"})(folders)
    names = NAMES.replace("cola", "unheard-of")
    _refused(
        folders, cli,
        ("--task", "unheard-of", "--top-k", "2", "--tasks", names, "--precision", "int8",
         "--data", ROWS, "--max-drop", "1"),
        ["task 'unheard-of' has no labels", "--task-spec"],
    )  # fmt: skip


def test_export_below_float32_says_what_it_did(copy_native: Any, cli: Callable[..., Any]) -> None:
    """Rows that are too long, too few rows, both verdicts, what was lost on how many rows."""
    lines(
        {"text": "a good film"}, {"text": "not bad " * 150}, {"text": "dull and long"},
        {"text": "quiet", "label": "good"},
    )(copy_native)  # fmt: skip
    data = copy_native.root / "data.jsonl"
    rows = [{"text": "a good film", "label": "good"}, {"text": "dull", "label": "bad"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli(
        "export", copy_native.ckpt, "--base", copy_native.base, "-o", copy_native.out,
        *NATIVE_TASK, "--precision", "int8-static",
        "--calibration", copy_native.root / "in" / "rows.jsonl",
        "--calibration-method", "percentile", "--data", data, "--max-flips", "50%",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert "has 4 rows: calibrate on 100 or more" in result.stderr
    assert "1 of 4 texts were longer than training's and cut" in result.stderr
    for words in ("parity before lowering passed", "parity passed", "on 2 rows", "too few rows"):
        assert words in result.stdout


def test_force_replaces_a_bundle(copy_native: Any, cli: Callable[..., Any]) -> None:
    place = ("--base", copy_native.base, "-o", copy_native.out, "--no-verify")
    assert cli("export", copy_native.ckpt, "--task", "tone", *place).code == 0
    refused = cli("export", copy_native.ckpt, "--task", "same", *place)
    assert refused.code == 2
    assert "--force" in refused.stderr
    assert cli("inspect", copy_native.out, "--json").json["task"]["name"] == "tone"
    assert cli("export", copy_native.ckpt, "--task", "same", *place, "--force").code == 0
    assert cli("inspect", copy_native.out, "--json").json["task"]["name"] == "same"
    assert sorted(p.name for p in copy_native.root.iterdir()) == ["in", "out"]


def test_inspect_a_released_checkpoint(golden: Path, cli: Callable[..., Any]) -> None:
    folder = golden / "ept" / "t5-tiny"
    source = (folder / "adapter", "--base", folder / "base", "--top-k", 2, "--tasks", NAMES)
    report = cli("inspect", *source, "--json").json
    assert report["what"] == "checkpoint"
    assert report["format"] == report["variant"] == "released"
    assert report["adapted_linears"] == 32
    assert report["kernel_sizes"] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert [task["name"] for task in report["tasks"]] == NAMES.split(",")
    recorded = json.loads((folder / "golden" / "routes.json").read_text())
    for task_id, task in enumerate(report["tasks"]):
        for path, route in report["routes"][task["name"]].items():
            assert route["experts"] == recorded[str(task_id)][path]["experts"]
            assert route["margin"] > 0
    shown = cli("inspect", *source)
    assert (shown.code, shown.stderr) == (0, "")
    for words in ("released checkpoint", "sst2", "top-k 2"):
        assert words in shown.stdout


def test_inspect_a_native_checkpoint(small_native: Any, cli: Callable[..., Any]) -> None:
    report = cli("inspect", small_native.ckpt, "--base", small_native.base, "--json").json
    assert (report["format"], report["variant"], report["top_k"]) == ("native", "paper", 2)
    assert [task["kind"] for task in report["tasks"]] == [
        "classification", "classification", "regression",
    ]  # fmt: skip
    assert report["head_bytes"] > 0
    shown = cli("inspect", small_native.ckpt, "--base", small_native.base).stdout
    assert "native checkpoint" in shown
    assert QUERY in shown


def test_the_predicted_size_is_the_size(
    small_native: Any, cli: Callable[..., Any], bundles: Path
) -> None:
    report = cli("inspect", small_native.ckpt, "--base", small_native.base, "--json").json
    size = (bundles / "tone" / "weights.bin").stat().st_size
    assert report["predicted_weight_bytes"] == pytest.approx(size, rel=0.1)


def test_convert(copy_golden: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path) -> None:
    """A converted folder needs no --top-k and no --tasks any more, and means the same."""
    folders = copy_golden("llama-tiny")
    source = (folders.ckpt, "--base", folders.base, "--top-k", 2, "--tasks", NAMES)
    result = cli("convert", *source, "-o", folders.out, "--json")
    assert result.json == {"checkpoint": str(folders.out)}
    shown = cli("convert", *source, "-o", tmp_path / "again")
    assert (shown.stdout, shown.stderr) == (f"{tmp_path / 'again'}\n", "")
    released = cli("inspect", *source, "--json").json
    native = cli("inspect", folders.out, "--base", folders.base, "--json").json
    assert native["format"] == "native"
    assert native["routes"] == released["routes"]
    refused = cli("convert", *source, "-o", folders.out)
    assert refused.code == 2
    assert "--force" in refused.stderr
    assert cli("convert", *source, "-o", folders.out, "--force").code == 0


def test_parity_again(
    copy_native: Any, cli: Callable[..., Any], bundles: Path, tmp_path: Path
) -> None:
    """The manifest supplies what the export was told; labelled data gives a score."""
    data = tmp_path / "data.jsonl"
    rows = [{"text": "the film was good", "label": "good"}, {"text": "dull", "label": "bad"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    source = ("--reference", copy_native.ckpt, "--base", copy_native.base)
    report = cli("parity", bundles / "tone", *source, "--data", data, "--json").json
    assert report["summary"]["passed"]
    assert report["scores"]["rows"] == 2
    shown = cli("parity", bundles / "tone", *source)
    assert shown.code == 0
    assert shown.stdout.startswith("parity passed")


def test_verify(cli: Callable[..., Any], bundles: Path) -> None:
    shown = cli("verify", bundles / "tone")
    assert (shown.code, shown.stderr) == (0, "")
    assert "sound" in shown.stdout
    report = cli("verify", bundles / "tone", "--json")
    assert report.code == 0
    assert report.json["ok"]


def _copy_bundle(bundle: Path, target: Path) -> Path:
    target.mkdir()
    for path in bundle.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("verb", ["verify", "run", "inspect"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            lambda b: (b / "manifest.json").unlink(), "is not a bundle|has neither", id="none"
        ),
        pytest.param(lambda b: (b / "manifest.json").write_text("{"), "manifest", id="no-json"),
        pytest.param(
            lambda b: (b / "manifest.json").write_text(
                (b / "manifest.json")
                .read_text()
                .replace('"schema_version": 3', '"schema_version": 4')
            ),
            "schema version 4|newer",
            id="newer-manifest",
        ),
    ],
)
def test_bundles_that_are_refused(
    cli: Callable[..., Any],
    bundles: Path,
    tmp_path: Path,
    verb: str,
    damage: Callable[[Path], object],
    words: str,
) -> None:
    bundle = _copy_bundle(bundles / "tone", tmp_path / "b")
    damage(bundle)
    result = cli(verb, bundle, *(("good",) if verb == "run" else ()))
    assert result.code == 2
    assert any(word in result.stderr for word in words.split("|")), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.bin", lambda data: data[:-1]),
        ("weights.bin", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("model.onnx", lambda _: b""),
        ("tokenizer.json", lambda data: data + b" "),
        ("config.json", None),
    ],
)
def test_verify_notices_every_change(
    cli: Callable[..., Any],
    bundles: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    bundle = _copy_bundle(bundles / "tone", tmp_path / "b")
    file = bundle / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    result = cli("verify", bundle)
    assert result.code == 2
    assert name in result.stderr
    report = cli("verify", bundle, "--json")
    assert report.code == 2
    assert not report.json["ok"]


def test_run(cli: Callable[..., Any], bundles: Path, tmp_path: Path) -> None:
    """Texts, pairs and lines of a file, in this order; a line or one document a call."""
    shown = cli("run", bundles / "tone", "the film was good", "bad and dull")
    assert (shown.code, shown.stderr) == (0, "")
    lines = [line.split("\t") for line in shown.stdout.splitlines()]
    assert len(lines) == 2
    assert all(label in ("bad", "good") and 0.5 <= float(sure) <= 1 for label, sure in lines)

    answers = cli("run", bundles / "tone", "the film was good", "bad and dull", "--json").json
    assert [answer["input"] for answer in answers["answers"]] == [
        "the film was good", "bad and dull",
    ]  # fmt: skip
    assert [answer["label"] for answer in answers["answers"]] == [line[0] for line in lines]

    data = tmp_path / "data.jsonl"
    row = {"first": "a film", "second": "the film", "label": "yes"}
    data.write_text(f"{json.dumps(row)}\n\n")
    pairs = cli("run", bundles / "same", "--pair", "a film", "the film", "--data", data, "--json")
    one, two = pairs.json["answers"]
    assert one["input"] == ["a film", "the film"]
    assert two["input"] == {"first": "a film", "second": "the film"}
    assert one["probabilities"] == two["probabilities"]

    value = cli("run", bundles / "score", "good").stdout
    assert float(value) == pytest.approx(
        cli("run", bundles / "score", "good", "--json").json["answers"][0]["value"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("tone", (), "there is no text"),
        ("tone", ("--pair", "a", "b"), "expected: 1 text"),
        ("same", ("a",), "expected: 2 texts: first, second"),
        ("tone", ("--data", "nowhere.jsonl"), "cannot be read as JSON lines"),
        ("tone", ("--data", "{list}"), "JSON objects"),
        ("tone", ("--data", "{other}"), "without 'text'"),
        ("tone", ("good " * 300,), "truncate"),
        ("tone", ("good", "--provider", "tpu"), "tpu"),
        ("tone", ("good", "--max-new-tokens", "3"), "eptc: error"),
    ],
)
def test_run_refuses(
    cli: Callable[..., Any],
    bundles: Path,
    tmp_path: Path,
    task: str,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    files = {"{list}": "[1]", "{other}": '{"sentence": "a"}'}
    for name, content in files.items():
        (tmp_path / name.strip("{}")).write_text(content)
    filled = [str(tmp_path / a.strip("{}")) if a in files else a for a in arguments]
    result = cli("run", bundles / task, *filled)
    assert result.code == 2, result
    assert words in result.stderr
    assert result.stdout == ""


def test_run_truncates_when_asked(cli: Callable[..., Any], bundles: Path) -> None:
    assert cli("run", bundles / "tone", "good " * 300, "--truncate").code == 0


def test_doctor(cli: Callable[..., Any]) -> None:
    shown = cli("doctor")
    assert (shown.code, shown.stderr) == (0, "")
    report = cli("doctor", "--json").json
    assert {name: report["targets"].pop(name) for name in ("onnx", "lora", "hf")} == {
        "onnx": "ready", "lora": "ready", "hf": "ready",
    }  # fmt: skip
    assert "onnxruntime-genai" in report["targets"].pop("genai")
    assert report["targets"].pop("tensorrt").startswith("ready")
    assert report["targets"] == {}
    assert "starts" in report["providers"].values()
    assert report["packages"]["numpy"] == np.__version__
    assert "python" in shown.stdout


@pytest.mark.parametrize(
    "verb", ["export", "inspect", "convert", "parity", "verify", "run", "doctor"]
)
def test_help(cli: Callable[..., Any], verb: str) -> None:
    for flag in ("--help", "-h"):
        result = cli(verb, flag)
        assert (result.code, result.stderr) == (0, "")
        assert f"Usage: main {verb}" in result.stdout
        assert "--json" in result.stdout
    assert verb in cli("--help").stdout


def test_errors_as_json(cli: Callable[..., Any], tmp_path: Path) -> None:
    """One document on standard output also where a command fails."""
    for verb, extra in (
        ("export", ("--task", "a", "-o", tmp_path / "out")),
        ("inspect", ()),
        ("convert", ("-o", tmp_path / "out")),
        ("verify", ()),
        ("run", ("text",)),
        ("parity", ("--reference", tmp_path)),
    ):
        result = cli(verb, tmp_path / "nowhere", *extra, "--json")
        assert result.code == 2
        assert result.json["exit_code"] == 2
        assert result.json["error"] in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("verify",), ("inspect",), ("bench",), ("run", "film"), ("parity", "--reference", ".")],
)
def test_a_name_that_is_too_long(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    verb, *extra = arguments
    result = cli(verb, "x" * 300, *extra, "--json")
    assert result.code == 2, result
    assert "File name too long" in result.json["error"]
    assert "bug" not in result.stderr


def test_a_bug_is_called_one(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import eptc.inspection

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(eptc.inspection, "inspect", broken)
    result = cli("inspect", tmp_path)
    assert result.code == 70
    assert "bug in eptc" in result.stderr
    assert "eptc doctor --json" in result.stderr
    monkeypatch.setattr(eptc.inspection, "inspect", _raise(MemoryError))
    assert cli("inspect", tmp_path).code == 2
    monkeypatch.setattr(eptc.inspection, "inspect", _raise(KeyboardInterrupt))
    interrupted = cli("inspect", tmp_path)
    assert interrupted.code == 130
    assert "interrupted; nothing was published" in interrupted.stderr


def _raise(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
