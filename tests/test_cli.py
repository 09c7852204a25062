"""The command line: bad input ends with a message, good input with one document."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

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
        json.dumps({"tokenizer_class": "Owned", "auto_map": {"AutoTokenizer": ["own.Owned", None]}})
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
    case("unknown-task", nothing, "no task 'sst3'|nearest: sst, sst2|expected: 0 cola, 1 mnli",
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
    case("no-task", nothing, "Missing option '--task'", arguments=without("--task")),
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
    case("bad-task-spec", text("x.json", '[{"name": "sst2", "kind": "text-to-text", "lables": []}]'),
         "unknown key 'lables'|nearest: labels", "--task-spec", "{in}/x.json"),
    case("classifier-spec-for-t5", text(
        "x.json", '[{"name": "sst2", "kind": "classification", "labels": ["a", "b"]}]'),
         "classification task|text-to-text or generation", "--task-spec", "{in}/x.json"),
    # the checkpoint's folder
    case("no-config", text("ckpt/adapter_config.json", None), "neither ept_config.json nor"),
    case("both-configs", text("ckpt/ept_config.json", "{}"), "has both|remove one"),
    case("config-not-json", text("ckpt/adapter_config.json", "r: 4"), "as JSON|copy the file"),
    case("config-not-utf8", text("ckpt/adapter_config.json", b"\xff{}"), "as JSON"),
    case("config-a-list", text("ckpt/adapter_config.json", "[]"), "holds a list"),
    case("dora", config("ckpt/adapter_config.json", use_dora=True), "uses DoRA: use_dora = True"),
    case("no-rank", config("ckpt/adapter_config.json", r=None), "lacks a sound r"),
    case("other-rank", config("ckpt/adapter_config.json", r=8), r"[4, 32]|expected: [8, 32]"),
    case("another-method", config("ckpt/adapter_config.json", peft_type="IA3"), "'IA3'|'LORA'"),
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
    case("base-unsupported", config("base/config.json", model_type="gpt2"), "'gpt2'|expected: bert"),
    case("base-config-not-json", text("base/config.json", "{"), "config.json|as JSON"),
    case("base-config-without-type", config("base/config.json", model_type=None), "type is None"),
    case("base-config-with-a-bad-value", config("base/config.json", d_model="many"),
         "config.json"),
    case("base-config-with-an-impossible-value", config("base/config.json", num_layers=-1),
         "12 tensors without a place|encoder.block.0"),
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
    case("tokenizer-damaged", text("base/spiece.model", b"\x01\x02"), "tokenizer|cannot be loaded"),
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
    case("out-below-a-file", nothing, "cannot be written", "-o", "{in}/base/config.json/x"),
    case("out-with-a-long-name", nothing, "cannot be written|File name too long",
         "-o", "{in}/" + "x" * 300),
    case("out-is-the-checkpoint", nothing, "is or holds the checkpoint", "-o", "{in}/ckpt", "--force"),
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
