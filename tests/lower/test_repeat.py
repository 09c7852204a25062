"""Repeated blocks: the very graph that tracing every block gives, or no repetition at all."""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import BertConfig, DebertaV2Config, LlamaConfig, T5Config

from eptc.architectures import architecture
from eptc.ir import PromptLayout
from eptc.lower import repeat as module
from eptc.lower import trace
from eptc.lower.graph_spec import GraphSpec, Port
from eptc.lower.naming import SCOPES
from eptc.lower.repeat import Stack, UnlikeBlocksError, grow, shortened
from eptc.lower.skeleton import build

_ENCODER = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
_T5 = {"vocab_size": 30, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_heads": 2}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**_ENCODER),
    "deberta": DebertaV2Config(
        **_ENCODER,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        position_buckets=8,
    ),
    "t5": T5Config(**_T5, num_layers=4, num_decoder_layers=5),
    "t5-one-short-stack": T5Config(
        **_T5, num_layers=2, num_decoder_layers=4, feed_forward_proj="gated-gelu"
    ),
    "llama": LlamaConfig(**_ENCODER, num_key_value_heads=1),
}


def _prompts(*layers: int, constant: bool = False) -> PromptLayout:
    return PromptLayout(2, 3, 1, layers, shared=True, constant=constant, coupled=not constant)


# A configuration, its prompts, and which blocks of its first stack are traced.
PROMPTED: dict[str, tuple[Any, PromptLayout, tuple[int, ...]]] = {
    "t5": (
        T5Config(**_T5, num_layers=6, num_decoder_layers=4),
        _prompts(0, 1, 2, 3, 4, 5),
        (0, 1, 2, 5),
    ),
    "llama": (
        # Adapted, the last adapted one, others, and the last, of which one position is read.
        LlamaConfig(**{**_ENCODER, "num_hidden_layers": 9}, num_labels=3),
        _prompts(0, 1, 2, 3, 4),
        (0, 1, 2, 4, 5, 6, 8),
    ),
    "llama-constant": (
        LlamaConfig(**_ENCODER, num_labels=3), _prompts(1, 2, 3, 4, constant=True), (0, 1, 2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_growing_gives_what_tracing_all_blocks_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []

    def counted(model: torch.nn.Module, *rest: Any) -> Any:
        short = shortened(model, *rest)
        assert short is not None
        traced.append(max(len(stack.kept) for stack in short.stacks.values()))
        return short

    monkeypatch.setattr(module, "shortened", counted)
    grown = trace(CONFIGS[name])
    monkeypatch.setattr(module, "shortened", lambda *_: None)
    whole = trace(CONFIGS[name])
    assert traced == [3]
    assert {key: str(model.graph) for key, model in grown.items()} == {
        key: str(model.graph) for key, model in whole.items()
    }


@pytest.mark.parametrize("name", PROMPTED)
def test_runs_of_alike_blocks_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts make blocks differ: each run of alike ones is repeated in its place."""
    config, prompts, kept = PROMPTED[name]
    traced: list[tuple[int, ...]] = []

    def noted(*arguments: Any) -> Any:
        short = shortened(*arguments)
        assert short is not None
        traced.append(next(iter(short.stacks.values())).kept)
        return short

    monkeypatch.setattr(module, "shortened", noted)
    grown = trace(config, prompts=prompts)
    monkeypatch.setattr(module, "shortened", lambda *_: None)
    whole = trace(config, prompts=prompts)
    assert traced == [kept]
    assert {key: str(model.graph) for key, model in grown.items()} == {
        key: str(model.graph) for key, model in whole.items()
    }


def test_blocks_that_are_not_alike_are_all_traced() -> None:
    config = CONFIGS["llama"]
    model = build(config)
    assert shortened(model, config, architecture(config), build) is not None
    layer: Any = model.get_submodule("model.layers.4.self_attn")
    layer.scaling = 0.25
    assert shortened(model, config, architecture(config), build) is None


def test_short_stacks_are_traced_as_they_are() -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_hidden_layers = 3
    assert shortened(build(config), config, architecture(config), build) is None


def _stack(operators: tuple[str, str, str], *, tapped: int | None = None) -> ir.Graph:
    """Return a graph of three blocks s.0, s.1 and s.2; the head may also read block `tapped`."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch"])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20})
    last, outputs = x, []
    for number, operator in enumerate(operators):
        weight = ir.val(f"s.{number}.w", ir.DataType.FLOAT, [1])
        graph.initializers.add(weight)
        scopes = str(["", f"model.s.{number}", "node"])
        node = ir.node(operator, [last, weight], metadata_props={SCOPES: scopes})
        graph.append(node)
        last = node.outputs[0]
        outputs.append(last)
    head = ir.node("Sub", [last, x if tapped is None else outputs[tapped]])
    graph.append(head)
    head.outputs[0].name = "y"
    graph.outputs.append(head.outputs[0])
    return graph


SPEC = GraphSpec(torch.nn.Identity(), (Port("x", ("batch",)),), (Port("y", ("batch",)),))


def test_a_copy_reads_the_block_before_it_and_its_own_weight() -> None:
    graph = _stack(("Add", "Add", "Add"))
    grow(graph, {"s": Stack((0, 1, 2), 5)}, SPEC)
    nodes = list(graph)
    assert [node.op_type for node in nodes] == ["Add"] * 5 + ["Sub"]
    for number in range(1, 5):
        assert nodes[number].inputs[0] is nodes[number - 1].outputs[0]
        weight = nodes[number].inputs[1]
        assert weight is not None
        assert weight.name == f"s.{number}.w"
    assert nodes[5].inputs[0] is nodes[4].outputs[0]


def test_a_head_may_read_the_first_block() -> None:
    graph = _stack(("Add", "Add", "Add"), tapped=0)
    grow(graph, {"s": Stack((0, 1, 2), 4)}, SPEC)
    nodes = list(graph)
    assert nodes[-1].inputs[1] is nodes[0].outputs[0]


@pytest.mark.parametrize(
    "graph", [_stack(("Add", "Add", "Mul")), _stack(("Add", "Add", "Add"), tapped=1)]
)
def test_unlike_blocks_are_refused(graph: ir.Graph) -> None:
    with pytest.raises(UnlikeBlocksError, match=r"in s|behind s"):
        grow(graph, {"s": Stack((0, 1, 2), 5)}, SPEC)
