"""Arrays in and out by DLPack. What a CPU can show of it: shared memory, lifetimes, refusals."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from eptc.errors import InputError, OptionError
from eptc.runtime import Engine
from eptc.runtime.device_arrays import DeviceArray, check_uncaptured, shared
from eptc.runtime.spec import GraphSpec, TensorSpec

pytestmark = pytest.mark.skipif(
    not hasattr(onnxruntime.OrtValue, "from_dlpack"),
    reason=f"needs an ONNX Runtime that speaks DLPack; this is {onnxruntime.__version__}",
)

IDS = torch.tensor([[4, 9, 5, 0], [7, 8, 0, 0]])
FEEDS = {
    "input_ids": IDS,
    "attention_mask": (IDS != 0).long(),
    "token_type_ids": torch.zeros_like(IDS),
}


@pytest.fixture
def engine(classifier: Any) -> Any:
    with Engine.load(classifier.path, ["cpu"]) as engine:
        yield engine


def test_the_same_answers_as_numpy(engine: Engine) -> None:
    expected = engine.run({name: tensor.numpy() for name, tensor in FEEDS.items()})
    found = engine.run_device(FEEDS)
    assert list(found) == ["logits"]
    logits = found["logits"]
    assert (logits.shape, logits.dtype, logits.device) == ((2, 3), "float32", "cpu")
    np.testing.assert_array_equal(from_dlpack(logits).numpy(), expected["logits"])
    np.testing.assert_array_equal(np.from_dlpack(logits), expected["logits"])
    np.testing.assert_array_equal(np.asarray(logits), expected["logits"])
    assert np.array(logits, dtype=np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(logits, copy=True), logits.numpy())
    assert repr(logits) == "<DeviceArray float32 [2, 3] on cpu>"
    mixed = engine.run_device({**FEEDS, "attention_mask": FEEDS["attention_mask"].numpy()})
    np.testing.assert_array_equal(np.asarray(mixed["logits"]), expected["logits"])


def test_nothing_is_copied(engine: Engine) -> None:
    """What the engine reads and what it gives is the memory of the other side."""
    spec = engine.manifest.graphs["model"]
    values = shared(FEEDS, "model", spec, ("cpu", 0), None)
    assert {name: value.data_ptr() for name, value in values.items()} == {
        name: tensor.data_ptr() for name, tensor in FEEDS.items()
    }
    logits = engine.run_device(FEEDS)["logits"]
    assert from_dlpack(logits).data_ptr() == logits.numpy().ctypes.data
    with pytest.raises(BufferError, match="never copied"):
        logits.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="never copied"):
        logits.__dlpack__(dl_device=(2, 0))


def test_not_beside_what_is_captured(engine: Engine) -> None:
    """Capture itself needs a GPU; what is refused there is refused before anything runs."""
    graph = engine._graphs["model"]
    check_uncaptured(graph)
    captured = copy.copy(graph)
    captured.captures = True
    engine._graphs["model"] = captured
    with pytest.raises(OptionError, match="a replay may write over its arrays") as refusal:
        engine.run_device(FEEDS)
    assert "call fixed" in str(refusal.value)


def test_feeds_may_go_once_they_are_given() -> None:
    """ONNX Runtime holds on to what it was given: the caller's last reference may go."""
    spec = GraphSpec("", (TensorSpec("x", "int64", ("n",)),), ())

    def given() -> Any:
        return shared({"x": torch.full((200_000,), 5)}, "model", spec, ("cpu", 0), None)["x"]

    value = given()
    gc.collect()
    others = [torch.full((200_000,), 3) for _ in range(8)]
    assert (value.numpy() == 5).all()
    del others


def test_what_numpy_does_not_have() -> None:
    """A cache in bfloat16: its numbers are not looked at."""
    spec = GraphSpec("", (TensorSpec("x", "bfloat16", ("n",)),), ())
    given = torch.ones(3, dtype=torch.bfloat16)
    found = shared({"x": given}, "model", spec, ("cpu", 0), None)["x"]
    assert (found.data_ptr(), found.shape()) == (given.data_ptr(), [3])


def test_outputs_outlive_the_engine(classifier: Any) -> None:
    engine = Engine.load(classifier.path, ["cpu"], threads=1)
    logits = from_dlpack(engine.run_device(FEEDS)["logits"])
    expected = logits.clone()
    engine.close()
    del engine
    gc.collect()
    with Engine.load(classifier.path, ["cpu"], threads=1) as other:
        kept = [other.run_device(FEEDS) for _ in range(20)]
    assert torch.equal(logits, expected)
    del kept


def test_outputs_of_two_runs_are_two(engine: Engine) -> None:
    first = engine.run_device(FEEDS)["logits"]
    before = np.array(first)
    engine.run_device({**FEEDS, "input_ids": IDS.flip(0).contiguous()})
    np.testing.assert_array_equal(np.asarray(first), before)


def test_an_output_is_the_next_input(lowered_t5: Any) -> None:
    """What the encoder leaves on the device goes into the decoder as it is."""
    ids = torch.tensor([[5, 9, 4, 1]])
    mask = torch.ones_like(ids)
    with Engine.load(lowered_t5.path, ["cpu"]) as engine:
        feeds = {"input_ids": ids, "attention_mask": mask}
        encoded = engine.run_device(feeds, "encoder")
        plain = engine.run({k: v.numpy() for k, v in feeds.items()}, "encoder")
        step: dict[str, Any] = {
            "input_ids": torch.zeros((1, 1), dtype=torch.int64), "encoder_attention_mask": mask,
        }  # fmt: skip
        expected = {
            "input_ids": np.zeros((1, 1), np.int64),
            "encoder_attention_mask": mask.numpy(),
        }
        for i in range(2):
            for what in ("key", "value"):
                past = f"past_key_values.{i}.decoder.{what}"
                step[past] = torch.zeros((1, 3, 0, 12))
                expected[past] = np.zeros((1, 3, 0, 12), np.float32)
                cross = f"past_key_values.{i}.encoder.{what}"
                step[cross] = encoded[f"present.{i}.encoder.{what}"]
                assert isinstance(step[cross], DeviceArray)
                expected[cross] = plain[f"present.{i}.encoder.{what}"]
        found = engine.run_device(step, "decoder")
        wanted = engine.run(expected, "decoder")
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def test_from_several_threads(engine: Engine) -> None:
    expected = np.asarray(engine.run_device(FEEDS)["logits"])
    wrong: list[Any] = []

    def ask() -> None:
        for _ in range(50):
            found = np.asarray(engine.run_device(FEEDS)["logits"])
            if not np.array_equal(found, expected):
                wrong.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Elsewhere:
    """An array of another device, as far as anything may look before it refuses."""

    def __init__(self, kind: int, number: int) -> None:
        self._device = (kind, number)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("it is refused before it is asked")


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "int32": (lambda: {"input_ids": IDS.int()}, "has dtype int32", "not converted"),
    "float": (lambda: {"input_ids": IDS.float()}, "has dtype float32", ".to(torch.int64)"),
    "bool": (lambda: {"attention_mask": IDS != 0}, "cannot be shared", "int64"),
    "complex": (
        lambda: {"input_ids": torch.zeros((2, 4), dtype=torch.complex64)},
        "cannot be shared by DLPack", "contiguous int64",
    ),
    "not contiguous": (
        lambda: {"input_ids": IDS.repeat(2, 2)[::2, ::2]}, "cannot be shared", ".contiguous()",
    ),
    "with a gradient": (
        lambda: {"input_ids": torch.ones((2, 4), requires_grad=True)}, "gradient", ".detach()",
    ),
    "a list": (lambda: {"input_ids": [[1, 2]]}, "is a list", "__dlpack__"),
    "another device": (
        lambda: {"input_ids": Elsewhere(2, 1)}, "on CUDA device 1", "the engine runs on the CPU",
    ),
    "a strange device": (lambda: {"input_ids": Elsewhere(8, 0)}, "DLPack's device (8, 0)", "CPU"),
    "missing": (lambda: {"input_ids": None}, "is a NoneType", "DLPack"),
    "unknown": (lambda: {"x": IDS}, "the unknown input 'x'", "input_ids"),
    "ranks": (lambda: {"input_ids": IDS[0].contiguous()}, "has shape [4]", "[batch, sequence]"),
    "sizes": (lambda: {"input_ids": IDS[:1].contiguous()}, "batch is 2", "1, as in"),
    "negative": (lambda: {"input_ids": IDS - 1}, "the negative value -1", ""),
    "vocabulary": (lambda: {"input_ids": IDS + 5000}, "the token 5009", "ids below"),
}  # fmt: skip


@pytest.mark.parametrize(("feeds", "found", "rest"), REFUSED.values(), ids=REFUSED)
def test_refused(
    engine: Engine, feeds: Callable[[], dict[str, Any]], found: str, rest: str
) -> None:
    with pytest.raises(InputError) as refusal:
        engine.run_device({**FEEDS, **feeds()})
    assert found in refusal.value.found
    assert rest in str(refusal.value)
    engine.run_device(FEEDS)


CUDA_DEVICES = {
    "its own": ((2, 1), None),
    "managed": ((13, 1), None),
    "another": ((2, 0), "the engine runs on CUDA device 1"),
    "ROCm's": ((10, 1), "DLPack's device"),
}


@pytest.mark.parametrize(("place", "reason"), CUDA_DEVICES.values(), ids=CUDA_DEVICES)
def test_devices_of_a_cuda_engine(place: tuple[int, int], reason: str | None) -> None:
    """Only what is on the engine's own GPU is asked for its memory."""
    spec = GraphSpec("", (TensorSpec("x", "int64", ("n",)),), ())
    wanted = AssertionError if reason is None else InputError
    with pytest.raises(wanted, match=reason):
        shared({"x": Elsewhere(*place)}, "model", spec, ("cuda", 1), None)
