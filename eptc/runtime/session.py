"""Opening an ONNX Runtime session, with the options that measured best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from eptc.errors import BundleError, OptionError
from eptc.runtime.assignment import RECORD, check_assignment
from eptc.runtime.cpus import saturates
from eptc.runtime.ort_errors import ort_errors
from eptc.runtime.providers import CPU

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.providers import Request

__all__ = ["keep_products_exact", "open_session"]

_FATAL: Final = 4  # ONNX Runtime's errors are raised; its log would only say them twice

_CONFIG: Final = {
    # How long an idle thread waits for work before it sleeps. ONNX Runtime's own waiting lasts
    # far longer, and takes its CPU from whoever else has work: the caller's next step, another
    # session (the encoder beside the decoder), another process. Alone on two cores 50 us were
    # as fast; beside other work, or with four callers, 0.6 to 0.9 of the time. No waiting at
    # all costs a lone caller 6 to 30 %. ONNX Runtime before 1.26 does not know the key.
    "session.intra_op.spin_duration_us": "50",
}


def open_session(
    path: Path,
    requests: Sequence[Request],
    threads: int,
    *,
    optimize: bool = True,
    fuse: bool = True,
    save_as: Path | None = None,
    external_from: int = 0,
    weights: Iterable[tuple[str, NumpyArray]] = (),
    allow_fallback: bool = False,
) -> Any:
    """Open a session.

    What was tried and left as it is, for it made no difference or things slower: denormals as
    zero, no arena, a device allocator for initializers, shrinking the arena
    after each run (memory grew).

    Args:
        path: the `.onnx` file.
        requests: providers in order of preference.
        threads: threads one operator may use.
        optimize: whether ONNX Runtime rewrites the graph.
        fuse: whether ONNX Runtime fuses operators. False for 8-bit floating point, for which it
            has fusions of integers (1.31 and before): it refuses its own MatMulIntegerToFloat,
            and silently drops a Relu before QuantizeLinear.
        save_as: where to write the graph as it will run, with packed weights in `NAME.data`.
        external_from: the smallest tensor in bytes that `NAME.data` gets.
        weights: names of initializers in the weights file, and what stands in their place.
        allow_fallback: whether nodes that the first provider cannot run may run on the CPU.

    Raises:
        BundleError: the graph or its weights cannot be loaded.
        OptionError: a provider that was asked for did not start, or does not run the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    # It would keep a plan of the memory for each shape that was ever seen, and texts and caches
    # come in thousands of shapes; a run takes as long without (within 1 %).
    options.enable_mem_pattern = False
    for key, value in _CONFIG.items():
        options.add_session_config_entry(key, value)
    if requests[0][0] != CPU:
        options.add_session_config_entry(*RECORD)
    keep_products_exact(options)
    if not fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # Or the weights would be dequantized in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
        for key, value in _saving(f"{save_as.name}.data", external_from).items():
            options.add_session_config_entry(key, value)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise BundleError(
            f"{str(path)!a} has a name that is no UTF-8, and ONNX Runtime takes no other",
            fix="give the folder another name",
        ) from error
    # ONNX Runtime copies the numbers when it opens the session; until then these must stay.
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    try:
        # Its own fallback prints to stdout and goes on with less than was asked for.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(requests), enable_fallback=0
        )
    except ort_errors() as error:
        raise BundleError(
            f"{path} does not load in ONNX Runtime {onnxruntime.__version__}: {error}",
            fix="check the bundle with `eptc verify`, or upgrade onnxruntime",
        ) from error
    missing = [name for name, _ in requests if name not in session.get_providers()]
    if missing:
        raise OptionError(
            f"{missing[0]} did not start",
            expected=f"what did: {', '.join(session.get_providers())}",
            fix="look at ONNX Runtime's log, or ask for fewer providers",
        )
    if not allow_fallback:
        check_assignment(session, requests)
    return session


def keep_products_exact(options: Any) -> None:
    """Set the option that keeps sums of 8-bit products right where this processor's may overflow.

    int8 weights are made unsigned when the graph is loaded: slower, and right.
    """
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")


def _saving(data: str, external_from: int) -> dict[str, str]:
    return {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": data,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(external_from),
    }
