"""Checking arrays against a graph's declared inputs before they reach ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eptc.errors import InputError
from eptc.runtime.row_tasks import check_task_ids
from eptc.runtime.spec import TASK_IDS, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.manifest import Manifest
    from eptc.tasks import Task

__all__ = [
    "check_given",
    "check_shapes",
    "check_values",
    "check_vocabulary",
    "checked",
    "checked_prompt",
]

_MAY_BE_EMPTY = "past_sequence"
_PROMPT = GraphSpec(
    file="",
    inputs=tuple(
        TensorSpec(name, "int64", ("batch", "sequence"))
        for name in ("input_ids", "attention_mask")
    ),
    outputs=(),
)


def checked(
    feeds: Mapping[str, Any],
    name: str,
    spec: GraphSpec,
    vocab_size: int | None,
    tasks: Sequence[Task] = (),
) -> dict[str, NumpyArray]:
    """Return the feeds as arrays of the declared types; only exact casts are made.

    Args:
        feeds: an array, or nested lists, per input.
        name: the graph's name, for messages.
        spec: its declared interface.
        vocab_size: token ids must be below it; None where unknown.
        tasks: of an engine of several, in their places.

    Raises:
        InputError: names, types, ranks or sizes that do not fit, an empty batch, a negative
            integer (Gather would count it from the end), a token outside the vocabulary, the place
            of no task.
    """
    check_given(feeds, name, spec)
    arrays = {tensor.name: _cast(feeds[tensor.name], tensor) for tensor in spec.inputs}
    check_shapes({key: array.shape for key, array in arrays.items()}, spec)
    for tensor in spec.inputs:
        check_values(arrays[tensor.name], tensor, vocab_size, tasks)
    return arrays


def check_given(feeds: Mapping[str, Any], name: str, spec: GraphSpec) -> None:
    """Refuse feeds that are not exactly a graph's inputs.

    Raises:
        InputError: an input that is missing, or one that the graph does not have.
    """
    declared = [tensor.name for tensor in spec.inputs]
    if not isinstance(feeds, Mapping):
        raise InputError(
            f"the feeds are a {type(feeds).__name__}", expected="a dict of arrays by input name"
        )
    wrong = [key for key in feeds if key not in declared]
    missing = [key for key in declared if key not in feeds]
    if wrong or missing:
        found = f"no input {missing[0]!r}" if missing else f"the unknown input {wrong[0]!r}"
        raise InputError(f"graph {name!r} got {found}", expected=", ".join(declared))


def check_shapes(shapes: Mapping[str, tuple[int, ...]], spec: GraphSpec) -> None:
    """Refuse shapes that do not fit a graph's inputs, or one another.

    Raises:
        InputError: with the input, its shape and the one it should have.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in spec.inputs:
        _check_shape(shapes[tensor.name], tensor, sizes)
    _check_total(sizes)


def check_values(
    array: NumpyArray, tensor: TensorSpec, vocab_size: int | None, tasks: Sequence[Task] = ()
) -> None:
    """Refuse what a graph would read somewhere else than it means.

    Raises:
        InputError: a negative integer, a token outside the vocabulary, the place of no task.
    """
    if tensor.name == TASK_IDS:
        check_task_ids(array, tasks)
    if array.dtype.kind != "i" or array.size == 0:
        return
    if array.min() < 0:
        raise InputError(f"{tensor.name!r} has the negative value {array.min()}")
    if tensor.name == "input_ids":
        check_vocabulary(array, vocab_size)


def checked_prompt(feeds: Mapping[str, Any], manifest: Manifest) -> dict[str, NumpyArray]:
    """Return the input_ids and attention_mask of a batch that an engine is to answer.

    Where the engine is of several tasks the batch has task_ids as well.

    Raises:
        InputError: as `checked`; a row without a token, or padding on the side where the answer
            goes.
    """
    spec = _PROMPT
    if manifest.tasks:
        ids = TensorSpec(TASK_IDS, "int64", ("batch",))
        spec = dataclasses.replace(spec, inputs=(*spec.inputs, ids))
    arrays = checked(feeds, "prompt", spec, manifest.vocab_size, manifest.tasks)
    mask = arrays["attention_mask"]
    if not mask.any(axis=1).all():
        raise InputError("'attention_mask' has a row of zeros", expected="a token in each row")
    if manifest.kind == "decoder-only" and not mask[:, -1].all():
        raise InputError(
            "'attention_mask' ends with padding", expected="padding on the left of each row"
        )
    return arrays


def _cast(value: Any, tensor: TensorSpec) -> NumpyArray:
    try:
        array = np.asarray(value, order="C")
    except ValueError as error:
        raise InputError(f"{tensor.name!r} is not an array: {error}") from error
    if tensor.dtype == "bfloat16":
        raise InputError(
            f"{tensor.name!r} is bfloat16, which numpy does not have",
            fix="use generate or classify, which keep such values inside ONNX Runtime",
        )
    wanted = np.dtype(tensor.dtype)
    if array.dtype == wanted:
        return array
    if array.size == 0 or np.can_cast(array.dtype, wanted, "safe"):  # [] is float64 to numpy
        return array.astype(wanted)
    if array.dtype.kind in "iu" and wanted.kind == "i":
        cast = array.astype(wanted)
        if np.array_equal(cast, array):
            return cast
    raise InputError(
        f"{tensor.name!r} has dtype {array.dtype}",
        expected=f"{wanted}, or a type that converts to it exactly",
    )


def _check_shape(
    found: tuple[int, ...], tensor: TensorSpec, sizes: dict[str, tuple[int, str]]
) -> None:
    shape = f"{tensor.name!r} has shape {list(found)}"
    expected = f"[{', '.join(map(str, tensor.shape))}]"
    if len(found) != len(tensor.shape):
        raise InputError(shape, expected=expected)
    for size, dim in zip(found, tensor.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise InputError(shape, expected=expected)
            continue
        if size == 0 and dim != _MAY_BE_EMPTY:
            raise InputError(f"{shape}: {dim} is empty", expected=expected)
        known, first = sizes.setdefault(dim, (size, tensor.name))
        if size != known:
            raise InputError(
                f"{shape}: {dim} is {size}", expected=f"{known}, as in {first!r} ({expected})"
            )


def check_vocabulary(ids: NumpyArray, vocab_size: int | None) -> None:
    """Refuse a token outside the vocabulary, which CUDA would read as zeros."""
    if vocab_size is not None and ids.max() >= vocab_size:
        raise InputError(
            f"'input_ids' has the token {ids.max()}", expected=f"ids below {vocab_size}"
        )


def _check_total(sizes: Mapping[str, tuple[int, str]]) -> None:
    """Refuse a decoder's mask that covers anything but what is cached and what is new."""
    if not {"total_sequence", "past_sequence", "sequence"} <= set(sizes):
        return
    total, name = sizes["total_sequence"]
    past, new = sizes["past_sequence"][0], sizes["sequence"][0]
    if total != past + new:
        raise InputError(f"{name!r} covers {total} tokens", expected=f"{past} cached + {new} new")
