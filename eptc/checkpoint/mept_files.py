"""What a MEPT or SMoP checkpoint's folder says: settings from two files, sites from the keys.

The original code saves nothing by itself. Folders hold what its users saved: a state dict, whole
or of what was trained, beside `adapter_config.json` and `train_args.json`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from eptc.checkpoint.base import read_json
from eptc.checkpoint.peft_folder import CONFIG, peft_type, read_pickle
from eptc.errors import CheckpointError, OptionError
from eptc.tensors import LazyTensor, SafetensorsFile

__all__ = ["Keys", "MeptSettings", "is_mept", "read_settings", "read_state_dict"]

Method = Literal["prompt-expert", "prompt-routing"]

TRAINING = "train_args.json"
_TYPES: dict[str, Method] = {"PROMPT_EXPERT": "prompt-expert", "PROMPT_ROUTING": "prompt-routing"}
# Whole state dicts first, safetensors before pickles.
_FILES = tuple(
    f"{stem}{suffix}"
    for stem in ("model", "pytorch_model", "trainable_only", "adapter_model")
    for suffix in (".safetensors", ".bin")
)
_USED = (
    "num_virtual_tokens", "num_virtual_tokens_full", "topk", "stochastic", "gumbel",
    "shared_expert",
)  # fmt: skip
_ROLES = {"prompt_embedding.weight": "experts", "prompt_router.0.weight": "router",
          "embedding.weight": "experts", "router.0.weight": "router",
          "shared_embedding": "shared", "layer_norm.weight": "norm"}  # fmt: skip
_PARTS = r"(?P<part>prompt_embedding\.weight|prompt_router\.0\.weight|shared_embedding)"
_NORM = r"layer_norm\.weight"
_BLOCK = re.compile(
    rf"(?:encoder\.block|model\.layers)\.(?P<block>\d+)\.(?:{_PARTS}|(?P<norm>{_NORM}))"
)
_INPUT = re.compile(
    rf"{_PARTS}|(?P<norm>{_NORM})"
    r"|prompt_encoder\.(?P<t5>embedding\.weight|router\.0\.weight|shared_embedding)"
)
# Norms of decoder blocks, which no forward pass reads; what a router's noise has in training
# only; and the embedding under another name, which is compared with it.
_UNREAD = re.compile(r"decoder\.block\.\d+\.layer_norm\.weight|.*\.noise")
_ALIAS = {"word_embeddings.weight": "shared.weight"}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The names of a state dict, by what they are.

    Args:
        blocks: name on disk by role (`experts`, `router`, `shared`, `norm`), by block; blocks
            that are not adapted have a norm alone.
        input: the same of the text's site.
        model: name on disk by name in the Hugging Face model, of everything else.
    """

    blocks: Mapping[int, Mapping[str, str]]
    input: Mapping[str, str]
    model: Mapping[str, tuple[str, ...]]

    @classmethod
    def sort(cls, names: Collection[str]) -> Keys:
        """Sort names of either backbone."""
        blocks: dict[int, dict[str, str]] = {}
        site: dict[str, str] = {}
        model: dict[str, tuple[str, ...]] = {}
        for name in sorted(names):
            plain = name.removeprefix("base_model.")
            if _UNREAD.fullmatch(plain):
                continue
            if found := _BLOCK.fullmatch(plain):
                role = _ROLES[found["part"] or found["norm"]]
                blocks.setdefault(int(found["block"]), {})[role] = name
            elif found := _INPUT.fullmatch(plain):
                site[_ROLES[found["part"] or found["norm"] or found["t5"]]] = name
            else:
                plain = _ALIAS.get(plain, plain)
                model[plain] = (*model.get(plain, ()), name)
        return cls(blocks, site, model)

    @property
    def adapted(self) -> tuple[int, ...]:
        """The blocks that have experts or a router."""
        return tuple(sorted(b for b, roles in self.blocks.items() if set(roles) - {"norm"}))


@dataclasses.dataclass(frozen=True)
class MeptSettings:
    """What training was told.

    Args:
        method: `prompt-expert` (MEPT) or `prompt-routing` (SMoP).
        length: prompts of a row.
        experts: experts of a site.
        top_k: experts that are mixed.
        stochastic: whether their mean is used instead.
        shared: whether a site has shared prompts; None where nobody says.
        vocabulary: tokens of the tokenizer; None where nobody says.
        pad_token_id: of the tokenizer; None where nobody says.
        raw: both files.
    """

    method: Method
    length: int
    experts: int
    top_k: int
    stochastic: bool
    shared: bool | None
    vocabulary: int | None
    pad_token_id: int | None
    raw: Mapping[str, Any]


def is_mept(path: Path) -> bool:
    """Whether a folder says that it holds a MEPT or SMoP checkpoint."""
    if (kind := peft_type(path)) is not None:
        return kind in _TYPES
    if not (path / TRAINING).is_file():
        return False
    try:
        return read_json(path / TRAINING, CheckpointError).get("method") in _TYPES.values()
    except CheckpointError:
        return False


def read_state_dict(path: Path, *, allow_pickle: bool) -> tuple[Path, Mapping[str, LazyTensor]]:
    """Return the file with the tensors, and them by their names on disk.

    Raises:
        CheckpointError: there is none, a pickle that may not be read, or one that holds the
            prompts of the text alone.
    """
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{path} holds no state dict",
            expected="pytorch_model.bin, or trainable_only.bin where the base has all else",
            fix="save one: torch.save(model.state_dict(), 'pytorch_model.bin')",
        )
    if file.suffix == ".bin" and not allow_pickle:
        raise CheckpointError(
            f"{path} holds its weights as a pickle, {file.name}",
            expected="safetensors",
            fix="pass --allow-pickle if you trust the file (it is read with weights_only)",
        )
    tensors = read_pickle(file) if file.suffix == ".bin" else SafetensorsFile(file)
    if set(tensors) == {"prompt_embeddings"}:
        raise CheckpointError(
            f"{file} holds prompt_embeddings alone: the prompts of the text, without routers, "
            "shared prompts and the prompts of blocks",
            expected="the model's state dict; save_pretrained of the training code loses it",
            fix="save it in the training run: torch.save(model.state_dict(), 'pytorch_model.bin')",
        )
    return file, tensors


def read_settings(
    path: Path, keys: Keys, sizes: tuple[int, int], top_k: int | None
) -> MeptSettings:
    """Return what training was told, as far as the files say and the keys tell.

    Args:
        path: the folder.
        keys: of the state dict.
        sizes: rows of a site's experts, and of its router.
        top_k: what the caller says.

    Raises:
        CheckpointError: a setting is missing, contradicts another or the keys, or asks for what
            gives no certain answer.
        OptionError: the caller's `top_k` contradicts the files.
    """
    raw = _both(path)
    method = _method(path, raw, keys)
    rows, experts = sizes
    full = int(_number(path, raw, "num_virtual_tokens_full", rows))
    length = int(_number(path, raw, "num_virtual_tokens", rows // max(1, experts)))
    if length < 1 or full % length:
        raise CheckpointError(
            f"{path} has num_virtual_tokens_full {full}, which is no multiple of "
            f"num_virtual_tokens, {length}"
        )
    if (full, full // length) != sizes:
        raise CheckpointError(
            f"a prompt site in {path} has {rows} prompts for {experts} experts",
            expected=f"{full} prompts for {full // length} experts, as the settings say",
            fix="use the settings of the run that saved the tensors",
        )
    for key, default in (("stochastic", None), ("gumbel", False)):
        if key not in raw and (default is None or method == "prompt-expert"):
            raise CheckpointError(
                f"{path} does not say whether training was {key}",
                fix=f'write "{key}": false into {TRAINING} if the training command did not set '
                "it (the command's default)",
            )
    if raw.get("gumbel"):
        raise CheckpointError(
            f"{path} was trained with gumbel: its code draws noise for every answer, in "
            "evaluation too, so that two answers to one text differ",
            expected="gumbel false",
            fix="there is no certain answer to compile; train without it",
        )
    return MeptSettings(
        method,
        length,
        experts,
        _top_k(path, raw, experts, top_k),
        bool(raw["stochastic"]),
        bool(raw["shared_expert"]) if "shared_expert" in raw else None,
        _optional(path, raw, "tokenizer_length"),
        _optional(path, raw, "tokenizer_pad_token_id"),
        raw,
    )


def _both(path: Path) -> dict[str, Any]:
    """Return the settings of both files; what is null is not said."""
    files = [
        {k: v for k, v in read_json(path / name, CheckpointError).items() if v is not None}
        for name in (TRAINING, CONFIG)
        if (path / name).is_file()
    ]
    for key in _USED:
        values = {repr(found[key]) for found in files if key in found}
        if len(values) > 1:
            raise CheckpointError(
                f"{path / TRAINING} and {path / CONFIG} have {key} {' and '.join(sorted(values))}",
                fix="keep the files of the run that saved the tensors",
            )
    return {key: value for found in files for key, value in found.items()}


def _method(path: Path, raw: Mapping[str, Any], keys: Keys) -> Method:
    told = {raw.get("method"), _TYPES.get(str(raw.get("peft_type")))} - {None}
    if len(told) > 1:
        raise CheckpointError(f"{path} has the methods {' and '.join(sorted(map(str, told)))}")
    if keys.adapted or "shared" in keys.input or "norm" in keys.input:
        seen: Method = "prompt-expert"
    else:
        seen = "prompt-routing"
    method = told.pop() if told else seen
    if method not in _TYPES.values():
        raise CheckpointError(
            f"{path} was trained with the method {method!r}", expected=" or ".join(_TYPES.values())
        )
    if method == "prompt-routing" and seen != method:
        raise CheckpointError(
            f"{path} says {method}, and its tensors have prompts that only prompt-expert has",
            fix="use the settings of the run that saved the tensors",
        )
    return method if method == "prompt-expert" else "prompt-routing"


def _top_k(path: Path, raw: Mapping[str, Any], experts: int, given: int | None) -> int:
    stored = _optional(path, raw, "topk")
    if stored is None and given is None:
        raise CheckpointError(
            f"{path} does not say how many experts are mixed (topk)",
            fix="pass --top-k, as in the training command (its default: 1)",
        )
    if stored is not None and given not in (None, stored):
        raise OptionError(f"--top-k is {given}", expected=f"{stored}, as {path} says")
    top_k = given if stored is None else stored
    assert top_k is not None
    if not 1 <= top_k <= experts:
        raise CheckpointError(
            f"{path} mixes {top_k} experts of {experts}", expected=f"topk from 1 to {experts}"
        )
    return top_k


def _number(path: Path, raw: Mapping[str, Any], key: str, default: int) -> int:
    found = _optional(path, raw, key)
    return default if found is None else found


def _optional(path: Path, raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if value is not None and type(value) is not int:
        raise CheckpointError(f"{key} in {path} is {value!r}", expected="a whole number")
    return value
