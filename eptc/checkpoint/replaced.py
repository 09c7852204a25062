"""Parameters of the base that an adapter's file replaces: heads, biases, resized embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eptc.architectures import canonical_name
from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Source
from eptc.errors import CheckpointError
from eptc.tensors import LazyTensor

__all__ = ["Replaced", "head_rows", "refuse_partial", "take_replaced"]

_HEADS = ("classifier", "score")


@dataclasses.dataclass(frozen=True)
class Replaced:
    """What stands in the place of the base's own.

    Args:
        head: parameters of the classification head.
        weights: others.
        settings: what that changes of the base's configuration.
    """

    head: Mapping[str, LazyTensor]
    weights: Mapping[str, LazyTensor]
    settings: Mapping[str, Any]


def take_replaced(source: Source, base: BaseModel, names: Mapping[str, str]) -> Replaced:
    """Take the parameters that replace the base's.

    Args:
        source: the adapter's tensors.
        base: the base model.
        names: of each tensor on disk, what it is called in the Hugging Face model.

    Raises:
        CheckpointError: one that the base does not have, of another shape, or given twice; an
            embedding without the head that is tied to it, or the other way round.
    """
    _refuse_half_tied(source, base, names)
    head: dict[str, LazyTensor] = {}
    weights: dict[str, LazyTensor] = {}
    settings: dict[str, Any] = {}
    embedding = base.architecture.embedding
    classifies = base.architecture.kind == "encoder-classifier"
    for stored, name in sorted(names.items()):
        tensor = source.finite[stored]
        plain = canonical_name(name, base.config, tied_head=base.tied_head)
        if plain is not None and classifies and plain.split(".")[0] in _HEADS:
            head[plain] = source.take(stored, tensor.shape)
            continue
        own = None if plain is None else base.weights.get(plain)
        if plain is None or own is None:
            raise CheckpointError(
                f"{source.path} has the tensor {stored}, which is no part of an adapter, and the "
                f"base {base.path} has no parameter {name}",
                expected="the adapter's own tensors, and parameters of the base",
                fix="use the file the training run saved, and the base it was trained on",
            )
        grows = plain in (embedding, base.architecture.head)
        shape: tuple[int | None, ...] = (None, *own.shape[1:]) if grows else own.shape
        found = source.take(stored, shape)
        if plain in weights and not _same(weights[plain], found):
            raise CheckpointError(
                f"{source.path} has {stored} and {weights[plain].name} with different numbers, "
                "which are one parameter in the base",
                fix="untie them in the base's config.json, as training did",
            )
        weights[plain] = found
        if plain == embedding and found.shape[0] != own.shape[0]:
            settings["vocab_size"] = found.shape[0]
    return Replaced(head, weights, settings)


def _refuse_half_tied(source: Source, base: BaseModel, names: Mapping[str, str]) -> None:
    """Refuse one of two parameters that are one in the base: PEFT trains a copy that is not."""
    arch = base.architecture
    if not base.tied_head or not arch.head:
        return
    plain = {name: canonical_name(name, base.config, tied_head=False) for name in names.values()}
    given = {what for what in (arch.embedding, arch.head) if what in plain.values()}
    if len(given) == 1:
        (one,) = given
        (other,) = {arch.embedding, arch.head} - given
        raise CheckpointError(
            f"{source.path} has {one} of its own, which is one parameter with {other} in the base "
            f"{base.path}: whether {other} is still the base's, the adapter does not say",
            expected="both or neither",
            fix="merge the adapter in PEFT (merge_and_unload), untie the model, and use that",
        )


def refuse_partial(source: Source, base: BaseModel, head: Mapping[str, LazyTensor]) -> None:
    """Refuse a head of which a part is there: the rest would be the base's, which was not trained.

    Args:
        source: the adapter's tensors, for the message.
        base: the base model.
        head: what the adapter has of a classification head.

    Raises:
        CheckpointError: the base's head has more parameters, or a weight has no bias.
    """
    if not head:
        return
    whole = {name for name in base.weights if name.split(".")[0] in _HEADS}
    # A base without a head does not say what one is made of; each linear of one has a bias.
    whole |= {name.removesuffix(".weight") + ".bias" for name in head if name.endswith(".weight")}
    if lost := sorted(whole - head.keys()):
        raise CheckpointError(
            f"{source.path} holds a part of the classification head: it has "
            f"{', '.join(sorted(head))} and lacks {', '.join(lost)}",
            expected="the whole head, as it was trained, or nothing of it",
            fix="use the file the training run saved",
        )


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    return one.shape == other.shape and bool((one.numpy() == other.numpy()).all())


def head_rows(base: BaseModel, head: Mapping[str, LazyTensor]) -> int | None:
    """Return how many outputs an encoder's classification head has; None where there is none.

    Raises:
        CheckpointError: the base is an encoder, and neither it nor the adapter has a head.
    """
    if base.architecture.kind != "encoder-classifier":
        return None
    for name in ("classifier.weight", "classifier.out_proj.weight", "score.weight"):
        found = head.get(name, base.weights.get(name))
        if found is not None:
            return found.shape[0]
    raise CheckpointError(
        f"neither the adapter nor the base {base.path} has a classification head",
        expected="classifier.weight, classifier.out_proj.weight or score.weight in one of them",
        fix="save the head with the adapter (modules_to_save), or give the base that has it",
    )
