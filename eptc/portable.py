"""Configurations that releases of transformers before 5 understand as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["portable_config", "portable_tokenizer"]


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's values with the type and the rotary embedding under both names."""
    found = dict(config)
    if (dtype := found.get("dtype", found.get("torch_dtype"))) is not None:
        found |= {"dtype": dtype, "torch_dtype": dtype}
    rope = found.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        found.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            found.setdefault("rope_scaling", {k: rope[k] for k in rope if k != "rope_theta"})
    return dict(sorted(found.items()))


def portable_tokenizer(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json's values with its special tokens, and a class they know.

    A setting goes that makes those releases build the tokenizer anew from SentencePiece's file,
    which is not there: tokenizer.json has what it says.

    Args:
        config: the values.
        special: special tokens by name; older tokenizers have them in a file of their own.
    """
    found = {**config, **{n: str(token) for n, token in special.items() if isinstance(token, str)}}
    found.pop("add_prefix_space", None)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    return dict(sorted(found.items()))
