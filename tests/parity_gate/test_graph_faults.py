"""Faults in a traced graph: in the lowering alone, and in a graph pass alone.

Every linear and every weight is right, so only the outputs can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from eptc.passes.fold_transposes import FoldTransposes
from eptc.skeletons import Skeleton

Change = Callable[[ir.Model], None]


# Finding places in a graph. Nodes are called `<module path>/<operator>`.


def nodes(model: ir.Model, module: str, op: str) -> list[ir.Node]:
    """Return the nodes of one operator in one module, in order."""
    found = [
        node
        for node in model.graph
        if (node.name or "").rpartition("/")[0] == module and node.op_type == op
    ]
    assert found, f"the graph has no {op} in {module!r}"
    return found


def node(model: ir.Model, module: str, op: str, index: int = 0) -> ir.Node:
    return nodes(model, module, op)[index]


def port(model: ir.Model, name: str) -> ir.Value:
    """Return a graph input."""
    return next(value for value in model.graph.inputs if value.name == name)


def given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def descends(value: ir.Value | None, name: str) -> bool:
    """Whether a value is computed from the graph input `name`."""
    if value is None or value.producer() is None:
        return value is not None and value.name == name
    producer = value.producer()
    assert producer is not None
    return any(descends(given, name) for given in producer.inputs)


def mask_from(model: ir.Model, name: str) -> ir.Node:
    """Return the node that turns what descends from an input into 0 or minus infinity."""
    return next(n for n in model.graph if n.op_type == "Where" and descends(n.inputs[0], name))


# Changing them.


def constant(model: ir.Model, array: Any, like: ir.Value | None = None) -> ir.Value:
    name = f"planted.{len(model.graph.initializers)}"
    array = np.asarray(array)
    if like is not None and like.const_value is not None:
        array = array.astype(like.const_value.numpy().dtype)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def insert(
    model: ir.Model, op: str, inputs: list[ir.Value], before: ir.Node, **attributes: Any
) -> ir.Value:
    name = f"planted/{op}_{len(list(model.graph))}"
    made = ir.node(op, inputs, attributes, name=name)
    made.outputs[0].name = name
    model.graph.insert_before(before, made)
    return made.outputs[0]


def redirect(old: ir.Value, new: ir.Value, but: ir.Node | None = None) -> None:
    """Let everything that reads one value read another."""
    for reader, index in tuple(old.uses()):
        if reader is not but:
            reader.replace_input_with(index, new)


def exchange(a: ir.Value, b: ir.Value) -> None:
    """Let the readers of two values read the other one."""
    of_a, of_b = tuple(a.uses()), tuple(b.uses())
    for reader, index in of_a:
        reader.replace_input_with(index, b)
    for reader, index in of_b:
        reader.replace_input_with(index, a)


def bypass(node: ir.Node, index: int) -> None:
    """Let the readers of a node read one of its inputs instead."""
    redirect(node.outputs[0], given(node, index))


def weight(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[name]


# The faults. Each is a change of one graph; `first` and `second` are layers.


def mask_ignored(name: str) -> Change:
    def change(model: ir.Model) -> None:
        where = mask_from(model, name)
        where.replace_input_with(2, given(where, 1))

    return change


def weights_exchanged(a: str, b: str) -> Change:
    return lambda model: exchange(weight(model, a), weight(model, b))


def weight_for_another(wrong: str, right: str) -> Change:
    return lambda model: redirect(weight(model, right), weight(model, wrong))


def residual_dropped(module: str) -> Change:
    return lambda model: bypass(node(model, module, "Add"), 1)


def number(module: str, op: str, index: int, value: float) -> Change:
    """Another number in the place of a node's constant."""

    def change(model: ir.Model) -> None:
        place = node(model, module, op)
        place.replace_input_with(index, constant(model, value, like=given(place, index)))

    return change


def dropped(module: str, op: str, index: int = 0) -> Change:
    return lambda model: bypass(node(model, module, op), index)


def attribute(module: str, op: str, name: str, value: Any) -> Change:
    def change(model: ir.Model) -> None:
        place = node(model, module, op)
        assert name in place.attributes
        place.attributes[name] = ir.convenience.convert_attribute(name, value)

    return change


def untied_head(model: ir.Model) -> None:
    transpose = node(model, "lm_head", "Transpose")
    shape = given(transpose, 0).shape
    assert shape is not None
    drawn = np.random.default_rng(0).standard_normal(shape.numpy()).astype(np.float32)
    transpose.replace_input_with(0, constant(model, drawn))


def tied_head(embedding: str) -> Change:
    def change(model: ir.Model) -> None:
        place = node(model, "lm_head", "MatMul")
        turned = insert(model, "Transpose", [weight(model, embedding)], place, perm=[1, 0])
        place.replace_input_with(1, turned)

    return change


def cache_of_another_layer(what: str) -> Change:
    """Layer 1 reads what layer 0 has cached."""

    def change(model: ir.Model) -> None:
        names = (f"past_key_values.{layer}.{what}" for layer in (0, 1))
        first, second = (port(model, name) for name in names)
        redirect(second, first)

    return change


def past_forgotten(name: str) -> Change:
    """What is cached is only what is new."""

    def change(model: ir.Model) -> None:
        past = port(model, name)
        concat = next(reader for reader, _ in past.uses() if reader.op_type == "Concat")
        empty = insert(
            model,
            "Slice",
            [past, *(constant(model, np.array([n])) for n in (0, 0, 2))],
            concat,
        )
        concat.replace_input_with(0, empty)

    return change


def cross_cache_exchanged(model: ir.Model) -> None:
    by_name = {str(value.name): value for value in model.graph.outputs}
    a, b = by_name["present.1.encoder.key"], by_name["present.1.encoder.value"]
    a.name, b.name = b.name, a.name
    order = list(model.graph.outputs)
    i, j = order.index(a), order.index(b)
    model.graph.outputs[i], model.graph.outputs[j] = b, a


def bias_table(change_table: Callable[[np.ndarray[Any, Any]], Any]) -> Change:
    """Other buckets by distance; entry i is the distance i - 32."""

    def change(model: ir.Model) -> None:
        stack = (
            "encoder" if "attention_mask" in {v.name for v in model.graph.inputs} else "decoder"
        )
        gather = node(
            model, f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", "Gather"
        )
        table = given(gather, 1)
        assert table.const_value is not None
        gather.replace_input_with(
            1, constant(model, change_table(table.const_value.numpy().copy()), like=table)
        )

    return change


def far_buckets(near: int) -> Callable[[np.ndarray[Any, Any]], Any]:
    """Distances beyond 20, which no answer of 12 tokens has, share the bucket of a near one."""

    def change(table: np.ndarray[Any, Any]) -> Any:
        assert table[0] != table[32 - near]
        table[: 32 - 20] = table[32 - near]
        return table

    return change


def decoder_bias_like_the_encoders(table: np.ndarray[Any, Any]) -> Any:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-32, 33)
    buckets = T5Attention._relative_position_bucket(
        distances, bidirectional=True, num_buckets=8, max_distance=32
    )
    assert buckets.shape == table.shape
    return buckets.numpy()


def bias_turned(model: ir.Model) -> None:
    sub = node(model, "encoder.block.0.layer.0.SelfAttention", "Sub")
    a, b = given(sub, 0), given(sub, 1)
    sub.replace_input_with(0, b)
    sub.replace_input_with(1, a)


def queries_start_at_zero(reader: Callable[[ir.Model], tuple[ir.Node, int]]) -> Change:
    """The position of a query does not count what is cached: `arange(n) + past` loses `past`."""

    def change(model: ir.Model) -> None:
        place, index = reader(model)
        total = given(place, index).producer()
        assert total is not None
        assert total.op_type == "Add"
        query = next(v for v in total.inputs if v is not None and descends(v, "input_ids"))
        place.replace_input_with(index, query)

    return change


def comparison(model: ir.Model) -> tuple[ir.Node, int]:
    return next(n for n in model.graph if n.op_type == "LessOrEqual"), 1


def distance(model: ir.Model) -> tuple[ir.Node, int]:
    return node(model, "decoder.block.0.layer.0.SelfAttention", "Sub"), 1


def scores_scaled(module: str, factor: float) -> Change:
    def change(model: ir.Model) -> None:
        scores = node(model, module, "MatMul").outputs[0]
        ((reader, index),) = scores.uses()
        scaled = insert(model, "Mul", [scores, constant(model, np.float32(factor))], before=reader)
        reader.replace_input_with(index, scaled)

    return change


def scores_not_scaled(module: str) -> Change:
    def change(model: ir.Model) -> None:
        for scaling in nodes(model, module, "Mul"):
            for index, value in enumerate(scaling.inputs):
                if value is not None and value.const_value is not None:
                    scaling.replace_input_with(index, constant(model, 1.0, like=value))
                    return
        raise AssertionError(f"{module} scales nothing")

    return change


def another_operator(module: str, op: str, wanted: str) -> Change:
    def change(model: ir.Model) -> None:
        old = node(model, module, op)
        redirect(old.outputs[0], insert(model, wanted, [given(old, 0)], before=old))

    return change


def heads_interleaved(module: str, heads: int, width: int) -> Change:
    """Features are split as [width, heads] instead of [heads, width]."""

    def change(model: ir.Model) -> None:
        reshape = node(model, module, "Reshape")
        shape = given(reshape, 1)
        reshape.replace_input_with(1, constant(model, [0, 0, width, heads], like=shape))
        ((transpose, _),) = reshape.outputs[0].uses()
        assert transpose.op_type == "Transpose"
        transpose.attributes["perm"] = ir.AttrInt64s("perm", [0, 3, 1, 2])
        reshape.outputs[0].shape = transpose.outputs[0].shape = None

    return change


def one_side_of_and(side: str) -> Change:
    """Of the causal mask and the padding mask only one is left."""

    def change(model: ir.Model) -> None:
        both = next(n for n in model.graph if n.op_type == "And")
        kept = next(v for v in both.inputs if descends(v, "attention_mask") is (side == "padding"))
        assert kept is not None
        redirect(both.outputs[0], kept)

    return change


def positions_ignored(model: ir.Model) -> None:
    """Positions are counted from 0 at every step, padding included."""
    position_ids = port(model, "position_ids")
    ((reader, index),) = position_ids.uses()
    count = next(n for n in model.graph if n.op_type == "Range")
    row = insert(
        model, "Unsqueeze", [count.outputs[0], constant(model, np.array([0]))], before=reader
    )
    reader.replace_input_with(index, row)


def rotation_turned(model: ir.Model) -> None:
    bypass(node(model, "model.layers.0.self_attn", "Neg"), 0)


def another_rotary_base(model: ir.Model) -> None:
    mul = node(model, "model.rotary_emb", "Mul")
    index = next(
        i for i, v in enumerate(mul.inputs) if v is not None and v.const_value is not None
    )
    frequencies = given(mul, index)
    assert frequencies.const_value is not None
    shape = frequencies.const_value.numpy().shape
    wrong = 500_000.0 ** -(np.arange(8) / 8)
    mul.replace_input_with(index, constant(model, wrong.reshape(shape), like=frequencies))


def keys_cached_before_rotation(model: ir.Model) -> None:
    past = port(model, "past_key_values.0.key")
    concat = next(reader for reader, _ in past.uses() if reader.op_type == "Concat")
    straight = next(
        n for n in nodes(model, "model.layers.0.self_attn", "Transpose") if n is not None
    )
    keys = [
        n
        for n in nodes(model, "model.layers.0.self_attn", "Transpose")
        if (producer := given(n, 0).producer()) is not None
        and (source := given(producer, 0).producer()) is not None
        and (source.name or "").startswith("model.layers.0.self_attn.k_proj")
    ]
    assert straight is not keys[0]
    concat.replace_input_with(1, keys[0].outputs[0])


def wrong_key_value_groups(model: ir.Model) -> None:
    """Head i reads group i % groups instead of i // (heads // groups)."""
    module = "model.layers.1.self_attn"
    order = constant(model, np.array([0, 2, 1, 3]))
    grouping, *_ = (
        n
        for n in nodes(model, module, "Reshape")
        if (shape := given(n, 1).const_value) is not None
        and shape.numpy().tolist() == [0, 2, -1, 16]
    )
    mixed = insert(model, "Gather", [given(grouping, 0), order], before=grouping, axis=1)
    grouping.replace_input_with(0, mixed)
    ungrouping = next(
        n
        for n in nodes(model, module, "Reshape")
        if (shape := given(n, 1).const_value) is not None
        and shape.numpy().tolist() == [0, 4, -1, 16]
    )
    ((after, index),) = ungrouping.outputs[0].uses()
    sorted_again = insert(model, "Gather", [ungrouping.outputs[0], order], before=after, axis=1)
    after.replace_input_with(index, sorted_again)


def past_exchanged(model: ir.Model) -> None:
    """Layer 0's cached values stand where its cached keys belong."""
    key, value = (port(model, f"past_key_values.0.{what}") for what in ("key", "value"))
    exchange(key, value)


def token_types_ignored(model: ir.Model) -> None:
    gather = node(model, "bert.embeddings.token_type_embeddings", "Gather")
    zero = insert(model, "Sub", [given(gather, 1), given(gather, 1)], before=gather)
    gather.replace_input_with(1, zero)


def positions_off_by_one(model: ir.Model) -> None:
    gather = node(model, "bert.embeddings.position_embeddings", "Gather")
    later = insert(model, "Add", [given(gather, 1), constant(model, np.int64(1))], before=gather)
    gather.replace_input_with(1, later)


def last_token_pooled(model: ir.Model) -> None:
    gather = node(model, "bert.pooler", "Gather")
    gather.replace_input_with(1, constant(model, -1, like=given(gather, 1)))


ENCODER, DECODER, MODEL = "encoder", "decoder", "model"
E0, E1, D0, D1 = (f"{s}.block.{i}.layer" for s in (ENCODER, DECODER) for i in (0, 1))
L0, L1 = (f"model.layers.{i}" for i in (0, 1))
B0 = "bert.encoder.layer.0"

T5: dict[str, tuple[str, Change]] = {
    "mask ignored": (ENCODER, mask_ignored("attention_mask")),
    "mask ignored across": (DECODER, mask_ignored("encoder_attention_mask")),
    "causal mask ignored": (DECODER, mask_ignored("input_ids")),
    "causal mask forgets the past": (DECODER, queries_start_at_zero(comparison)),
    "untied head": (DECODER, untied_head),
    "head not scaled": (DECODER, number("", "Mul", 1, 1.0)),
    "residual dropped": (ENCODER, residual_dropped(f"{E1}.0")),
    "residual dropped in the decoder": (DECODER, residual_dropped(f"{D1}.1")),
    "query and key exchanged": (
        ENCODER,
        weights_exchanged(f"{E0}.0.SelfAttention.q.weight", f"{E0}.0.SelfAttention.k.weight"),
    ),
    "value of another layer": (
        ENCODER,
        weight_for_another(f"{E0}.0.SelfAttention.v.weight", f"{E1}.0.SelfAttention.v.weight"),
    ),
    "cross keys of another layer": (DECODER, cache_of_another_layer("encoder.key")),
    "cross values of another layer": (DECODER, cache_of_another_layer("encoder.value")),
    "cross keys and values exchanged": (ENCODER, cross_cache_exchanged),
    "cross keys made by another layer": (
        ENCODER,
        weight_for_another(f"{D0}.1.EncDecAttention.k.weight", f"{D1}.1.EncDecAttention.k.weight"),
    ),
    "cache of another layer": (DECODER, cache_of_another_layer("decoder.key")),
    "past ignored": (DECODER, past_forgotten("past_key_values.1.decoder.value")),
    "position bias turned": (ENCODER, bias_turned),
    "position bias forgets the past": (DECODER, queries_start_at_zero(distance)),
    "position bias of an encoder": (DECODER, bias_table(decoder_bias_like_the_encoders)),
    "buckets off by one": (ENCODER, bias_table(lambda table: np.roll(table, 1))),
    "far buckets wrong": (DECODER, bias_table(far_buckets(9))),
    "far buckets of the encoder wrong": (ENCODER, bias_table(far_buckets(5))),
    "norm of another layer": (
        ENCODER,
        weight_for_another(f"{E1}.0.layer_norm.weight", f"{E0}.0.layer_norm.weight"),
    ),
    "final norm dropped": (DECODER, dropped("decoder.final_layer_norm", "Mul", 1)),
    "epsilon of a norm": (ENCODER, number(f"{E0}.0.layer_norm", "Add", 1, 1e-3)),
    "scores scaled": (DECODER, scores_scaled(f"{D0}.1.EncDecAttention", 12**-0.5)),
    "gelu for relu": (ENCODER, another_operator(f"{E0}.1.DenseReluDense.act", "Relu", "Gelu")),
    "heads split the other way": (ENCODER, heads_interleaved(f"{E1}.0.SelfAttention", 4, 12)),
    "softmax over the queries": (
        ENCODER,
        attribute(f"{E1}.0.SelfAttention", "Softmax", "axis", -2),
    ),
}

GATED: dict[str, tuple[str, Change]] = {
    "tied head": (DECODER, tied_head("shared.weight")),
    "exact gelu for its approximation": (
        ENCODER,
        attribute(f"{E1}.1.DenseReluDense.act", "Gelu", "approximate", "none"),
    ),
    "gate and value exchanged": (
        DECODER,
        weights_exchanged(
            f"{D1}.2.DenseReluDense.wi_0.weight", f"{D1}.2.DenseReluDense.wi_1.weight"
        ),
    ),
    "activation dropped": (DECODER, dropped(f"{D0}.2.DenseReluDense.act", "Gelu")),
}

LLAMA: dict[str, tuple[str, Change]] = {
    "padding ignored": (MODEL, one_side_of_and("causal")),
    "causal mask ignored": (MODEL, one_side_of_and("padding")),
    "causal mask forgets the past": (MODEL, queries_start_at_zero(comparison)),
    "positions ignored": (MODEL, positions_ignored),
    "rotation turned": (MODEL, rotation_turned),
    "another rotary base": (MODEL, another_rotary_base),
    "keys cached before rotation": (MODEL, keys_cached_before_rotation),
    "wrong key-value groups": (MODEL, wrong_key_value_groups),
    "scores not scaled": (MODEL, scores_not_scaled(f"{L0}.self_attn")),
    "cache of another layer": (MODEL, cache_of_another_layer("key")),
    "cached keys and values exchanged": (MODEL, past_exchanged),
    "past ignored": (MODEL, past_forgotten("past_key_values.0.value")),
    "tied head": (MODEL, tied_head("model.embed_tokens.weight")),
    "gate and value exchanged": (
        MODEL,
        weights_exchanged(f"{L1}.mlp.gate_proj.weight", f"{L1}.mlp.up_proj.weight"),
    ),
    "sigmoid for silu": (MODEL, dropped(f"{L0}.mlp.act_fn", "Mul", 1)),
    "residual dropped": (MODEL, residual_dropped(L1)),
    "norm of another layer": (
        MODEL,
        weight_for_another("model.norm.weight", f"{L1}.input_layernorm.weight"),
    ),
    "epsilon of a norm": (MODEL, number("model.norm", "Add", 1, 1e-3)),
}

BERT: dict[str, tuple[str, Change]] = {
    "mask ignored": (MODEL, mask_ignored("attention_mask")),
    "token types ignored": (MODEL, token_types_ignored),
    "positions off by one": (MODEL, positions_off_by_one),
    "approximate gelu": (
        MODEL,
        attribute(f"{B0}.intermediate.intermediate_act_fn", "Gelu", "approximate", "tanh"),
    ),
    "epsilon of a norm": (
        MODEL,
        attribute("bert.embeddings.LayerNorm", "LayerNormalization", "epsilon", 1e-3),
    ),
    "bias dropped": (MODEL, dropped(f"{B0}.attention.self.query", "Add")),
    "query and key exchanged": (
        MODEL,
        weights_exchanged(f"{B0}.attention.self.query.weight", f"{B0}.attention.self.key.weight"),
    ),
    "scores not scaled": (MODEL, scores_not_scaled(f"{B0}.attention.self")),
    "last token pooled": (MODEL, last_token_pooled),
    "pooler without tanh": (MODEL, dropped("bert.pooler.activation", "Tanh")),
    "residual dropped": (MODEL, residual_dropped(f"{B0}.output")),
}

SETS = {"t5-tiny": T5, "t5-gated-tiny": GATED, "llama-tiny": LLAMA, "bert": BERT}
CASES = [(name, what) for name, faults in SETS.items() for what in faults]
# Planted in a pass too: some of each set, of those that name no transposed weight.
IN_A_PASS = [
    ("t5-tiny", "mask ignored"),
    ("t5-tiny", "untied head"),
    ("t5-tiny", "residual dropped"),
    ("t5-tiny", "cross keys of another layer"),
    ("t5-tiny", "far buckets wrong"),
    ("t5-tiny", "query and key exchanged"),
    ("t5-tiny", "epsilon of a norm"),
    ("t5-gated-tiny", "exact gelu for its approximation"),
    ("t5-gated-tiny", "gate and value exchanged"),
    ("llama-tiny", "positions ignored"),
    ("llama-tiny", "wrong key-value groups"),
    ("llama-tiny", "cache of another layer"),
    ("llama-tiny", "norm of another layer"),
    ("bert", "token types ignored"),
    ("bert", "bias dropped"),
    ("bert", "last token pooled"),
]


@pytest.fixture
def subject(recorded: Any, paper: Any) -> Callable[[str], Any]:
    return lambda name: paper() if name == "bert" else recorded(name)


@pytest.mark.parametrize(("name", "what"), CASES)
def test_in_the_lowering(
    subject: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    key, change = SETS[name][what]
    sound = Skeleton.copy_graphs

    def copy_graphs(self: Skeleton) -> dict[str, ir.Model]:
        graphs = sound(self)
        change(graphs[key])
        return graphs

    monkeypatch.setattr(Skeleton, "copy_graphs", copy_graphs)
    message = refused(subject(name), 0)
    assert "the lowering is the first step after which the engine is off" in message


@pytest.mark.parametrize(("name", "what"), IN_A_PASS)
def test_in_a_graph_pass(
    subject: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    key, change = SETS[name][what]
    sound = FoldTransposes.rewrite
    own_input = {ENCODER: "attention_mask", DECODER: "encoder_attention_mask"}.get(key)

    def rewrite(self: FoldTransposes, model: ir.Model) -> int:
        folded = sound(self, model)
        if own_input is None or own_input in {value.name for value in model.graph.inputs}:
            change(model)
        return folded + 1

    monkeypatch.setattr(FoldTransposes, "rewrite", rewrite)
    message = refused(subject(name), 0)
    assert "the pass fold-transposes is the first step after which the engine is off" in message
