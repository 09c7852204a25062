"""The gate that verifies block by block: sound bundles pass, faults are found where they are.

A fault is planted in a written bundle, whatever wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import safetensors.numpy

from eptc import bundle, lower, text
from eptc.errors import ParityError
from eptc.parity_gate import ParityReport, prove, refuse
from eptc.parity_gate.reference import load_reference
from eptc.runtime import Engine
from eptc.runtime.manifest import read_manifest
from eptc.runtime.seal import sealed

Graphs = dict[str, ir.Model]
Change = Callable[[Graphs], None]

NAMES = ("llama-tiny", "t5-tiny", "t5-gated-tiny", "bert", "roberta")


@pytest.fixture(scope="module")
def subject(recorded: Any, paper: Any, roberta: Any) -> Callable[[str], Any]:
    return lambda name: {"bert": paper, "roberta": roberta}.get(name, lambda: recorded(name))()


@pytest.fixture(scope="module")
def written(subject: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the sound bundle of a subject's first task."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("blocks") / name
            made[name] = subject(name).export(out, 0, verify=False).path
        return made[name]

    return write


@pytest.fixture
def check(subject: Any, prove_by_block: Any) -> Callable[..., ParityReport]:
    """Return a function that verifies a folder against a subject, or its name, block by block."""
    return lambda of, directory, **more: prove_by_block(
        subject(of) if isinstance(of, str) else of, directory, **more
    )


@pytest.mark.parametrize("name", NAMES)
def test_sound_as_whole_models_are(subject: Any, written: Any, check: Any, name: str) -> None:
    report = check(name, written(name))
    refuse(report, "nothing is wrong with it")
    summary = report.summary()
    assert summary["mode"] == "block by block"
    assert summary["flips"] == 0
    source = subject(name).read()
    reference = load_reference(source)
    blocks = [
        f"{path}.{i}"
        for path in ("model.layers", "encoder.block", "decoder.block", f"{name}.encoder.layer")
        for i in range(3)
        if f"{path}.{i}." in " ".join(dict(reference.hf.named_parameters()))
    ]
    assert len(blocks) >= (1 if name in ("bert", "roberta") else 2)
    compared = {c["what"].split(",")[0] for c in report.to_json()["tensors"]}
    assert compared.issuperset(blocks)
    tokenizer = text.find_tokenizer(source.path, source.base.path)
    with Engine.load(written(name), providers=["cpu"], threads=1) as engine:
        assert prove(written(name), engine, reference, 0, tokenizer).passed
    # Not two ways to the same numbers that share a mistake: no comparison is trivially exact.
    assert any(0 < c.error < 0.2 * c.bound for c in report.tensors)


def test_cache_is_filled_in_pieces(written: Any, check: Any) -> None:
    report = check("llama-tiny", written("llama-tiny"))
    ways = {c.what.split(",")[1].strip() for c in report.tensors}
    assert ways == {"at once", "in pieces"} | (ways - {"at once", "in pieces"})
    at_once = [c.what.replace("at once", "in pieces") for c in report.tensors if "once" in c.what]
    assert set(at_once) == {c.what for c in report.tensors if "in pieces" in c.what}


def test_text_of_the_caller(written: Any, check: Any) -> None:
    examples = [{"sentence": f"text {i} of mine"} for i in range(10)]
    report = check("llama-tiny", written("llama-tiny"), examples=examples)
    assert report.passed
    names = [probe["name"] for probe in report.probes if not probe["synthetic"]]
    assert names == ["shortest and longest together", "texts 0 to 7", "texts 8 to 9"]


# Changing a graph. Nodes are called `<module path>/<operator>`.


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def nodes(model: ir.Model, op: str, module: str) -> list[ir.Node]:
    found = [n for n in model.graph if n.op_type == op and (n.name or "").startswith(module)]
    assert found, f"no {op} in {module!r}"
    return found


def given(of: ir.Node, index: int) -> ir.Value:
    value = of.inputs[index]
    assert value is not None
    return value


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads one value read another."""
    for reader, index in tuple(old.uses()):
        reader.replace_input_with(index, new)


def exchange(a: ir.Value, b: ir.Value) -> None:
    of_a, of_b = tuple(a.uses()), tuple(b.uses())
    for reader, index in of_a:
        reader.replace_input_with(index, b)
    for reader, index in of_b:
        reader.replace_input_with(index, a)


def constant(model: ir.Model, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=f"planted.{len(model.graph.initializers)}")
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def epsilon(graph: str, module: str) -> Change:
    """Another epsilon in the norm of a module."""

    def change(graphs: Graphs) -> None:
        model = graphs[graph]
        norm = [n for n in model.graph if (n.name or "").startswith(module)]
        fused = [n for n in norm if "epsilon" in n.attributes]
        for place in fused:
            place.attributes["epsilon"] = ir.AttrFloat32("epsilon", 3e-3)
        for add in [] if fused else nodes(model, "Add", module):
            add.replace_input_with(1, constant(model, np.float32(3e-3)))

    return change


def uses_exchanged(graph: str, a: str, b: str) -> Change:
    """Two weights that are right, each read in the place of the other."""
    return lambda graphs: exchange(*(graphs[graph].graph.initializers[n] for n in (a, b)))


def bypassed(graph: str, op: str, module: str, index: int, position: int = 0) -> Change:
    """A node that hands on one of its inputs."""

    def change(graphs: Graphs) -> None:
        place = nodes(graphs[graph], op, module)[position]
        redirect(place.outputs[0], given(place, index))

    return change


def inputs_exchanged(graph: str, a: str, b: str) -> Change:
    def change(graphs: Graphs) -> None:
        ports = {v.name: v for v in graphs[graph].graph.inputs}
        exchange(ports[a], ports[b])

    return change


def input_for_another(graph: str, wrong: str, right: str) -> Change:
    def change(graphs: Graphs) -> None:
        ports = {v.name: v for v in graphs[graph].graph.inputs}
        redirect(ports[right], ports[wrong])

    return change


def outputs_exchanged(graph: str, a: str, b: str) -> Change:
    """Two outputs of a graph, each under the name of the other."""

    def change(graphs: Graphs) -> None:
        outputs = graphs[graph].graph.outputs
        i, j = ([v.name for v in outputs].index(name) for name in (a, b))
        first, second = outputs[i], outputs[j]
        outputs[i], outputs[j] = second, first
        first.name, second.name = "for a moment", a
        first.name = b

    return change


def mask_ignored(graph: str) -> Change:
    def change(graphs: Graphs) -> None:
        for where in nodes(graphs[graph], "Where", ""):
            where.replace_input_with(2, given(where, 1))

    return change


def states(model: ir.Model, ends: Sequence[str]) -> list[ir.Value]:
    return [node(model, name).outputs[0] for name in ends]


LLAMA_ENDS = ("model.embed_tokens/Gather", "model.layers.0/Add_1", "model.layers.1/Add_1")


def order_exchanged(graphs: Graphs) -> None:
    model = graphs["model"]
    start, first, second = states(model, LLAMA_ENDS)
    uses = [tuple(value.uses()) for value in (start, first, second)]
    for readers, value in zip(uses, (second, start, first), strict=True):
        for reader, index in readers:
            reader.replace_input_with(index, value)
    model.graph.sort()


def block_skipped(graphs: Graphs) -> None:
    _, first, second = states(graphs["model"], LLAMA_ENDS)
    redirect(second, first)


def skips_ahead(graphs: Graphs) -> None:
    """A residual connection that starts one block too early."""
    model = graphs["model"]
    start, first, _ = states(model, LLAMA_ENDS)
    add = node(model, "model.layers.1/Add")
    add.replace_input_with([v is first for v in add.inputs].index(True), start)


def positions_ignored(graphs: Graphs) -> None:
    model = graphs["model"]
    port = next(v for v in model.graph.inputs if v.name == "position_ids")
    zero = ir.node("Sub", [port, port], name="Sub_of_positions")
    zero.outputs[0].name = "planted"
    redirect(port, zero.outputs[0])
    zero.replace_input_with(0, port)
    zero.replace_input_with(1, port)
    model.graph.insert_before(next(iter(model.graph)), zero)


def past_forgotten(graphs: Graphs) -> None:
    """What block 1 caches is what is new, shifted in from nowhere."""
    model = graphs["model"]
    port = next(v for v in model.graph.inputs if v.name == "past_key_values.1.value")
    concat = next(reader for reader, _ in port.uses() if reader.op_type == "Concat")
    zero = ir.node("Sub", [port, port], name="model.layers.1.self_attn/Sub")
    zero.outputs[0].name = "planted"
    model.graph.insert_before(concat, zero)
    concat.replace_input_with([v is port for v in concat.inputs].index(True), zero.outputs[0])


L0, L1 = "model.layers.0", "model.layers.1"
E1, D0, D1 = "encoder.block.1", "decoder.block.0", "decoder.block.1"
B0 = "bert.encoder.layer.0"
Q_T5 = f"{D1}.layer.1.EncDecAttention.q.weight"
BEFORE, AFTER = "what comes before the blocks", "what comes after the blocks"

# What is wrong: the subject, the change, where it must be found.
FAULTS: dict[str, tuple[str, Change, str]] = {
    "llama: epsilon": ("llama-tiny", epsilon("model", f"{L1}.post_attention_layernorm/"), L1),
    "llama: query for output": (
        "llama-tiny",
        uses_exchanged("model", f"{L1}.self_attn.q_proj.weight", f"{L1}.self_attn.o_proj.weight"),
        L1,
    ),
    "llama: keys and values": (
        "llama-tiny",
        uses_exchanged("model", f"{L0}.self_attn.k_proj.weight", f"{L0}.self_attn.v_proj.weight"),
        L0,
    ),
    "llama: gate and up": (
        "llama-tiny",
        uses_exchanged("model", f"{L1}.mlp.gate_proj.weight", f"{L1}.mlp.up_proj.weight"),
        L1,
    ),
    "llama: weights of another block": (
        "llama-tiny",
        uses_exchanged("model", f"{L0}.mlp.up_proj.weight", f"{L1}.mlp.up_proj.weight"),
        L0,
    ),
    "llama: positions ignored": ("llama-tiny", positions_ignored, L0),
    "llama: residual": ("llama-tiny", bypassed("model", "Add", f"{L1}/", 1), L1),
    "llama: mask ignored": ("llama-tiny", mask_ignored("model"), L0),
    "llama: cached keys for values": (
        "llama-tiny",
        inputs_exchanged("model", "past_key_values.1.key", "past_key_values.1.value"),
        L1,
    ),
    "llama: cache of another block": (
        "llama-tiny",
        input_for_another("model", "past_key_values.0.value", "past_key_values.1.value"),
        L1,
    ),
    "llama: cached under another block's name": (
        "llama-tiny", outputs_exchanged("model", "present.0.key", "present.1.key"), L0,
    ),
    "llama: keys cached as values": (
        "llama-tiny", outputs_exchanged("model", "present.1.key", "present.1.value"), L1,
    ),
    "llama: past forgotten": ("llama-tiny", past_forgotten, L1),
    "llama: no final norm": ("llama-tiny", bypassed("model", "Div", "model.norm/", 0), AFTER),
    "t5: epsilon": ("t5-tiny", epsilon("encoder", f"{E1}.layer.1.layer_norm/"), E1),
    "t5: epsilon in the decoder": (
        "t5-tiny", epsilon("decoder", f"{D1}.layer.1.layer_norm/"), D1,
    ),
    "t5: epsilon of the last norm": (
        "t5-tiny", epsilon("encoder", "encoder.final_layer_norm/"), AFTER,
    ),
    "t5: cross keys for values": (
        "t5-tiny",
        outputs_exchanged("encoder", "present.1.encoder.key", "present.1.encoder.value"),
        D1,
    ),
    "t5: cross keys of another block": (
        "t5-tiny",
        input_for_another(
            "decoder", "past_key_values.0.encoder.key", "past_key_values.1.encoder.key"
        ),
        D1,
    ),
    "t5: cross keys under another name": (
        "t5-tiny",
        outputs_exchanged("encoder", "present.0.encoder.key", "present.1.encoder.key"),
        D0,
    ),
    "t5: own cache of another block": (
        "t5-tiny",
        input_for_another(
            "decoder", "past_key_values.0.decoder.key", "past_key_values.1.decoder.key"
        ),
        D1,
    ),
    "t5: masks ignored": ("t5-tiny", mask_ignored("decoder"), D0),
    "t5: activation": ("t5-tiny", bypassed("encoder", "Relu", E1, 0), E1),
    "t5: no scale before the head": ("t5-tiny", bypassed("decoder", "Mul", "Mul", 0), AFTER),
    "t5-gated: gate and value": (
        "t5-gated-tiny",
        uses_exchanged(
            "decoder",
            f"{D1}.layer.2.DenseReluDense.wi_0.weight",
            f"{D1}.layer.2.DenseReluDense.wi_1.weight",
        ),
        D1,
    ),
    "bert: epsilon": ("bert", epsilon("model", f"{B0}.output"), B0),
    "bert: query and key": (
        "bert",
        uses_exchanged(
            "model",
            f"{B0}.attention.self.query.weight",
            f"{B0}.attention.self.key.weight",
        ),
        B0,
    ),
    "bert: residual": ("bert", bypassed("model", "Add", f"{B0}.output/", 1), B0),
    "bert: token types": (
        "bert", bypassed("model", "Add", "bert.embeddings/", 0), BEFORE,
    ),
    "bert: pooler": ("bert", bypassed("model", "Tanh", "", 0), AFTER),
    "roberta: mask ignored": ("roberta", mask_ignored("model"), "roberta.encoder.layer.0"),
    "roberta: bias": (
        "roberta",
        bypassed("model", "Add", "roberta.encoder.layer.1.attention.self.query/", 0),
        "roberta.encoder.layer.1",
    ),
}  # fmt: skip
# A graph whose blocks are not those of the model, in its order, is refused before anything runs.
STRUCTURE: dict[str, tuple[Change, str]] = {
    "order exchanged": (order_exchanged, f"{L0} reads"),
    "block skipped": (block_skipped, f"{AFTER} reads {LLAMA_ENDS[1]}, which {L0} computes"),
    "skips ahead": (skips_ahead, f"{L1} reads {LLAMA_ENDS[0]}, which {BEFORE} computes"),
}


@pytest.fixture
def planted(written: Any, tmp_path: Path) -> Callable[[str, Change], Path]:
    """Return a function that writes a subject's bundle with a change in its graphs."""

    def plant(name: str, change: Change) -> Path:
        directory = tmp_path / name
        shutil.copytree(written(name), directory)
        rewrite(directory, change)
        return directory

    return plant


def rewrite(directory: Path, change: Change) -> None:
    """Write a bundle again, its graphs changed."""
    graphs = {path.stem: _in_memory(path) for path in sorted(directory.glob("*.onnx"))}
    change(graphs)
    lower.write(graphs, directory)
    bundle.write_manifest(directory, dataclasses.replace(read_manifest(directory), files={}))


def _in_memory(path: Path) -> ir.Model:
    model = ir.load(path)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return model


def test_planting_nothing_passes(planted: Any, check: Any) -> None:
    for name in ("llama-tiny", "t5-tiny"):
        assert check(name, planted(name, lambda _: None)).passed


@pytest.mark.parametrize("what", FAULTS)
def test_first_part_that_is_off_is_named(planted: Any, check: Any, what: str) -> None:
    name, change, where = FAULTS[what]
    report = check(name, planted(name, change))
    assert not report.passed
    first = next(c for c in report.tensors if not c.passed)
    assert first.what.removeprefix("logits, ").startswith(where), first.what
    with pytest.raises(ParityError, match="first: (logits, )?" + where.replace(".", r"\.")):
        refuse(report, "somewhere")


@pytest.mark.parametrize("what", STRUCTURE)
def test_other_blocks_than_the_model(planted: Any, check: Any, what: str) -> None:
    change, message = STRUCTURE[what]
    with pytest.raises(ParityError) as raised:
        check("llama-tiny", planted("llama-tiny", change))
    assert message in str(raised.value)


def numbers_exchanged(graph: str, a: str, b: str) -> Change:
    def change(graphs: Graphs) -> None:
        first, second = (graphs[graph].graph.initializers[n] for n in (a, b))
        first.const_value, second.const_value = second.const_value, first.const_value

    return change


def numbers(graph: str, name: str, step: Callable[[Any], Any]) -> Change:
    def change(graphs: Graphs) -> None:
        value = graphs[graph].graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(step(value.const_value.numpy()), name=name)

    return change


def _one_off(array: Any) -> Any:
    changed = np.array(array)
    changed.flat[-1] += 1e-3 * np.abs(changed).max()
    return changed


WEIGHTS: dict[str, tuple[str, Change, str]] = {
    "blocks' weights exchanged": (
        "llama-tiny",
        numbers_exchanged("model", f"{L0}.mlp.up_proj.weight", f"{L1}.mlp.up_proj.weight"),
        f"{L0}.mlp.up_proj.weight",
    ),
    "one element": (
        "t5-tiny",
        numbers("decoder", Q_T5, _one_off),
        Q_T5,
    ),
    "one element of the embedding": (
        "t5-gated-tiny", numbers("encoder", "shared.weight", _one_off), "shared.weight",
    ),
    "a bias": (
        "roberta",
        numbers("model", "roberta.encoder.layer.1.output.dense.bias", _one_off),
        "roberta.encoder.layer.1.output.dense.bias",
    ),
    "a task's head": (
        "bert", numbers("model", "classifier.bias", _one_off), "classifier.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WEIGHTS)
def test_weight(planted: Any, check: Any, what: str) -> None:
    name, change, weight = WEIGHTS[what]
    with pytest.raises(ParityError, match=f"the weight {weight} in the engine"):
        check(name, planted(name, change))


def test_manifest_of_another_task(written: Any, check: Any, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(written("bert"), directory)
    data = json.loads((directory / "manifest.json").read_text())
    data["task"]["name"] = "another"
    (directory / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(ParityError, match="the engine's task is"):
        check("bert", directory)


def test_interface_of_another_manifest(written: Any, check: Any, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(written("llama-tiny"), directory)
    data = json.loads((directory / "manifest.json").read_text())
    data["graphs"]["model"]["outputs"].reverse()
    (directory / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(ParityError, match="the outputs of model"):
        check("llama-tiny", directory)


def skip_norm_fused(graphs: Graphs) -> None:
    """Fuse the last sum of block 0 with the norm that follows it, in block 1."""
    model = graphs["model"]
    add = node(model, LLAMA_ENDS[1])
    norm = f"{L1}.input_layernorm"
    scale = model.graph.initializers[f"{norm}.weight"]
    variance = nodes(model, "Add", f"{norm}/")[0]
    constant_value = given(variance, 1).const_value
    assert constant_value is not None
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, scale],
        {"epsilon": float(constant_value.numpy())},
        domain="com.microsoft",
        num_outputs=4,
        name=f"{norm}/SkipSimplifiedLayerNormalization",
    )
    for index, value in enumerate(fused.outputs):
        value.name = f"{fused.name}:{index}" if index in (0, 3) else ""
    model.opset_imports["com.microsoft"] = 1
    last = nodes(model, "Mul", f"{norm}/")[-1]
    model.graph.insert_after(add, fused)
    redirect(last.outputs[0], fused.outputs[0])
    redirect(add.outputs[0], fused.outputs[3])
    old = [
        n
        for n in model.graph
        if n is add or (str(n.name).startswith(f"{norm}/") and n is not fused)
    ]
    for n in reversed(old):
        model.graph.remove(n, safe=True)


def test_sum_fused_into_the_next_block(planted: Any, check: Any) -> None:
    directory = planted("llama-tiny", skip_norm_fused)
    assert check("llama-tiny", directory).passed


def test_sum_left_out_beside_the_fused_one(planted: Any, check: Any) -> None:
    """Block 1 goes on with one of two summands."""

    def change(graphs: Graphs) -> None:
        skip_norm_fused(graphs)
        fused = next(n for n in graphs["model"].graph if n.op_type.startswith("Skip"))
        redirect(fused.outputs[3], given(fused, 0))

    report = check("llama-tiny", planted("llama-tiny", change))
    assert next(c for c in report.tensors if not c.passed).what.startswith(L1)


def narrowed(dtype: Any) -> Change:
    """Store every matrix in a type of 16 bits, rounded once, and cast it where it is read."""

    def change(graphs: Graphs) -> None:
        for model in graphs.values():
            for name, value in list(model.graph.initializers.items()):
                assert value.const_value is not None
                array = value.const_value.numpy()
                if array.ndim != 2 or array.dtype != np.float32:
                    continue
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
                cast.outputs[0].name = f"{name}/Cast"
                redirect(value, cast.outputs[0])
                cast.replace_input_with(0, value)
                value.const_value = ir.tensor(array.astype(dtype), name=name)
                value.dtype = value.const_value.dtype
                model.graph.insert_before(next(iter(model.graph)), cast)

    return change


@pytest.fixture
def narrow(subject: Any, tmp_path: Path) -> Callable[[str, Any], Any]:
    """Return a function that gives a recorded checkpoint on a base of 16 bits."""

    def make(name: str, dtype: Any) -> Any:
        found = subject(name)
        base = tmp_path / "base"
        shutil.copytree(found.base, base)
        base.chmod(0o755)
        path = base / "model.safetensors"
        path.chmod(0o644)
        tensors = safetensors.numpy.load_file(path)
        path.unlink()
        narrow = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(narrow, path, metadata={"format": "pt"})
        return dataclasses.replace(found, base=base)

    return make


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny"])
def test_weights_of_16_bits(
    narrow: Any, check: Any, tmp_path: Path, name: str, dtype: Any
) -> None:
    subject = narrow(name, dtype)
    directory = subject.export(tmp_path / "out", 0, verify=False).path
    rewrite(directory, narrowed(dtype))
    report = check(subject, directory)
    refuse(report, "nothing is wrong with it")
    assert report.bound.relative == 3e-5  # the rounding itself is 4e-3 in bfloat16
    graph = "decoder" if name == "t5-tiny" else "model"
    weight = Q_T5 if name == "t5-tiny" else f"{L1}.self_attn.q_proj.weight"

    def two_steps(array: Any) -> Any:
        """The largest element, two roundings away."""
        changed = np.array(array)
        at = int(np.abs(changed.astype(np.float32)).argmax())
        changed.reshape(-1).view(np.uint16)[at] += 2
        return changed

    rewrite(directory, numbers(graph, weight, two_steps))
    with pytest.raises(ParityError, match=f"the weight {weight} in the engine is off"):
        check(subject, directory)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_fault_beside_weights_of_16_bits(
    narrow: Any, check: Any, tmp_path: Path, dtype: Any
) -> None:
    subject = narrow("llama-tiny", dtype)
    directory = subject.export(tmp_path / "out", 0, verify=False).path
    rewrite(directory, narrowed(dtype))
    rewrite(directory, FAULTS["llama: residual"][1])
    report = check(subject, directory)
    assert next(c for c in report.tensors if not c.passed).what.startswith(L1)
