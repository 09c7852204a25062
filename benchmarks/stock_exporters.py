"""The exporters that torch and transformers bring along, on the folded model.

Neither brings a way to generate text with what it exports: the loop over the components is ours,
with the caches bound in ONNX Runtime's memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ort_sessions
from benchmarks.cases import Case, feeds
from benchmarks.contestants import Call, Contestant
from benchmarks.ort_sessions import Bound
from benchmarks.places import Files

__all__ = ["export", "load"]


def export(contestant: Contestant, files: Files, case: Case) -> None:
    """Export what the model's cases need: `model`, or `encoder`, `prefill` and `decode`."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(files.merged)
    model_class = getattr(transformers, config.architectures[0])
    # torch.onnx.export alone cannot convert T5's fused attention; transformers patches it.
    plain = contestant.name == "torch-onnx" and config.is_encoder_decoder
    attention = {"attn_implementation": "eager"} if plain else {}
    model = model_class.from_pretrained(files.merged, dtype=torch.float32, **attention).eval()
    folder = files.engine(contestant.name)
    # Two rows of another length: no dimension is taken for a constant.
    sample = {name: torch.from_numpy(array) for name, array in _sample(case, files).items()}
    if contestant.name == "torch-onnx":
        _torch_export(model, sample, folder)
        return
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    fusions: Any = "cpu" if contestant.name == "transformers-fused" else None
    options = OnnxConfig(dynamic=True, ort_fusions=fusions)
    if case.mode == "classify":
        OnnxExporter().export(model, sample, options).save_pretrained(folder)
        return
    if config.is_encoder_decoder:
        encoder = OnnxExporter().export(model.get_encoder(), sample, options)
        encoder.save_pretrained(folder / "encoder")
    # With single-token steps the length of the past becomes a constant.
    stages = OnnxExporter().export_for_generation(model, sample, options, multi_token_decode=True)
    stages.save_pretrained(folder)


def _sample(case: Case, files: Files) -> dict[str, Any]:
    import dataclasses

    return feeds(dataclasses.replace(case, batch=2, length=11), files)


def _torch_export(model: Any, sample: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    part, name = model, "model.onnx"
    if model.config.is_encoder_decoder:
        part, name = model.get_encoder(), "encoder.onnx"
    part.config.return_dict = False
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        part,
        kwargs=sample,
        f=folder / name,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(sample, dims),
        external_data=True,
    )


def load(contestant: Contestant, files: Files, case: Case, threads: int) -> Call:
    """Return what runs the exported graphs once in bare sessions."""
    folder = files.engine(contestant.name)
    inputs = feeds(case, files)
    encoder = folder / "encoder.onnx"
    if not encoder.is_file():
        encoder = folder / "encoder" / "model.onnx"
    if case.mode == "classify":
        session = ort_sessions.open_session(folder / "model.onnx", threads)
        return ort_sessions.one_output(session, inputs, None)
    if case.mode == "encode":
        return ort_sessions.one_output(ort_sessions.open_session(encoder, threads), inputs, None)
    prefill, decode = (
        Bound(ort_sessions.open_session(folder / f"{name}.onnx", threads))
        for name in ("prefill", "decode")
    )
    config = json.loads((files.merged / "config.json").read_text())
    stops = [config["eos_token_id"]]
    if config["model_type"] == "t5":
        opened = ort_sessions.open_session(encoder, threads)
        return _encoder_decoder(opened, prefill, decode, inputs, case, stops)
    return _decoder_only(prefill, decode, inputs, case, stops)


def _decoder_only(
    prefill: Bound, decode: Bound, inputs: dict[str, Any], case: Case, stops: list[int]
) -> Call:
    def generate() -> Any:
        cache: dict[str, Any] = {}

        def step(ids: Any, past: int) -> Any:
            nonlocal cache
            positions = np.arange(past, past + ids.shape[1])[None].repeat(len(ids), axis=0)
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
            arrays = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
            graph = decode if past else prefill
            outputs = graph(ort_sessions.as_values(arrays) | cache)
            cache = _as_past(outputs)
            return outputs["logits"].numpy()

        return ort_sessions.greedy(step, inputs["input_ids"], case.new_tokens, stops)

    return generate


def _encoder_decoder(
    encoder: Any, prefill: Bound, decode: Bound, inputs: dict[str, Any], case: Case,
    stops: list[int],
) -> Call:  # fmt: skip
    encode = Bound(encoder)

    def generate() -> Any:
        given = ort_sessions.as_values(inputs)
        hidden = encode(given)["last_hidden_state"]
        fixed = {
            "attention_mask": given["attention_mask"],
            "encoder_outputs.last_hidden_state": hidden,
        }
        cache: dict[str, Any] = {}

        def step(ids: Any, past: int) -> Any:
            nonlocal cache
            graph = decode if past else prefill
            outputs = graph(ort_sessions.as_values({"decoder_input_ids": ids}) | fixed | cache)
            cache = _as_past(outputs)
            return outputs["logits"].numpy()

        start = np.zeros((case.batch, 1), np.int64)
        return ort_sessions.greedy(step, start, case.new_tokens, stops)

    return generate


def _as_past(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return a step's cache under the names the next step reads it by."""
    return {
        "input." + name.removeprefix("output."): value
        for name, value in outputs.items()
        if "past_key_values" in name
    }
