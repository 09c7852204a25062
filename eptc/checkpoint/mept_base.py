"""The base below prompts: what a state dict has of it is compared with it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptc.architectures import PROMPTED, canonical_name
from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Source
from eptc.checkpoint.mept_files import Keys
from eptc.checkpoint.mept_settings import MeptSettings
from eptc.errors import BaseModelError, CheckpointError
from eptc.tensors import ComputedTensor, LazyTensor, cast

__all__ = ["HEAD", "SAVE", "Own", "prompted_base", "take_own"]

HEAD = "score.weight"
SAVE = "use the full state dict: torch.save(model.state_dict(), 'pytorch_model.bin')"


def prompted_base(base: BaseModel) -> BaseModel:
    """Return a base as prompts are put before it: a Llama becomes a classifier.

    Raises:
        BaseModelError: another model type.
    """
    found = PROMPTED.get(base.architecture.model_type)
    if found is None:
        raise BaseModelError(
            f"the base {base.path} is a {base.architecture.model_type} model, to which the "
            "training code adds no prompts",
            expected=" or ".join(PROMPTED),
            fix="give the base the prompts were trained on with --base",
        )
    if found is base.architecture:
        return base
    weights = {name: t for name, t in base.weights.items() if name != base.architecture.head}
    unused = {*base.unused, *(t.name for n, t in base.weights.items() if n not in weights)}
    if base.tied_head:
        unused = set(base.unused)
    return dataclasses.replace(
        base, architecture=found, weights=weights, unused=tuple(sorted(unused)), tied_head=False
    )


@dataclasses.dataclass(frozen=True)
class Own:
    """What the state dict has of the task model itself.

    Args:
        head: the classifier's, None where there is none.
        weights: parameters in another size than the base's.
        settings: what that changes of the base's configuration.
        notes: what a user should know.
        whole: whether it is a whole state dict, not one of what was trained.
    """

    head: LazyTensor | None
    weights: Mapping[str, LazyTensor]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    whole: bool


def take_own(
    file: Path, base: BaseModel, settings: MeptSettings, keys: Keys, source: Source
) -> Own:
    """Compare the frozen weights with the base's; return those that are not the base's."""
    llama = base.architecture.model_type == "llama"
    head: LazyTensor | None = None
    sized: dict[str, LazyTensor] = {}
    embedding = base.architecture.embedding
    for name, stored in keys.model.items():
        plain = canonical_name(name, base.config, tied_head=base.tied_head)
        if llama and plain == HEAD:
            head = source.take(stored[0], (None, base.weights[embedding].shape[1]))
            continue
        if llama and plain == "lm_head.weight":
            continue
        for each in stored:
            tensor = source.finite[each]
            if plain is not None and (found := _compared(file, base, plain, tensor)) is not None:
                sized[plain] = found
    if llama and head is None:
        causal = "lm_head.weight" in keys.model
        raise CheckpointError(
            f"{file} has no {HEAD}"
            + (": it is of a LlamaForCausalLM, whose first tokens such prompts overwrite"
               if causal else ""),
            expected="a LlamaForSequenceClassification, the only Llama that prompts work with",
            fix=SAVE,
        )  # fmt: skip
    names = [n for n in keys.model if canonical_name(n, base.config) == embedding]
    notes: tuple[str, ...] = ()
    if not names:
        sized, notes = _cut(file, base, settings)
    changed: dict[str, Any] = {"architectures": [base.architecture.task_class]}
    if embedding in sized:
        changed["vocab_size"] = sized[embedding].shape[0]
    if settings.pad_token_id is not None:
        changed["pad_token_id"] = settings.pad_token_id
    return Own(head, sized, changed, notes, bool(names))


def _compared(file: Path, base: BaseModel, name: str, tensor: LazyTensor) -> LazyTensor | None:
    """Return a tensor that stands for the base's in another size; None where it is the base's.

    Raises:
        CheckpointError: another one.
    """
    own = base.weights.get(name)
    grows = name in (base.architecture.embedding, base.architecture.head)
    if own is None and _pattern(name) not in map(_pattern, base.weights):
        raise CheckpointError(
            f"{file} has {tensor.name} {list(tensor.shape)}, which is neither a tensor of prompts "
            f"nor one of {base.architecture.task_class}",
            expected=f"the keys of {base.architecture.task_class}, and of prompts: "
            "prompt_embedding.weight, prompt_router.0.weight, shared_embedding and "
            "layer_norm.weight of blocks and of the input",
            fix="remove it if no forward pass of the training code reads it; if it is a "
            "parameter of another kind of model, give that model with --base",
        )
    if own is None or own.shape[grows:] != tensor.shape[grows:]:
        raise CheckpointError(
            f"{file} has {tensor.name} {list(tensor.shape)}, the base {base.path} has "
            + ("none" if own is None else str(list(own.shape))),
            fix="give the base the prompts were trained on with --base",
        )
    rows = min(own.shape[0], tensor.shape[0])
    one, two = (cast(t.numpy()[:rows], "float32") for t in (own, tensor))
    if not np.array_equal(one, two):
        raise CheckpointError(
            f"{tensor.name} in {file} is not what the base {base.path} has, and training froze it",
            expected="the base's numbers, to the bit",
            fix="give the base the prompts were trained on with --base",
        )
    return tensor if tensor.shape != own.shape else None


def _pattern(name: str) -> str:
    """Return a parameter's name without the numbers of blocks."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _cut(
    file: Path, base: BaseModel, settings: MeptSettings
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Return the embeddings as training resized them, where the file has none."""
    rows, wanted = base.weights[base.architecture.embedding].shape[0], settings.vocabulary
    llama = base.architecture.model_type == "llama"
    if wanted == rows:
        return {}, ()
    if wanted is None and not llama:
        return {}, (
            f"{file.name} has no embedding, and nothing says how many tokens the tokenizer had: "
            f"the base's {rows} are used, training may have had fewer",
        )
    if wanted is None or wanted > rows:
        raise CheckpointError(
            f"{file} has no embedding, and training resized the base's {rows} rows"
            + (f" to {wanted}: what it added is random, frozen, and read" if wanted else
               " unless its tokenizer had a padding token, which nothing says"),
            expected="the embedding as training had it",
            fix=SAVE,
        )  # fmt: skip
    names = (base.architecture.embedding, base.architecture.head)
    return {name: _first(base.weights[name], wanted) for name in names if name in base.weights}, ()


def _first(tensor: LazyTensor, rows: int) -> LazyTensor:
    shape = (rows, *tensor.shape[1:])
    return ComputedTensor(tensor.name, tensor.dtype, shape, lambda: tensor.numpy()[:rows])
