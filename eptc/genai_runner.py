"""Greedy text in onnxruntime-genai: run as a file, by an interpreter that has it.

Nothing of eptc is imported here, nor is what eptc needs: `python genai_runner.py versions` prints
the versions of what is installed as JSON; `python genai_runner.py run JOB.json OUT.npz` runs
probes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

_PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx", "torch", "transformers")


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    if arguments[0] == "versions":
        importlib.import_module("onnxruntime_genai")  # is there, and loads

        print(json.dumps({name: importlib.metadata.version(name) for name in _PACKAGES}))  # noqa: T201
        return
    job = json.loads(Path(arguments[1]).read_text("utf-8"))
    _run(job["folder"], job["probes"], job["new_tokens"], job["texts"], arguments[2])


def _run(
    folder: str, probes: list[list[int]], new_tokens: int, texts: list[str], out: str
) -> None:
    """Write the tokens that follow each probe, and the logits that each was chosen by.

    Args:
        folder: what the model builder wrote.
        probes: token ids.
        new_tokens: how many to write, at most: a stop token is the last.
        texts: what to tokenize; none where the folder has no tokenizer.
        out: an `.npz` file: `tokens.{i}` [new tokens], `logits.{i}` [new tokens, vocabulary],
            `ids.{i}` [tokens] of each text.
    """
    import numpy as np

    genai: Any = importlib.import_module("onnxruntime_genai")
    model = genai.Model(folder)
    found: dict[str, Any] = {}
    for number, ids in enumerate(probes):
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + new_tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array([ids], np.int32))
        tokens: list[int] = []
        logits: list[Any] = []
        while len(tokens) < new_tokens and not generator.is_done():
            logits.append(np.array(generator.get_logits())[0, -1])
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        found[f"tokens.{number}"] = np.array(tokens, np.int64)
        found[f"logits.{number}"] = np.stack(logits).astype(np.float32)
    tokenizer: Any = genai.Tokenizer(model) if texts else None
    for number, text in enumerate(texts):
        found[f"ids.{number}"] = np.array(tokenizer.encode(text), np.int64)
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1:])
