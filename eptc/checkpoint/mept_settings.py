"""What MEPT or SMoP training was told: settings from two files, the rest from the tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from eptc.checkpoint.base import read_json
from eptc.checkpoint.mept_files import Keys
from eptc.checkpoint.peft_folder import CONFIG, peft_type
from eptc.errors import CheckpointError, OptionError

__all__ = ["NEEDS", "SAME_RUN", "TRAINING", "MeptSettings", "is_mept", "read_settings"]

Method = Literal["prompt-expert", "prompt-routing"]

TRAINING = "train_args.json"
NEEDS = (
    f"{TRAINING} with method, topk, layers, stochastic and gumbel, {CONFIG} of the peft_type "
    "PROMPT_EXPERT or PROMPT_ROUTING, or both, beside the state dict"
)
SAME_RUN = "use the settings of the run that saved the tensors"
_TYPES: dict[str, Method] = {"PROMPT_EXPERT": "prompt-expert", "PROMPT_ROUTING": "prompt-routing"}
_INTEGER = (lambda value: type(value) is int, "a whole number")
_FLAG = (lambda value: type(value) is bool, "true or false, without quotes")
# What is read of the files, and what each is in JSON.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_virtual_tokens": _INTEGER,
    "num_virtual_tokens_full": _INTEGER,
    "topk": _INTEGER,
    "tokenizer_length": _INTEGER,
    "tokenizer_pad_token_id": _INTEGER,
    "stochastic": _FLAG,
    "gumbel": _FLAG,
    "shared_expert": _FLAG,
    "shared_expert_ratio": (lambda value: value in ("one", "half"), "'one' or 'half'"),
    "method": (lambda value: value in _TYPES.values(), " or ".join(map(repr, _TYPES.values()))),
    "layers": (
        lambda value: isinstance(value, list) and all(type(block) is int for block in value),
        "a list of block numbers, such as [0, 1, 2]",
    ),
}


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
        notes: what no file says, and where it was taken from.
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
    notes: tuple[str, ...]


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
    full = int(raw.get("num_virtual_tokens_full", rows))
    length = int(raw.get("num_virtual_tokens", rows // max(1, experts)))
    if length < 1 or full % length:
        raise CheckpointError(
            f"{path} has num_virtual_tokens_full {full}, which is no multiple of "
            f"num_virtual_tokens, {length}",
            expected="one block of num_virtual_tokens prompts for each expert",
            fix=SAME_RUN,
        )
    if (full, full // length) != sizes:
        raise CheckpointError(
            f"a prompt site in {path} has {rows} prompts for {experts} experts",
            expected=f"{full} prompts for {full // length} experts, as the settings say",
            fix=SAME_RUN,
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
    shared: bool | None = None
    if method == "prompt-expert":
        sites = (keys.input, *keys.blocks.values())
        shared = raw.get("shared_expert", any("shared" in site for site in sites))
    taken: dict[str, object] = {"num_virtual_tokens": length, "num_virtual_tokens_full": full}
    if method == "prompt-expert":
        taken |= {"shared_expert": shared, "layers": list(keys.adapted)}
    return MeptSettings(
        method,
        length,
        experts,
        _top_k(path, raw, experts, top_k),
        raw["stochastic"],
        shared,
        raw.get("tokenizer_length"),
        raw.get("tokenizer_pad_token_id"),
        raw,
        _notes(path, raw, method, taken),
    )


def _notes(
    path: Path, raw: Mapping[str, Any], method: Method, taken: Mapping[str, object]
) -> tuple[str, ...]:
    """Return what the files do not say and where it was taken from; `taken` from the tensors."""
    notes = [
        f"there is no {name}: what it would say is taken from {other} and the tensors"
        if (path / other).is_file()
        else f"there is no {name}"
        for name, other in ((TRAINING, CONFIG), (CONFIG, TRAINING))
        if not (path / name).is_file()
    ]
    if "method" not in raw:
        source = f"the peft_type in {CONFIG}" if raw.get("peft_type") else "the tensors' names"
        notes.append(f"no file says method: {method!r} is taken from {source}")
    notes += [
        f"no file says {key}: {json.dumps(value)} is taken from the tensors"
        for key, value in taken.items()
        if key not in raw
    ]
    return tuple(notes)


def _both(path: Path) -> dict[str, Any]:
    """Return the settings of both files; what is null is not said."""
    files = [_checked(path / n) for n in (TRAINING, CONFIG) if (path / n).is_file()]
    for key in _KINDS:
        values = {repr(found[key]) for found in files if key in found}
        if len(values) > 1:
            raise CheckpointError(
                f"{path / TRAINING} and {path / CONFIG} have {key} {' and '.join(sorted(values))}",
                fix="keep the files of the run that saved the tensors",
            )
    return {key: value for found in files for key, value in found.items()}


def _checked(file: Path) -> dict[str, Any]:
    """Return the settings of one file, each of the type it must have."""
    found = {k: v for k, v in read_json(file, CheckpointError).items() if v is not None}
    for key, (fits, expected) in _KINDS.items():
        if key in found and not fits(found[key]):
            raise CheckpointError(
                f"{key} in {file} is {json.dumps(found[key])}",
                expected=expected,
                fix=f"write what training was told as {expected}",
            )
    return found


def _method(path: Path, raw: Mapping[str, Any], keys: Keys) -> Method:
    told: set[Any] = {raw.get("method"), _TYPES.get(str(raw.get("peft_type")))} - {None}
    if len(told) > 1:
        raise CheckpointError(
            f"{path} has the methods {' and '.join(sorted(told))}",
            expected="one method: " + " or ".join(_TYPES.values()),
            fix="keep the files of the run that saved the tensors",
        )
    if keys.adapted or "shared" in keys.input or "norm" in keys.input:
        seen: Method = "prompt-expert"
    else:
        seen = "prompt-routing"
    method: Method = told.pop() if told else seen
    if method == "prompt-routing" and seen != method:
        raise CheckpointError(
            f"{path} says {method}, and its tensors have prompts that only prompt-expert has",
            fix=SAME_RUN,
        )
    return method


def _top_k(path: Path, raw: Mapping[str, Any], experts: int, given: int | None) -> int:
    stored: int | None = raw.get("topk")
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
            f"{path} mixes {top_k} experts of {experts}",
            expected=f"topk from 1 to {experts}",
            fix=SAME_RUN,
        )
    return top_k
