"""optimum-onnx, in an environment of its own: its ORTModel classes, and bare sessions.

Nothing of eptc, nor of the transformers that eptc needs, is imported here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks import ort_sessions
from benchmarks.cases import Case, feeds
from benchmarks.contestants import Call, Contestant
from benchmarks.ort_sessions import Bound
from benchmarks.places import Files

__all__ = ["export", "load", "task_name"]

_TASKS = {
    "bert": "text-classification",
    "llama": "text-generation-with-past",
    "t5": "text2text-generation-with-past",
}


def task_name(files: Files) -> str:
    """Return what `optimum-cli export onnx --task` calls the model's task."""
    return _TASKS[json.loads((files.merged / "config.json").read_text())["model_type"]]


def export(contestant: Contestant, files: Files, case: Case) -> None:  # noqa: ARG001
    """Export as `optimum-cli export onnx` does."""
    from optimum.exporters.onnx import main_export

    main_export(
        str(files.merged),
        output=str(files.engine(contestant.name)),
        task=task_name(files),
        optimize="O2" if contestant.name == "optimum-O2" else None,
        local_files_only=True,
    )


def load(contestant: Contestant, files: Files, case: Case, threads: int) -> Call:
    """Return what runs the model once."""
    if contestant.name == "optimum":
        return _ort_model(files, case, threads)
    folder = files.engine("optimum" if contestant.name == "optimum-session" else contestant.name)
    inputs = feeds(case, files)
    if case.mode == "classify":
        session = ort_sessions.open_session(folder / "model.onnx", threads)
        return ort_sessions.one_output(session, inputs, "logits")
    config = json.loads((files.merged / "config.json").read_text())
    stops = [config["eos_token_id"]]
    if config["model_type"] == "llama":
        model = Bound(ort_sessions.open_session(folder / "model.onnx", threads))
        return _decoder_only(model, inputs, case, stops)
    encoder = ort_sessions.open_session(folder / "encoder_model.onnx", threads)
    if case.mode == "encode":
        return ort_sessions.one_output(encoder, inputs, "last_hidden_state")
    decoder = Bound(ort_sessions.open_session(folder / "decoder_model_merged.onnx", threads))
    return _encoder_decoder(Bound(encoder), decoder, inputs, case, stops)


def _ort_model(files: Files, case: Case, threads: int) -> Call:
    import onnxruntime
    import torch
    from optimum.onnxruntime import (
        ORTModelForCausalLM,
        ORTModelForSeq2SeqLM,
        ORTModelForSequenceClassification,
    )

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    classes = {
        "text-classification": ORTModelForSequenceClassification,
        "text-generation-with-past": ORTModelForCausalLM,
        "text2text-generation-with-past": ORTModelForSeq2SeqLM,
    }
    model = classes[task_name(files)].from_pretrained(
        str(files.engine("optimum")), session_options=options
    )
    inputs = {name: torch.from_numpy(array) for name, array in feeds(case, files).items()}
    if case.mode == "classify":
        return lambda: model(**inputs).logits.numpy()
    if case.mode == "encode":
        return lambda: model.encoder(**inputs).last_hidden_state.numpy()
    skip = 1 if model.config.is_encoder_decoder else case.length

    def generate() -> Any:
        tokens = model.generate(
            **inputs, max_new_tokens=case.new_tokens, do_sample=False, num_beams=1
        )
        return tokens[:, skip:].numpy()

    return generate


def _decoder_only(model: Bound, inputs: dict[str, Any], case: Case, stops: list[int]) -> Call:
    def generate() -> Any:
        cache = model.empty(case.batch)

        def step(ids: Any, past: int) -> Any:
            nonlocal cache
            positions = np.arange(past, past + ids.shape[1])[None].repeat(len(ids), axis=0)
            mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
            arrays = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
            outputs = model(ort_sessions.as_values(arrays) | cache)
            cache = _as_past(outputs)
            return outputs["logits"].numpy()

        return ort_sessions.greedy(step, inputs["input_ids"], case.new_tokens, stops)

    return generate


def _encoder_decoder(
    encoder: Bound, decoder: Bound, inputs: dict[str, Any], case: Case, stops: list[int]
) -> Call:
    def generate() -> Any:
        given = ort_sessions.as_values(inputs)
        fixed = {
            "encoder_attention_mask": given["attention_mask"],
            "encoder_hidden_states": encoder(given)["last_hidden_state"],
        }
        # The merged decoder chooses its branch by a flag, and reads no past in the first.
        cache = decoder.empty(case.batch)

        def step(ids: Any, past: int) -> Any:
            arrays = {"input_ids": ids, "use_cache_branch": np.array([past > 0])}
            outputs = decoder(ort_sessions.as_values(arrays) | fixed | cache)
            new = _as_past(outputs)
            # Later steps return the cross attention's cache empty: the first step's stays.
            kept = new if not past else {n: v for n, v in new.items() if ".encoder." not in n}
            cache.update(kept)
            return outputs["logits"].numpy()

        start = np.zeros((case.batch, 1), np.int64)
        return ort_sessions.greedy(step, start, case.new_tokens, stops)

    return generate


def _as_past(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return a step's cache under the names the next step reads it by."""
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }
