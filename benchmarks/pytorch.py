"""PyTorch: the unfolded EPT model, and the folded one eager and compiled."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import Case, feeds
from benchmarks.contestants import Call, Contestant
from benchmarks.models import MODELS
from benchmarks.places import Files

__all__ = ["load"]


def load(contestant: Contestant, files: Files, case: Case, threads: int) -> Call:
    """Return what runs the model once, as transformers' users do."""
    torch.set_num_threads(threads)
    inputs = {name: torch.from_numpy(array) for name, array in feeds(case, files).items()}
    if contestant.name == "unfolded":
        return torch.inference_mode()(_unfolded(files, inputs, case))
    model = _folded(files)
    if contestant.name == "compiled":
        model = _compiled(model, case)
    return torch.inference_mode()(_call(model, inputs, case))


def _unfolded(files: Files, inputs: dict[str, torch.Tensor], case: Case) -> Call:
    from eptc.nn import load_reference

    reference = load_reference(files.checkpoint, files.base)
    call = _call(reference.hf.eval(), inputs, case)

    def run() -> Any:
        with reference.task(MODELS[case.model].task):
            return call()

    return run


def _folded(files: Files) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(files.merged)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(files.merged, dtype=torch.float32).eval()


def _compiled(model: Any, case: Case) -> Any:
    if case.mode == "generate":
        # As transformers documents it: a cache of fixed size, so that shapes do not change.
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward)
        return model
    model.forward = torch.compile(model.forward)
    if case.mode == "encode":
        model.encoder.forward = torch.compile(model.encoder.forward)
    return model


def _call(model: Any, inputs: dict[str, torch.Tensor], case: Case) -> Call:
    if case.mode == "generate":
        # A decoder-only model repeats the prompt, an encoder-decoder its start token.
        skip = 1 if model.config.is_encoder_decoder else case.length

        def generate() -> Any:
            tokens = model.generate(
                **inputs, max_new_tokens=case.new_tokens, do_sample=False, num_beams=1
            )
            return tokens[:, skip:].numpy()

        return generate
    part, output = (
        (model.get_encoder(), "last_hidden_state") if case.mode == "encode" else (model, "logits")
    )
    return lambda: getattr(part(**inputs), output).numpy()
