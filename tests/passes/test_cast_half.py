"""CastHalf: what it casts, what it keeps and why, and that each value is cast once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.errors import OptionError
from eptc.lower import bind, write
from eptc.lower.element_types import element_types
from eptc.lower.half import CACHES, HALF
from eptc.lower.strong_types import check_types
from eptc.lower.weights import WeightTensor
from eptc.passes.cast_half import CastHalf
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes
from eptc.run_passes import check_graph, run_graph_passes
from eptc.tensors import Array, ArrayTensor, unit_roundoff

Half = Literal["float16", "bfloat16"]
DTYPES: tuple[Half, Half] = ("float16", "bfloat16")
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOWEST = float(np.finfo(np.float32).min)
CONSTANTS = (
    f"float zero = {{0}}, float lowest = {{{LOWEST!r}}}, float half = {{0.5}}, "
    "float eps = {0.000000000001}, float two = {2}, int64[1] last = {-1}, int64[1] first = {0}, "
    "float big = {1e30}"
)
NORM = (
    "p = Pow(h, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) d = Div(h, r) "
    "n = Mul(d, g)"
)

# Body; names of nodes that compute in float32; pieces of the reasons, in order of the names.
KEEPS: dict[str, tuple[str, dict[str, str]]] = {
    "nothing": ("h = MatMul(x, W) y = Relu(h)", {}),
    "logits": (
        "h = MatMul(x, W) i = MatMul(h, V) logits = Add(i, b)",
        {"MatMul_1": "the logits", "Add": "the logits"},
    ),
    "a norm": (
        f"h = MatMul(x, W) {NORM} y = MatMul(n, V)",
        dict.fromkeys(("Add", "Div", "Mul", "Pow", "ReduceMean", "Sqrt"), "a norm"),
    ),
    "a norm of products": (
        "h = MatMul(x, W) p = Mul(h, h) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) "
        "y = Div(h, r)",
        dict.fromkeys(("Add", "Div", "Mul", "ReduceMean", "Sqrt"), "a norm"),
    ),
    "the residual beside a norm": (
        f"h = MatMul(x, W) {NORM} o = MatMul(n, V) y = Add(h, o)",
        dict.fromkeys(("Add", "Div", "Mul", "Pow", "ReduceMean", "Sqrt"), "a norm"),
    ),
    "LayerNormalization computes in float32 itself": (
        "h = MatMul(x, W) y = LayerNormalization(h, g, b)",
        {},
    ),
    "softmax and a mask": (
        "h = MatMul(x, W) c = Cast <to = 9> (ids) w = Where(c, zero, lowest) s = Add(h, w) "
        "t = Softmax(s) y = MatMul(t, V)",
        {"Where": "a constant beyond", "Add": "a mask", "Softmax": "softmax"},
    ),
    "angles": (
        "f = Cast <to = 1> (ids) u = Mul(f, half) c = Cos(u) h = MatMul(x, W) y = Mul(h, c)",
        dict.fromkeys(("Cast", "Mul", "Cos"), "angles"),
    ),
    "T5's wo": (
        "h = MatMul(x, W) r = Relu(h) o = MatMul(r, wo) y = Add(o, x)",
        {"Relu": "it feeds T5's wo", "MatMul_1": "T5's wo"},
    ),
    "a constant too small": ("h = MatMul(x, W) y = Add(h, eps)", {"Add": "too small"}),
    "a constant too large": ("h = MatMul(x, W) y = Relu(h) z = Mul(h, big)", {"Mul": "beyond"}),
    "no kernel": ("h = MatMul(x, W) y = Floor(h)", {"Floor": "Floor has no 16-bit kernel"}),
    "a graph in a node": (
        "h = MatMul(x, W) k = Relu(x) c = Cast <to = 9> (ids) "
        "t = If (c) <then_branch = t () => (float[n,4] u) { u = Relu(k) }, "
        "else_branch = e () => (float[n,4] v) { v = Identity(k) }> y = Add(h, t)",
        {"If": "graph of its own", "Relu": "a graph inside a node reads it"},
    ),
    "what is moved between": (
        "h = MatMul(x, W) s = Softmax(h) t = Transpose(s) u = Identity(t) y = Floor(u)",
        {
            "Softmax": "softmax", "Transpose": "it moves", "Identity": "it moves",
            "Floor": "no 16-bit",
        },
    ),
}  # fmt: skip


def model(body: str, inputs: str = "float[n,4] x, int64 ids") -> ir.Model:
    """Parse a graph of weights W, V and wo [4, 4], g and b [4]; bound, its types inferred."""
    names = [name for name in ("y", "z", "logits", "present.0.key") if f"{name} = " in body]
    opsets = 'opset_import: ["" : 20, "com.microsoft" : 1]'
    text = (
        (
            f"<ir_version: 10, {opsets}> g ({inputs}, float[4,4] W, float[4,4] V, float[4,4] wo, "
            f"float[4] g, float[4] b) => ({', '.join(f'float[] {name}' for name in names)}) "
            f"<{CONSTANTS}> {{ {body} }}"
        )
        .replace("present.0.key", "present_0")
        .replace("past_key_values.0.key", "past_0")
    )
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    found = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    weights = {}
    for value in tuple(found.graph.inputs):
        if value.name in ("W", "V", "wo", "g", "b"):
            found.graph.inputs.remove(value)
            if value.uses():
                value.name = "a.wo.weight" if value.name == "wo" else value.name
                found.graph.initializers.add(value)
                weights[str(value.name)] = weight(str(value.name), value)
    for value in (*found.graph.inputs, *found.graph.outputs):
        if value.shape is None:  # made by an operator that onnx does not know
            value.shape = ir.Shape(["a", "b", "c"])
        value.name = {"present_0": "present.0.key", "past_0": "past_key_values.0.key"}.get(
            str(value.name), value.name
        )
    bind({"model": found}, weights)
    StableNames()(found)
    return found


def weight(name: str, value: ir.Value) -> ArrayTensor:
    assert value.shape is not None
    rng = np.random.default_rng(len(name) + ord(name[0]))
    return ArrayTensor(name, rng.normal(size=value.shape.numpy(), scale=0.5).astype(np.float32))


def casts_of_values(m: ir.Model) -> list[str]:
    """Return every cast as `value -> type`, weights left out."""
    return [
        f"{node.inputs[0].name} -> {node.outputs[0].dtype}"
        for node in m.graph
        if node.op_type == "Cast" and node.inputs[0] is not None
        and not node.inputs[0].is_initializer()
    ]  # fmt: skip


def convert(m: ir.Model, step: CastHalf) -> ir.Model:
    run_graph_passes({"model": m}, [step])
    return m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "kept"), KEEPS.values(), ids=KEEPS)
def test_keeps(body: str, kept: dict[str, str], dtype: Half) -> None:
    """The plan names what stays and why; the graph does what the plan says."""
    if dtype == "bfloat16" and any(part in body for part in ("r, wo)", "h, eps)", "big)")):
        kept = {}  # it reaches as far as float32
    m = model(body)
    step = CastHalf(dtype)
    plan = step.plan(m)
    assert list(plan) == sorted(kept)
    for name, reason in kept.items():
        assert reason in plan[name]
    interface = [(v.name, str(v.shape), v.dtype) for v in (*m.graph.inputs, *m.graph.outputs)]
    nodes = {node.name for node in m.graph}
    convert(m, step)
    half = ir.DataType[dtype.upper()]
    for node in m.graph:
        if node.name in nodes and node.op_type not in ("Cast", "If"):
            types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
            assert (half in types) is (node.name not in plan), node
            assert not {half, ir.DataType.FLOAT} <= types, node
    assert [
        (v.name, str(v.shape), v.dtype) for v in (*m.graph.inputs, *m.graph.outputs)
    ] == interface


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "kept"), KEEPS.values(), ids=KEEPS)
def test_casts_once(body: str, kept: dict[str, str], dtype: Half) -> None:
    """Each value is cast at most once, no cast undoes the one before, a second run is a no-op."""
    del kept
    m = convert(model(body), CastHalf(dtype))
    casts = casts_of_values(m)
    assert len(casts) == len(set(casts))
    floats = (ir.DataType.FLOAT, ir.DataType[dtype.upper()])
    for node in m.graph:
        maker = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if node.op_type == "Cast" and maker is not None and maker.op_type == "Cast":
            assert maker.inputs[0] is not None
            assert maker.inputs[0].dtype not in floats
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    assert not CastHalf(dtype)(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before


def test_count_of_casts() -> None:
    """One cast for two readers; none between nodes of one type; scalars have a form of each."""
    body = (
        "h = MatMul(x, W) s = Softmax(h) t = Mul(s, half) i = MatMul(t, V) j = Mul(i, half) "
        "k = MatMul(x, V) l = Add(j, k) y = Floor(l) z = Floor(l)"
    )
    m = convert(model(body), CastHalf())
    assert sorted(casts_of_values(m)) == [
        "Add -> FLOAT", "MatMul -> FLOAT", "Softmax -> FLOAT16", "x -> FLOAT16",
    ]  # fmt: skip
    numbers = [v.dtype for v in m.graph.initializers.values() if v.const_value and not v.shape]
    assert numbers == [ir.DataType.FLOAT16]


CACHED = (
    "h = MatMul(x, W) present.0.key = Concat <axis = 0> (past_key_values.0.key, h) y = Relu(h)"
)
CACHE_INPUTS = "float[n,4] x, int64 ids, float[p,4] past_key_values.0.key"


@pytest.mark.parametrize(
    ("ranges", "dtype", "wanted"),
    [
        ({}, "float16", "FLOAT16"),
        ({"past_key_values.0.key": 1e5}, "float16", "FLOAT"),
        ({"present.0.key": 1e5}, "float16", "FLOAT"),
        ({"present.0.key": 1e5}, "bfloat16", "BFLOAT16"),
    ],
)
def test_cache(ranges: dict[str, float], dtype: Half, wanted: str) -> None:
    """A cache is 16 bits wide on both sides, or on neither; nothing casts it on the way."""
    m = model(CACHED, CACHE_INPUTS)
    step = CastHalf(dtype, ranges)
    plan = step.plan(m)
    convert(m, step)
    types = {str(v.name): v.dtype for v in (*m.graph.inputs, *m.graph.outputs)}
    assert {types["past_key_values.0.key"], types["present.0.key"]} == {ir.DataType[wanted]}
    assert types["x"] == types["y"] == ir.DataType.FLOAT
    assert ("past_key_values.0.key" in plan) is ("present.0.key" in plan) is (wanted == "FLOAT")
    assert not any("0.key" in cast for cast in casts_of_values(m))


@pytest.mark.parametrize(
    ("magnitude", "safety", "kept"),
    [(8188.0, 8.0, False), (8189.0, 8.0, True), (8189.0, 7, False)],
)
def test_ranges(magnitude: float, safety: float, kept: bool) -> None:
    """What reaches too far is made and read in float32; its other neighbours are not."""
    body = "h = MatMul(x, W) r = Relu(h) i = MatMul(r, V) y = Relu(i)"
    step = CastHalf(ranges={"Relu": magnitude}, safety=safety)
    plan = step.plan(model(body))
    assert list(plan) == (["MatMul_1", "Relu"] if kept else [])
    assert all("Relu reaches 8.19e+03; 8 times that" in reason for reason in plan.values())
    assert CastHalf("bfloat16", {"Relu": 1e30}).plan(model(body)) == {}
    assert list(CastHalf(ranges={"Relu": np.inf}).plan(model(body))) == ["MatMul_1", "Relu"]


def test_keep() -> None:
    """A kept parameter stays as it is, with what reads it; so does a part of a packed one."""
    for keep, name in (("W", "W"), ("W", "q+W")):
        m = model("h = MatMul(x, W) y = MatMul(h, V)")
        found = m.graph.initializers["W"]
        found.name = name
        before = found.const_value
        step = CastHalf(keep=(keep,))
        assert step.plan(m) == {"MatMul": f"{name} is kept as asked", name: "kept as asked"}
        convert(m, step)
        assert found.const_value is before
        assert found.dtype == ir.DataType.FLOAT
        assert m.graph.initializers["V"].dtype == ir.DataType.FLOAT16


def run(m: ir.Model, folder: Path, feeds: dict[str, Array]) -> list[Array]:
    folder.mkdir()
    write({"model": m}, folder)
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return [np.asarray(array) for array in session.run(None, feeds)]


MASKS = {
    "softmax": (
        "s = Add(x, w) t = Softmax(s) y = MatMul(t, V)",
        {"Where": "FLOAT", "Softmax": "FLOAT"},
    ),
    "an attention kernel": (
        "h = MatMul(x, W) q = Unsqueeze(h, first) u = Unsqueeze(w, first) "
        "k = Unsqueeze(u, first) "
        "y = com.microsoft.MultiHeadAttention <num_heads = 1> (q, q, q, none, none, k)",
        {"MultiHeadAttention": "FLOAT16", "Clip": "FLOAT"},
    ),
}


@pytest.mark.parametrize(("body", "types"), MASKS.values(), ids=MASKS)
def test_masks_stay_finite(body: str, types: dict[str, str], tmp_path: Path) -> None:
    """The lowest float32 does not become -inf, not even in a row that sees nothing."""
    body = f"c = Cast <to = 9> (seen) w = Where(c, zero, lowest) {body}"
    inputs = "float[4,4] x, int64[4,4] seen"
    exact, half = (model(body.replace(", none, none", ", , "), inputs) for _ in range(2))
    convert(half, CastHalf(ranges={"Where": -LOWEST, "Add": -LOWEST}))
    found = {node.op_type: str(node.outputs[0].dtype) for node in half.graph}
    assert found | types == found
    seen = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32), "seen": seen}
    (want,), (got,) = run(exact, tmp_path / "exact", feeds), run(half, tmp_path / "half", feeds)
    assert np.isfinite(got).all()
    sees = seen.any(axis=1)
    got, want = (array.reshape(4, 4)[sees] for array in (got, want))
    assert got == pytest.approx(want, rel=0, abs=4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_once(dtype: Half, tmp_path: Path) -> None:
    """From float64 where they come from it: by way of float32 some would be rounded twice."""
    half = TYPES[dtype]
    step = 2 * unit_roundoff(dtype)
    # A little above half way between two numbers, by less than float32 can tell.
    exact = np.full((4, 4), 1 + step / 2 + 2.0**-40)
    m = model("y = MatMul(x, W)")
    bind_again = {"W": ArrayTensor("W", exact)}
    m.graph.initializers["W"].const_value = None
    bind({"model": m}, bind_again)
    convert(m, CastHalf(dtype))
    tensor = m.graph.initializers["W"].const_value
    assert tensor is not None
    assert tensor.dtype == ir.DataType[dtype.upper()]
    assert (tensor.numpy().astype(np.float64) == 1 + step).all()
    assert (exact.astype(np.float32).astype(half).astype(np.float64) == 1).all()
    write({"model": m}, tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size > 32


def test_weights_that_float32_reads() -> None:
    """Matrices are stored in 16 bits all the same, small vectors as they are; one cast each."""
    m = convert(model("h = MatMul(x, W) i = MatMul(h, V) logits = Add(i, b)"), CastHalf())
    types = {str(v.name): str(v.dtype) for v in m.graph.initializers.values() if v.shape}
    assert {name: types[name] for name in "WVb"} == {"W": "FLOAT16", "V": "FLOAT16", "b": "FLOAT"}
    casts = [n.inputs[0].name for n in m.graph if n.op_type == "Cast" and n.inputs[0] is not None]
    assert casts.count("V") == 1


# What a weight that float16 cannot hold keeps in float32: body, the weight, nodes.
FAR = {
    "a product": ("h = MatMul(x, V) i = MatMul(h, W) y = Relu(i)", "W", ["MatMul_1"]),
    "a norm's scale": (
        "h = MatMul(x, V) y = LayerNormalization(h, g)",
        "g",
        ["LayerNormalization"],
    ),
    "what is moved and added first": (
        "h = MatMul(x, V) e = Gather(W, ids) s = Squeeze(e) i = Add(h, s) j = Mul(i, h) "
        "y = Relu(j)",
        "W",
        ["Add", "Gather", "Mul", "Squeeze"],
    ),
}


@pytest.mark.parametrize("what", FAR)
def test_weight_that_stays(what: str, tmp_path: Path) -> None:
    """A weight beyond float16 and what computes with it; what is made of that is cast again."""
    body, name, kept = FAR[what]
    exact, half = model(body), model(body)
    for m in (exact, half):
        value = m.graph.initializers[name]
        assert value.shape is not None
        numbers = np.full(value.shape.numpy(), 0.5, np.float32)
        numbers.flat[-1] = 7e4
        value.const_value = None
        bind({"model": m}, {name: ArrayTensor(name, numbers)})
    step = CastHalf(ranges={name: 7e4})
    plan = step.plan(half)
    assert plan.pop(name) == "numbers up to 7e+04, beyond 65504"
    assert plan == dict.fromkeys(kept, f"{name} has numbers up to 7e+04, beyond 65504")
    convert(half, step)
    types = {node.name: node.outputs[0].dtype for node in half.graph if node.op_type != "Cast"}
    assert {n for n, dtype in types.items() if dtype == ir.DataType.FLOAT} == set(kept)
    x = np.random.default_rng(0).normal(size=(3, 4), scale=1e-2).astype(np.float32)
    feeds = {"x": x, "ids": np.array(3)}
    given = {str(v.name): feeds[str(v.name)] for v in half.graph.inputs}
    (want,), (got,) = run(exact, tmp_path / "exact", given), run(half, tmp_path / "half", given)
    assert got == pytest.approx(want, rel=0, abs=2e-3 * float(np.abs(want).max()))


def test_weight_beyond_float16() -> None:
    """Where nothing is known of it, it is named when it is written: no infinity in silence."""
    m = model("y = MatMul(x, W)")
    m.graph.initializers["W"].const_value = None
    bind({"model": m}, {"W": ArrayTensor("W", np.full((4, 4), 7e4, np.float32))})
    CastHalf()(m)
    tensor = m.graph.initializers["W"].const_value
    assert tensor is not None
    with pytest.raises(OptionError, match="W has numbers beyond 65504") as raised:
        tensor.numpy()
    assert "keep W" in str(raised.value)


def test_stays_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(KEEPS["the residual beside a norm"][0])
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert CastHalf()(m).modified


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes(dtype: Half, tmp_path: Path) -> None:
    """Two conversions of the same graph are equal to the byte."""
    files = []
    for name in ("first", "second"):
        m = model(KEEPS["softmax and a mask"][0])
        run_graph_passes({"model": m}, [CastHalf(dtype), StableNames()])
        (tmp_path / name).mkdir()
        write({"model": m}, tmp_path / name)
        files.append([(tmp_path / name / f).read_bytes() for f in ("model.onnx", "weights.bin")])
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_leaves_converted_graphs(dtype: Half, caplog: pytest.LogCaptureFixture) -> None:
    m = convert(model("h = MatMul(x, W) s = Softmax(h) y = MatMul(s, V)"), CastHalf(dtype))
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.cast_half"):
        assert not CastHalf(dtype)(m).modified
    assert f"it has {dtype} already" in caplog.text
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before


def test_leaves_what_callers_set() -> None:
    """A weight that is an input too keeps its type; what reads it casts."""
    m = model("h = MatMul(x, W) y = MatMul(h, V)")
    m.graph.inputs.append(m.graph.initializers["W"])
    assert "a caller" in CastHalf().plan(m)["W"]
    CastHalf()(m)
    check_graph(m)
    assert m.graph.initializers["W"].dtype == ir.DataType.FLOAT


def test_says_what_it_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "eptc.passes.cast_half"):
        CastHalf()(model("h = MatMul(x, W) y = Softmax(h)"))
    assert "cast-half: left Softmax alone: softmax" in caplog.text


def test_options() -> None:
    """Only ranges that matter are recorded, and the recorded options make the same plan."""
    ranges = {"Relu": 9000.0, "MatMul": 3.0}
    step = CastHalf(ranges=ranges, keep=["V"])
    assert step.options() == {
        "dtype": "float16", "ranges": {"Relu": 9000.0}, "safety": 8.0, "keep": ["V"],
        "small": [],
    }  # fmt: skip
    again = CastHalf(**json.loads(json.dumps(step.options())))
    m = model("h = MatMul(x, W) r = Relu(h) y = MatMul(r, V)")
    assert again.plan(m) == step.plan(m)
    assert CastHalf("bfloat16", ranges).options()["ranges"] == {}
    with pytest.raises(OptionError, match="float8"):
        CastHalf("float8")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"safety factor is 0\.5"):
        CastHalf(safety=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "t5", "gated-t5", "llama"])
def test_strongly_typed(name: str, dtype: Half, whole_model: Any, tmp_path: Path) -> None:
    """Standard operators, every type in the file as it was written, casts as nodes alone.

    Caches are 16 bits, logits and what an encoder gives are float32; T5's `wo`, norms that are
    written out, softmax and logits compute in float32, each with its reason.
    """
    graphs = whole_model(name)
    run_graph_passes(graphs, [*graph_passes("any"), CastHalf(dtype), StableNames()])
    plans = {key: CastHalf(dtype).plan(model) for key, model in _exact(whole_model, name).items()}
    write(graphs, tmp_path)
    for key in graphs:
        model = ir.load(tmp_path / f"{key}.onnx")
        check_types(model)
        types = element_types(model)
        assert {node.domain for node in model.graph} == {""}
        assert all(value in types for node in model.graph for value in node.outputs)
        half = {types[v] for node in model.graph for v in node.outputs if node.op_type == "MatMul"}
        assert HALF[dtype] in half
        for value in (*model.graph.inputs, *model.graph.outputs):
            cached = str(value.name).startswith(CACHES)
            if value.dtype not in (ir.DataType.INT64, ir.DataType.BOOL):
                assert value.dtype == (HALF[dtype] if cached else ir.DataType.FLOAT), value.name
        for node in model.graph:
            if node.op_type in ("Softmax", "ReduceMean", "Pow"):
                assert types[node.outputs[0]] == ir.DataType.FLOAT, node.name
    reasons = {reason for plan in plans.values() for reason in plan.values()}
    assert "softmax: its sum has many small terms" in reasons
    assert "the logits" in reasons
    if dtype == "float16" and "t5" in name:
        assert any(reason.startswith("T5's wo") for reason in reasons)


def _exact(whole_model: Any, name: str) -> dict[str, ir.Model]:
    graphs: dict[str, ir.Model] = whole_model(name)
    run_graph_passes(graphs, graph_passes("any"))
    return graphs
