"""Prompted models: what is traced, computed by PyTorch, and its graphs in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from eptc import checkpoint, lower
from eptc.errors import BaseModelError
from eptc.fitting import task_config
from eptc.lower import prompted_llama, prompted_t5
from eptc.lower.attention import traced_attention
from eptc.lower.skeleton import build
from eptc.nn.mept import MeptModel
from eptc.passes.fold_transposes import FoldTransposes
from eptc.passes.stable_names import StableNames
from eptc.skeletons import skeleton

Make = Callable[..., Any]
ATOL = 2e-5
SETS = (
    "mept-t5-top2",
    "mept-t5-top1-partial",
    "mept-llama-cls",
    "mept-llama-stochastic",
    "smop-t5",
)


def weights(source: checkpoint.Checkpoint) -> dict[str, Any]:
    head = next(iter(source.contents.heads.values()), {})
    return {**source.weights, **head}


def eager(source: checkpoint.Checkpoint) -> Any:
    """Return the model that is traced, on real numbers."""
    prompts = source.contents.prompts
    assert prompts is not None
    config = task_config(source, 0)
    model = build(config, tied_head=source.base.tied_head, prompts=prompts)
    values = weights(source)
    wanted = lower.expected_parameters(config, tied_head=source.base.tied_head, prompts=prompts)
    assert {name: tensor.shape for name, tensor in values.items()} == wanted
    filled: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in filled:
            array = np.array(values[name].numpy(), np.float32)
            filled[id(parameter)] = torch.nn.Parameter(torch.from_numpy(array))
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._parameters[attribute] = filled[id(parameter)]
    return model


def batch(rows: int, length: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask; every row but the first ends with padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), np.int64)
    for row in range(1, rows):
        mask[row, max(1, length - 2 * row) :] = 0
    ids = rng.integers(1, 16, (rows, length)) * mask
    return torch.from_numpy(ids), torch.from_numpy(mask)


T5 = [
    {},
    {"topk": 1},
    {"topk": 4},
    {"layers": [0]},
    {"layers": [1]},
    {"layers": [2], "topk": 1},
    {"layers": [0, 2], "topk": 3},
    {"layers": [1, 2], "shared_expert": False},
    {"layers": [0, 1], "num_virtual_tokens": 2, "topk": 5},
    {"num_virtual_tokens": 1, "topk": 1},
    {"num_virtual_tokens": 1, "layers": [1]},
    {"num_virtual_tokens_full": 3, "topk": 1},
    {"num_virtual_tokens_full": 3, "topk": 1, "layers": [1]},
    {"method": "prompt-routing"},
    {"method": "prompt-routing", "topk": 1},
    {"method": "prompt-routing", "num_virtual_tokens": 1, "topk": 1},
    {"method": "prompt-routing", "stochastic": True},
]
LLAMA = [
    {},
    {"topk": 1},
    {"topk": 4, "shared_expert": False},
    {"layers": [0]},
    {"layers": [1]},
    {"layers": [2], "topk": 1},
    {"layers": [0, 1], "num_virtual_tokens": 6, "topk": 1},
    {"layers": []},
    {"num_virtual_tokens_full": 3, "topk": 1},
    {"stochastic": True},
    {"stochastic": True, "layers": [1]},
    {"stochastic": True, "layers": [0, 2], "shared_expert": False},
    {"num_virtual_tokens": 1},
]


@pytest.mark.parametrize("mode", ["batch", "per-sample"])
@pytest.mark.parametrize("settings", T5, ids=str)
def test_what_is_traced_for_t5(small_mept: Make, settings: dict[str, Any], mode: Any) -> None:
    """Every pattern of adapted blocks, in batches of which one has as many rows as prompts."""
    folders = small_mept("t5", **settings)
    routing: Any = "exact" if mode == "batch" else mode
    model = eager(checkpoint.read(folders.ckpt, folders.base, routing=routing))
    reference = MeptModel.load(folders.ckpt, folders.base, mode=mode)
    encoder = prompted_t5.graphs(model)["encoder"].module
    for rows, length in ((1, 5), (2, 1), (2, 4), (3, 7), (4, 6)):
        ids, mask = batch(rows, length)
        with torch.no_grad(), traced_attention(model):
            found = encoder(ids, mask)[0]
            wanted = reference.hf.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("mode", ["batch", "per-sample"])
@pytest.mark.parametrize("settings", LLAMA, ids=str)
def test_what_is_traced_for_llama(small_mept: Make, settings: dict[str, Any], mode: Any) -> None:
    folders = small_mept("llama", **settings)
    routing: Any = "exact" if mode == "batch" else mode
    model = eager(checkpoint.read(folders.ckpt, folders.base, routing=routing))
    reference = MeptModel.load(folders.ckpt, folders.base, mode=mode)
    classifier = prompted_llama.graphs(model)["model"].module
    for rows, length in ((1, 5), (2, 1), (3, 7), (4, 6)):
        ids, mask = batch(rows, length)
        with torch.no_grad(), traced_attention(model):
            found = classifier(ids, mask)
            wanted = reference.hf(input_ids=ids, attention_mask=mask).logits
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=ATOL)


class Recorded:
    """A recorded checkpoint's graphs, in sessions of ONNX Runtime."""

    def __init__(self, folder: Path, directory: Path, routing: Any = "exact") -> None:
        source = checkpoint.read(
            folder / "checkpoint", folder / "base", allow_pickle=True, routing=routing
        )
        self.prompts = source.contents.prompts
        assert self.prompts is not None
        self.config = task_config(source, 0)
        found = skeleton(
            self.config, opset=20, tied_head=source.base.tied_head, prompts=self.prompts
        )
        self.graphs = found.copy_graphs()
        lower.bind(self.graphs, weights(source))
        for graph in self.graphs.values():
            FoldTransposes()(graph)
            StableNames()(graph)
        lower.write(self.graphs, directory)
        self.sessions = {
            name: onnxruntime.InferenceSession(
                directory / f"{name}.onnx", providers=["CPUExecutionProvider"]
            )
            for name in self.graphs
        }
        with np.load(folder / "golden.npz") as file:
            self.arrays = dict(file)

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def encode(self, prefix: str) -> tuple[Any, dict[str, Any]]:
        """Return the encoder's output, and what the decoder needs of it and of the past."""
        mask = self.arrays[f"{prefix}_attention_mask"]
        ids = self.arrays[f"{prefix}_input_ids"]
        encoded = self.run("encoder", {"input_ids": ids, "attention_mask": mask})
        hidden = encoded.pop("last_hidden_state")
        fed = {name.replace("present", "past_key_values"): v for name, v in encoded.items()}
        empty = np.zeros((len(ids), self.config.num_heads, 0, self.config.d_kv), np.float32)
        for layer in range(self.config.num_decoder_layers):
            for part in ("key", "value"):
                fed[f"past_key_values.{layer}.decoder.{part}"] = empty
        return hidden, {"encoder_attention_mask": mask, **fed}

    def greedy(self, prefix: str, steps: int) -> Any:
        _, fed = self.encode(prefix)
        rows = len(fed["encoder_attention_mask"])
        tokens = np.full((rows, 1), self.config.decoder_start_token_id)
        for _ in range(steps):
            outputs = self.run("decoder", {"input_ids": tokens[:, -1:], **fed})
            fed |= {
                name.replace("present", "past_key_values"): value
                for name, value in outputs.items()
                if name != "logits"
            }
            tokens = np.concatenate([tokens, outputs["logits"][:, -1:].argmax(-1)], axis=1)
        return tokens


@pytest.fixture(scope="module", params=SETS)
def recorded(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    return Recorded(golden / "mept" / request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("number", range(9))
def test_recorded_batches(recorded: Recorded, number: int) -> None:
    """Batch 4 of the T5 has as many rows as a row has prompts."""
    prefix = f"b{number}"
    names = ("input_ids", "attention_mask")
    if "model" in recorded.sessions:
        feeds = {name: recorded.arrays[f"{prefix}_{name}"] for name in names}
        found = recorded.run("model", feeds)["logits"]
        wanted = recorded.arrays[f"{prefix}_logits"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL)
        return
    hidden, fed = recorded.encode(prefix)
    wanted = recorded.arrays[f"{prefix}_encoder_last_hidden_state"]
    np.testing.assert_allclose(hidden, wanted, rtol=0, atol=ATOL)
    tokens = recorded.arrays[f"{prefix}_decoder_input_ids"]
    mask = fed["encoder_attention_mask"]
    assert recorded.prompts is not None
    ones = np.ones((len(mask), recorded.prompts.length), np.int64)
    for given in (mask, np.concatenate([ones, mask], axis=1)):
        outputs = recorded.run(
            "decoder", {"input_ids": tokens, **fed, "encoder_attention_mask": given}
        )
        wanted = recorded.arrays[f"{prefix}_logits"]
        np.testing.assert_allclose(outputs["logits"], wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("rows", [1, 4])
def test_recorded_tokens(recorded: Recorded, rows: int) -> None:
    if "model" in recorded.sessions:
        assert f"gen{rows}_sequences" not in recorded.arrays
        return
    wanted = recorded.arrays[f"gen{rows}_sequences"]
    found = recorded.greedy(f"gen{rows}", wanted.shape[1] - 1)
    ended = np.cumsum(wanted == 1, axis=1) - (wanted == 1) > 0  # Behind an end token is padding.
    np.testing.assert_array_equal(np.where(ended, 0, found), wanted)


def test_standard_operators_alone(recorded: Recorded) -> None:
    for model in recorded.graphs.values():
        assert {node.domain for node in model.graph} == {""}
        assert not any(node.op_type in ("If", "Loop", "NonZero") for node in model.graph)


@pytest.mark.parametrize("name", ["mept-t5-top1-partial", "mept-llama-cls", "smop-t5"])
def test_per_sample_rows_answer_alone(golden: Path, tmp_path: Path, name: str) -> None:
    """Each row of a batch gets what the original code answers to it alone."""
    engine = Recorded(golden / "mept" / name, tmp_path, "per-sample")
    graph, output = ("model", "logits")
    if "encoder" in engine.sessions:
        graph, output = "encoder", "last_hidden_state"
    original = MeptModel.load(
        golden / "mept" / name / "checkpoint", golden / "mept" / name / "base", allow_pickle=True
    ).hf
    ids, mask = (engine.arrays[f"b4_{what}"] for what in ("input_ids", "attention_mask"))
    found = engine.run(graph, {"input_ids": ids, "attention_mask": mask})[output]
    for row in range(len(ids)):
        one = {"input_ids": torch.from_numpy(ids[row : row + 1]),
               "attention_mask": torch.from_numpy(mask[row : row + 1])}  # fmt: skip
        with torch.no_grad():
            wanted = original.encoder(**one)[0] if graph == "encoder" else original(**one).logits
        np.testing.assert_allclose(found[row : row + 1], wanted.numpy(), rtol=0, atol=ATOL)


def rows_of(graph: ir.Graph, weight: str) -> list[str]:
    """Return the nodes that multiply by a weight, through a transpose or not."""
    value = graph.initializers[weight]
    readers = []
    for node in value.consumers():
        readers += [node] if node.op_type == "MatMul" else list(node.outputs[0].consumers())
    return [str(node.inputs[0].name) for node in readers if node.inputs[0] is not None]


def test_dead_rows_are_not_computed(small_mept: Make) -> None:
    """Between adapted blocks a prompt is a key and a value; the last block keeps its rows."""
    folders = small_mept("t5")
    source = checkpoint.read(folders.ckpt, folders.base)
    graphs = skeleton(
        task_config(source, 0), opset=20, tied_head=True, prompts=source.contents.prompts
    ).copy_graphs()
    graph = graphs["encoder"].graph
    block = "encoder.block.{}.layer.0.SelfAttention.{}.weight"
    for number, same in ((0, False), (1, False), (2, True)):
        query, key = (rows_of(graph, block.format(number, part)) for part in "qk")
        assert len(query) == len(key) == 1
        assert (query == key) is same, number
    assert not any(name.startswith("encoder.prompts.") for name in graph.initializers)


def test_constant_prompts_are_keys_and_values(small_mept: Make) -> None:
    folders = small_mept("llama", stochastic=True)
    source = checkpoint.read(folders.ckpt, folders.base)
    names = [name for name in weights(source) if "prompts" in name]
    assert names == [
        f"model.layers.{i}.prompts.{part}" for i in range(3) for part in ("key", "value")
    ]
    folders = small_mept("t5", num_virtual_tokens_full=3, topk=1)
    source = checkpoint.read(folders.ckpt, folders.base, routing="per-sample")
    names = [name for name in weights(source) if "prompts" in name]
    blocks = [f"encoder.block.{i}.prompts.{part}" for i in range(2) for part in ("key", "value")]
    # The rows of the last block are what the decoder attends to.
    assert names == [*blocks, "encoder.block.2.prompts.rows"]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_depends_on_the_length_is_refused(
    small_mept: Make, kind: str
) -> None:
    """Constant keys are rotated once, for whatever length the text has."""
    folders = small_mept("llama", stochastic=True)
    path = folders.base / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= {
        "rope_type": kind, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    source = checkpoint.read(folders.ckpt, folders.base)
    prompts = source.contents.prompts
    assert prompts is not None
    assert prompts.constant
    with pytest.raises(BaseModelError, match=f"{kind}.*depends on the input's length"):
        build(task_config(source, 0), prompts=prompts)


def test_constant_keys_are_rotated_by_scaled_frequencies(small_mept: Make) -> None:
    folders = small_mept("llama", stochastic=True)
    path = folders.base / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    path.write_text(json.dumps(config))
    model = eager(checkpoint.read(folders.ckpt, folders.base))
    reference = MeptModel.load(folders.ckpt, folders.base)
    graph = prompted_llama.graphs(model)["model"].module
    ids, mask = batch(3, 6)
    with torch.no_grad(), traced_attention(model):
        found = graph(ids, mask)
        wanted = reference.hf(input_ids=ids, attention_mask=mask).logits
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=ATOL)
