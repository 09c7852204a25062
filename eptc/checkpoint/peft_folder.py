"""Folders that PEFT and its offspring write: `adapter_config.json` beside named tensors."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes

from eptc.checkpoint.base import read_json
from eptc.errors import CheckpointError, MissingExtraError
from eptc.tensors import ArrayTensor, LazyTensor, SafetensorsFile

__all__ = ["CONFIG", "peft_type", "read_pickle", "read_tensors", "tensor_names"]

CONFIG = "adapter_config.json"
_SAFETENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def peft_type(path: Path) -> str | None:
    """Return what kind of adapter a folder says it holds.

    None where it is no such folder; empty where it does not say, or cannot be read.
    """
    if not (path / CONFIG).is_file():
        return None
    try:
        kind = read_json(path / CONFIG, CheckpointError).get("peft_type")
    except CheckpointError:
        return ""
    return kind if isinstance(kind, str) else ""


def tensor_names(path: Path) -> frozenset[str]:
    """Return the names of an adapter's tensors; of a pickle every string in it, unexecuted."""
    if (path / _SAFETENSORS).is_file():
        return frozenset(SafetensorsFile(path / _SAFETENSORS))
    try:
        with zipfile.ZipFile(path / _PICKLE) as archive:
            member = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            operations = pickletools.genops(archive.read(member))
            return frozenset(arg for _, arg, _ in operations if isinstance(arg, str))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return frozenset()


def read_tensors(path: Path, allow_pickle: bool) -> Mapping[str, LazyTensor]:
    """Return the tensors of an adapter's folder.

    Args:
        path: the folder.
        allow_pickle: whether `adapter_model.bin` may be read (weights only).

    Raises:
        CheckpointError: there are none, or only a pickle that may not be read, or a damaged one.
    """
    if (path / _SAFETENSORS).is_file():
        return SafetensorsFile(path / _SAFETENSORS)
    if not (path / _PICKLE).is_file():
        raise CheckpointError(
            f"{path} has no {_SAFETENSORS}",
            expected=f"{CONFIG} and {_SAFETENSORS} in one folder",
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{path} holds its weights as a pickle, {_PICKLE}",
            expected=_SAFETENSORS,
            fix="pass --allow-pickle if you trust the file (it is read with weights_only)",
        )
    return read_pickle(path / _PICKLE)


def read_pickle(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a file that torch.save wrote; nothing in it is executed.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "reading a .bin file needs torch", fix="pip install 'ept-compiler[compile]'"
        ) from error
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{path} cannot be read as weights only: {reason}", fix="copy the file again"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in data.items():
        half = tensor.dtype == torch.bfloat16  # numpy has none of its own
        try:
            array = tensor.detach().view(torch.int16 if half else tensor.dtype).numpy()
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{name} in {path} is a {tensor.layout} tensor of the type {tensor.dtype}",
                expected="a dense tensor of floating point numbers",
            ) from error
        array = array.view(ml_dtypes.bfloat16) if half else array
        tensors[str(name)] = ArrayTensor(str(name), array)
    return tensors
