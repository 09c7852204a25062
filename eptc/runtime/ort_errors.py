"""The exceptions of ONNX Runtime."""

from __future__ import annotations

import functools

__all__ = ["ort_errors"]


@functools.cache
def ort_errors() -> tuple[type[Exception], ...]:
    """Return every exception ONNX Runtime raises: they share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (value for value in vars(state).values() if isinstance(value, type))
    found = [value for value in own if issubclass(value, Exception)]
    return (*sorted(found, key=lambda value: value.__name__), RuntimeError, ValueError)
