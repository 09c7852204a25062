"""Faults in what is bound to a graph or written to disk: the adapters and the graph are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from eptc import job, lower
from eptc.lower.weights import WeightTensor, derive
from eptc.lower.weights import join as sound
from eptc.passes import pack_projections
from eptc.passes.fold_transposes import FoldTransposes
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes
from eptc.tensors import ArrayTensor, LazyTensor

Array = np.ndarray[Any, Any]

O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741  # [64, 64], adapted
Q, K = (f"encoder.block.1.layer.0.SelfAttention.{x}.weight" for x in "qk")
K_AND_V = "+".join(f"bert.encoder.layer.0.attention.self.{x}.weight" for x in ("key", "value"))
BIAS = "bert.encoder.layer.0.attention.self.query.bias"


@pytest.fixture
def bind(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets other numbers be bound to one weight."""

    def plant(name: str, change: Callable[[Array, Mapping[str, LazyTensor]], Array]) -> None:
        sound = lower.bind

        def bind(graphs: Mapping[str, ir.Model], weights: Mapping[str, LazyTensor]) -> None:
            array = np.ascontiguousarray(change(weights[name].numpy(), weights), np.float32)
            assert array.shape == weights[name].shape
            assert not np.array_equal(array, weights[name].numpy())
            sound(graphs, {**weights, name: ArrayTensor(name, array)})

        monkeypatch.setattr(lower, "bind", bind)

    return plant


def nudged(array: Array, _: Any) -> Array:
    """One element, by a thousandth of the largest."""
    changed = array.copy()
    changed[-1, -1] += 1e-3 * np.abs(array).max()
    return changed


BOUND: dict[str, tuple[str, str, Callable[[Array, Mapping[str, LazyTensor]], Array]]] = {
    "weights exchanged": ("t5-tiny", Q, lambda _, weights: weights[K].numpy()),
    "weight reshaped": ("t5-tiny", Q, lambda w, _: w.T.reshape(w.shape)),
    "weight in bfloat16": ("t5-tiny", K, lambda w, _: w.astype(ml_dtypes.bfloat16)),
    "one element": ("t5-tiny", Q, nudged),
    "rows exchanged": ("llama-tiny", O, lambda w, _: w[np.r_[1, 0, 2 : len(w)]]),
    "rows beyond the crop lost": (
        "llama-tiny",
        O,
        lambda w, _: np.concatenate([w[:-1], 0 * w[-1:]]),
    ),
    "embedding off by one": ("t5-gated-tiny", "shared.weight", lambda w, _: np.roll(w, 1, 0)),
    "one element of a token that no probe has": ("t5-tiny", "shared.weight", nudged),
    "embedding in half precision": (
        "llama-tiny",
        "model.embed_tokens.weight",
        lambda w, _: w.astype(np.float16),
    ),
    "norm of another layer": (
        "t5-tiny",
        "encoder.final_layer_norm.weight",
        lambda _, weights: weights["decoder.final_layer_norm.weight"].numpy(),
    ),
    "position bias of the other stack": (
        "t5-tiny",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        lambda _, weights: weights[
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ].numpy(),
    ),
    "bias lost": ("bert", BIAS, lambda b, _: 0 * b),
}


@pytest.fixture
def subject(recorded: Any, paper: Any) -> Callable[[str], Any]:
    return lambda name: paper() if name == "bert" else recorded(name)


@pytest.mark.parametrize("what", BOUND)
def test_bound(subject: Any, refused: Any, bind: Any, what: str) -> None:
    name, weight, change = BOUND[what]
    bind(weight, change)
    assert f"the weight {weight} in the engine" in refused(subject(name), 0)


def test_base_weight_for_the_folded_one(recorded: Any, refused: Any, bind: Any) -> None:
    """One layer is dropped after all passes were right."""
    llama = recorded("llama-tiny")
    base = llama.read().model.weights[O].numpy()
    bind(O, lambda *_: base)
    assert f"the weight {O} in the engine is off" in refused(llama, 4)


def test_fold_of_another_task(recorded: Any, refused: Any, bind: Any) -> None:
    llama = recorded("llama-tiny")
    model = llama.read().model
    other = model.weights[O].numpy() + model.adapters[O.removesuffix(".weight")].delta(5)
    bind(O, lambda *_: other)
    assert f"the weight {O} in the engine is off" in refused(llama, 4)


def test_head_of_another_task(paper: Any, refused: Any, bind: Any) -> None:
    bert = paper()
    other = bert.read().model.heads["care"]["classifier.weight"].numpy()
    bind("classifier.weight", lambda *_: other)
    assert "the weight classifier.weight in the engine is not the base's" in refused(bert, "tone")


def test_head_of_another_task_in_the_reader(
    paper: Any, refused: Any, plant_in_reader: Any
) -> None:
    def exchange(model: Any) -> Any:
        heads = {**model.heads, "tone": model.heads["care"], "care": model.heads["tone"]}
        return model.replace(heads=heads)

    plant_in_reader(exchange)
    assert "the weight classifier." in refused(paper(), "tone")


def test_square_weight_bound_transposed(recorded: Any, refused: Any, bind: Any) -> None:
    """Stored either way round a weight is right; how it is used only the outputs can tell."""
    bind(O, lambda w, _: w.T)
    message = refused(recorded("llama-tiny"), 0)
    assert "output tensors differ" in message
    assert "the lowering is the first step" in message


def test_square_weight_not_transposed_with_its_node(
    recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = FoldTransposes.rewrite

    def rewrite(self: FoldTransposes, model: ir.Model) -> int:
        straight = model.graph.initializers[O].const_value
        folded = sound(self, model)
        model.graph.initializers[O].const_value = straight
        return folded

    monkeypatch.setattr(FoldTransposes, "rewrite", rewrite)
    message = refused(recorded("llama-tiny"), 0)
    assert "the pass fold-transposes is the first step" in message


def test_two_weights_renamed(recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = StableNames.rewrite

    def rewrite(self: StableNames, model: ir.Model) -> int:
        changed = sound(self, model)
        weights = model.graph.initializers
        if Q in weights:
            a, b = weights[Q], weights[K]
            a.const_value, b.const_value = b.const_value, a.const_value
        return changed

    monkeypatch.setattr(StableNames, "rewrite", rewrite)
    assert f"the weight {Q} in the engine" in refused(recorded("t5-tiny"), 0)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines be built with the passes that pack weights."""
    monkeypatch.setattr(job, "graph_passes", lambda *_: graph_passes("cuda"))


@pytest.mark.usefixtures("packed")
def test_packed_weights_are_sound(paper: Any, tmp_path: Path) -> None:
    built = paper().export(tmp_path / "out", "tone")
    names = ir.load(built.path / "model.onnx").graph.initializers
    assert K_AND_V in names


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("what", ["exchanged", "one element", "one too many", "renamed"])
def test_packed(paper: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A packed weight is compared part by part."""

    def join(tensors: Any, *, axis: int, name: str) -> WeightTensor:
        if what == "renamed":
            return sound(tensors, axis=axis, name=f"{name}+other")
        if what == "exchanged":
            return sound(tensors[::-1], axis=axis, name=name)
        if what == "one too many":
            return sound(tensors, axis=axis, name=f"{name}+classifier.weight")
        whole = sound(tensors, axis=axis, name=name)
        return derive(whole, "nudged", lambda array: nudged(array, None))

    monkeypatch.setattr(pack_projections, "join", join)
    message = refused(paper(), "tone")
    assert {
        "exchanged": "the weight bert.encoder.layer.0.attention.self.",
        "one element": "the weight bert.encoder.layer.0.attention.self.value.weight in the engine",
        "one too many": "columns: 34 + 34 + ",
        "renamed": "the reference has no such weight",
    }[what] in message


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that changes a folder right after its files were written."""

    def plant(change: Callable[[Path], None]) -> None:
        sound = lower.write

        def write(graphs: Any, directory: Path, **options: Any) -> dict[str, str]:
            sound(graphs, directory, **options)
            change(directory)
            return {}  # the manifest takes the damaged files for what they are

        monkeypatch.setattr(lower, "write", write)

    return plant


def place(directory: Path, name: str, file: str = "model.onnx") -> ir.ExternalTensor:
    tensor = ir.load(directory / file).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor


@pytest.mark.parametrize("name", [O, "lm_head.weight", "model.embed_tokens.weight"])
def test_one_bit_of_the_weights_file(recorded: Any, refused: Any, damage: Any, name: str) -> None:
    def flip(directory: Path) -> None:
        tensor = place(directory, name)
        assert tensor.offset is not None
        assert tensor.length is not None
        data = bytearray((directory / "weights.bin").read_bytes())
        # Little endian: the lowest bit of the exponent of the last number.
        data[tensor.offset + tensor.length - 2] ^= 0x80
        (directory / "weights.bin").write_bytes(bytes(data))

    damage(flip)
    assert f"the weight {name} in the engine" in refused(recorded("llama-tiny"), 0)


def test_two_weights_at_each_others_place(recorded: Any, refused: Any, damage: Any) -> None:
    def exchange(directory: Path) -> None:
        import onnx

        model = onnx.load(directory / "encoder.onnx", load_external_data=False)
        by_name = {tensor.name: tensor for tensor in model.graph.initializer}
        a, b = (by_name[name].external_data for name in (Q, K))
        a_entries, b_entries = (
            [(entry.key, entry.value) for entry in entries] for entries in (a, b)
        )
        for entries, others in ((a, b_entries), (b, a_entries)):
            for entry, (_, value) in zip(entries, others, strict=True):
                entry.value = value
        onnx.save(model, directory / "encoder.onnx")

    damage(exchange)
    assert f"the weight {Q} in the engine" in refused(recorded("t5-tiny"), 0)
