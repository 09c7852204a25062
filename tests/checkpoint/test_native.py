"""Native checkpoints: both variants as their formulas say, complete, and refused where not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from eptc import checkpoint
from eptc.checkpoint.native import SCHEMA_VERSION, read_config
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.ir import Routed
from eptc.runtime.routing import RoutingSpec

Float64 = npt.NDArray[np.float64]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def _closed_form(written: Any, path: str, task_id: int) -> Float64:
    """The paper's sum over the chosen experts, by the index of every entry."""
    config, (out, columns) = written.config, written.shapes[path]

    def tensor(part: str) -> Float64:
        name = f"{path}.{part}" if f"{path}.{part}" in written.tensors else f"shared.{part}"
        return np.asarray(written.tensors[name], np.float64)

    logits = tensor("router.weight") @ tensor("task_embedding")[task_id]
    logits = logits / config["gate"]["temperature"]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = np.argsort(-p, kind="stable")[: config["top_k"]]
    weights = p[chosen]
    if config["gate"]["normalization"] == "sum":
        weights = weights / weights.sum()
    elif config["gate"]["normalization"] == "softmax":
        weights = np.exp(weights) / np.exp(weights).sum()

    rows, cols = np.arange(out)[:, None], np.arange(columns)[None, :]
    total = np.zeros((out, columns))
    for e, weight in zip(chosen, weights, strict=True):
        s, kernel = config["kernel_sizes"][e], tensor(f"kernels.{e}")
        z = tensor("B") @ tensor("A")
        expert = z[rows // s, cols // s] * kernel[rows % s, cols % s]
        total += weight * _scale(config, path, out, columns, s) * expert
    return total


def _scale(config: Any, path: str, out: int, columns: int, s: int) -> float:
    scale, own = config["scale"], config["modules"].get(path, {})
    if scale["rule"] == "d/T":
        return float(-(-min(out, columns) // s) / scale["denominator"])
    rank, alpha = own.get("rank", config["rank"]), own.get("alpha", scale["alpha"])
    return float(alpha / (rank if scale["rule"] == "alpha/r" else math.sqrt(rank)))


_GATE = {"router_input": "task", "temperature": 0.05, "normalization": "sum"}
_ROOT = {"rule": "alpha/sqrt(r)", "alpha": 8}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param((2, 3, 4), {}, id="plain"),
        pytest.param((1, 2), {}, id="kernel-of-one"),
        pytest.param((5, 16, 64, 128), {"top_k": 4}, id="large-kernels-all-experts"),
        pytest.param((2, 3, 4), {"top_k": 1}, id="one-expert"),
        pytest.param((2, 3, 4), {"top_k": 3, "spare": 5}, id="larger-factors"),
        pytest.param((2, 3, 4), {"sharing": "model"}, id="shared"),
        pytest.param((3, 7), {"sharing": "model", "spare": 2}, id="shared-and-larger"),
        pytest.param((2, 5), {"scale": {"rule": "d/T", "denominator": 4}}, id="d-over-t"),
        pytest.param((2, 5), {"scale": _ROOT}, id="root"),
        pytest.param((2, 5, 6), {"gate": {**_GATE, "normalization": "none"}}, id="none"),
        pytest.param((2, 5, 6), {"gate": {**_GATE, "normalization": "softmax"}}, id="softmax"),
        pytest.param((2, 5, 6), {"gate": {**_GATE, "temperature": 2.5}}, id="temperature"),
        pytest.param((2, 3), {"ranks": {UP: 6}}, id="own-rank"),
        pytest.param(
            (2, 3), {"modules": {UP: {"alpha": 3.5}, DOWN: {"alpha": 1}}}, id="own-alpha"
        ),
        pytest.param((2, 3, 4), {"dtype": "float16"}, id="float16"),
        pytest.param((2, 3, 4), {"rows": 9}, id="more-rows-than-tasks"),
    ],
)
def test_formula(
    write_paper: Callable[..., Any], sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    written = write_paper({UP: (50, 37), DOWN: (37, 50)}, sizes, **options)
    source = checkpoint.read(written.ckpt, written.base)

    assert source.contents.kernel_sizes == sizes
    for path, adapter in source.contents.adapters.items():
        for task_id in range(3):
            want = _closed_form(written, path, task_id)
            np.testing.assert_allclose(adapter.delta(task_id), want, rtol=0, atol=1e-10)
        for branch in adapter.branches:
            dense = branch.delta.dense()
            u, v = branch.delta.factors()
            np.testing.assert_allclose(u @ v, dense, rtol=0, atol=1e-12)
            assert np.linalg.matrix_rank(dense) <= branch.delta.rank_bound


@pytest.mark.parametrize("router_input", ["token", "token+task"])
@pytest.mark.parametrize("normalization", ["sum", "softmax", "none"])
def test_routers_that_read_tokens(
    write_paper: Callable[..., Any], router_input: str, normalization: str
) -> None:
    """The gates of each task, and the experts, from the tensors alone."""
    gate = {"router_input": router_input, "temperature": 0.5, "normalization": normalization}
    written = write_paper({UP: (50, 37), DOWN: (37, 50)}, (2, 3, 3, 4), gate=gate)
    contents = checkpoint.read(written.ckpt, written.base).contents

    assert contents.routing == RoutingSpec("token", reads_padding=False)
    for path, adapter in contents.adapters.items():
        router = adapter.input_router
        assert router is not None
        assert router.reads_task is (router_input == "token+task")
        assert [b.gate.expert for b in adapter.branches if isinstance(b.gate, Routed)] == [
            0, 1, 2, 3,
        ]  # fmt: skip
        parts = {name.removeprefix(f"{path}."): t for name, t in written.tensors.items()}
        x = np.random.default_rng(4).standard_normal((2, 5, parts["router.weight"].shape[1]))
        for task_id in range(3):
            u = x + parts["task_embedding"][task_id] if "+" in router_input else x
            logits = u @ parts["router.weight"].T.astype(np.float64) / 0.5
            p = np.exp(logits)
            p /= p.sum(-1, keepdims=True)
            first = np.sort(p, axis=-1)[..., -2:]
            kept = np.where(p >= first[..., :1], p, 0.0)
            if normalization == "sum":
                kept /= first.sum(-1, keepdims=True)
            elif normalization == "softmax":
                kept = np.where(kept > 0, np.exp(kept) / np.exp(first).sum(-1, keepdims=True), 0.0)
            found = router.for_task(task_id).gates(x)
            np.testing.assert_allclose(found, kept, rtol=0, atol=1e-9)
        rank, scale = written.config["rank"], written.config["scale"]
        assert {branch.scale for branch in adapter.branches} == {scale["alpha"] / rank}


@pytest.mark.parametrize(
    ("router_input", "routing", "words"),
    [
        ("task", "frozen", "routers read the task"),
        ("task", "batch", "routers read the task"),
        ("token", "batch", "routers read the token"),
        ("token+task", "per-sample", "exact or frozen"),
    ],
)
def test_routing_that_a_pyramid_does_not_have(
    write_paper: Callable[..., Any], router_input: str, routing: Any, words: str
) -> None:
    gate = {**_GATE, "router_input": router_input}
    written = write_paper({UP: (50, 37)}, (2, 3), gate=gate)
    with pytest.raises(OptionError, match=words):
        checkpoint.read(written.ckpt, written.base, routing=routing)


def test_the_released_variant_reads_the_task(write_paper: Callable[..., Any]) -> None:
    gate = {"router_input": "token", "temperature": 1.0, "normalization": "softmax"}
    written = write_paper({UP: (50, 37)}, (2, 3), gate=gate)
    _damaged(written, _set("variant", value="released"))
    with pytest.raises(CheckpointError, match="'released' and a router that reads 'token'"):
        checkpoint.read(written.ckpt, written.base)


def test_every_tensor_is_taken_once(write_paper: Callable[..., Any]) -> None:
    written = write_paper({UP: (50, 37), DOWN: (37, 50)}, (2, 3), sharing="model")
    contents = checkpoint.read(written.ckpt, written.base).contents
    used: set[int] = set()
    for adapter in contents.adapters.values():
        assert adapter.router is not None
        used |= {id(tensor) for tensor in adapter.router.tensors}
        used |= {id(tensor) for branch in adapter.branches for tensor in branch.delta.tensors}
    assert used == {id(tensor) for tensor in contents.tensors.values()}
    assert len(contents.tensors) == 2 + 2 * (2 + 2)


def _damaged(written: Any, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration on disk."""
    file = written.ckpt / "ept_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(config: dict[str, Any]) -> None:
        target: Any = config
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("schema_version", value=SCHEMA_VERSION + 1), "upgrade ept-compiler"),
        (_set("schema_version", value="1"), "schema_version: 1 was expected"),
        (_set("variant", value="published"), "variant"),
        (_set("kernel_sizes", value=[]), "kernel_sizes"),
        (_set("kernel_sizes", value=[2, 3.0]), "kernel_sizes/1: 3.0 is not of type 'integer'"),
        (_set("kernel_sizes", value=[2, True]), "kernel_sizes/1"),
        (_set("top_k", value=0), "top_k"),
        (_set("top_k", value=2.0), "top_k: 2.0 is not of type 'integer'"),
        (_set("top_k", value=3), "top_k 3 of 2 experts"),
        (_set("rank", value=5), r"expected: \[5, any\]"),
        (_set("gate", "router_input", value="tokens"), "gate/router_input"),
        (_set("gate", "temperature", value=0), "gate/temperature"),
        (_set("gate", "temperature", value=math.nan), "not finite"),
        (_set("scale", "alpha", value=math.inf), "not finite"),
        (_set("scale", value={"rule": "d/T", "denominator": math.inf}), "not finite"),
        (_set("scale", value={"rule": "d/T"}), "scale"),
        (_set("modules", value={UP: {"alpha": math.nan}}), "not finite"),
        (_set("modules", value={"model.norm": {"rank": 2}}), "`modules` names model.norm"),
        (_set("modules", value={UP: {"rnk": 2}}), "'rnk' was unexpected"),
        (_set("sharing", value="model"), "no tensor shared.ept.A"),
        (_set("targets", value=["down_proj"]), "which none of its targets names"),
        (_set("targets", value=["up_proj", "down_proj", "o_proj"]), "no tensors for 1 linears"),
        (_set("tasks", value=[]), "tasks"),
        (_set("tasks", 1, "name", value="task0"), "names a task twice"),
        (_set("tasks", 1, "metrics", value="x"), "'metrics' was unexpected"),
        (_set("base", "model_type", value="bert"), "trained on a bert model"),
        (_set("base", "sha256", value="abc"), "base/sha256"),
        (_set("colour", value="red"), "'colour' was unexpected"),
        (lambda config: config.pop("top_k"), "'top_k' is a required property"),
        (lambda config: config.pop("gate"), "'gate' is a required property"),
    ],
)
def test_bad_configurations(
    write_paper: Callable[..., Any], change: Callable[[dict[str, Any]], object], words: str
) -> None:
    written = write_paper({UP: (12, 10), DOWN: (10, 12)}, (2, 3))
    other = np.zeros((4, 4), np.float32)
    base = written.base / "model.safetensors"
    tensors = safetensors.numpy.load_file(base) | {"model.layers.0.self_attn.o_proj.weight": other}
    safetensors.numpy.save_file(tensors, base)
    _damaged(written, change)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(written.ckpt, written.base)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"text"', "\x00", "[" * 100_000])
def test_a_configuration_that_is_no_json_object(
    write_paper: Callable[..., Any], text: str
) -> None:
    written = write_paper({UP: (12, 10)}, (2, 3))
    (written.ckpt / "ept_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        checkpoint.read(written.ckpt, written.base)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{UP}.ept.A", None, f"no tensor {UP}.ept.A"),
        (f"{UP}.ept.kernels.1", None, f"no tensor {UP}.ept.kernels.1"),
        (f"{UP}.ept.router.weight", None, "router.weight"),
        (f"{UP}.ept.task_embedding", None, "task_embedding"),
        (f"{UP}.ept.kernels.2", np.ones((4, 4)), "nothing uses: .*kernels.2"),
        (f"{UP}.ept.router.bias", np.ones(2), "nothing uses: .*router.bias"),
        ("shared.ept.A", np.ones((3, 9)), "nothing uses: shared.ept.A"),
        ("extra", np.ones(3), "nothing uses: extra"),
        (f"{UP}.ept.C", np.ones(3), "nothing uses"),
        ("heads.task9.lm_head.weight", np.ones(3), "names no task"),
        ("lm_head.ept.A", np.ones((3, 3)), "none of its targets names"),
        (f"{UP}.ept.A", np.ones((3, 4)), "or larger"),
        (f"{UP}.ept.A", np.ones((2, 5)), "shape"),
        (f"{UP}.ept.B", np.ones((5, 3)), "or larger"),
        (f"{UP}.ept.kernels.0", np.ones((2, 3)), "shape"),
        (f"{UP}.ept.task_embedding", np.ones((2, 10)), "at least 3"),
        (f"{UP}.ept.router.weight", np.ones((2, 9)), "does not fit the adapters"),
        (f"{UP}.ept.kernels.0", np.full((2, 2), np.nan), r"kernels.0 .* nan at \[0, 0\]"),
        (f"{UP}.ept.B", np.full((6, 3), -np.inf), "has -inf at"),
        (f"{UP}.ept.kernels.0", np.ones((2, 2), np.int64), "type int64"),
    ],
)
def test_bad_tensors(write_paper: Callable[..., Any], name: str, value: Any, words: str) -> None:
    written = write_paper({UP: (12, 10)}, (2, 3))
    file = written.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value.astype(np.float32) if value.dtype == np.float64 else value
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(written.ckpt, written.base)


def test_options_that_contradict(write_paper: Callable[..., Any]) -> None:
    written = write_paper({UP: (12, 10)}, (2, 3))
    names = ("task0", "task1", "task2")
    agreed = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=names)
    assert agreed.contents.top_k == 2
    with pytest.raises(OptionError, match="--top-k 1 contradicts"):
        checkpoint.read(written.ckpt, written.base, top_k=1)
    with pytest.raises(OptionError, match="--tasks task1,task0,task2 contradicts"):
        checkpoint.read(written.ckpt, written.base, tasks=("task1", "task0", "task2"))
    with pytest.raises(OptionError, match="describes its tasks itself"):
        checkpoint.read(written.ckpt, written.base, task_spec=written.ckpt / "tasks.json")


def test_a_task_that_is_not_well_formed(write_paper: Callable[..., Any]) -> None:
    """What the schema cannot say of a task is said by the task."""
    written = write_paper({UP: (12, 10)}, (2, 3))
    _damaged(written, _set("tasks", 0, "prompt", value="{nothing}"))
    with pytest.raises(TaskError, match="'nothing'"):
        checkpoint.read(written.ckpt, written.base)


_RELEASED_GATE = {"router_input": "task", "temperature": 1.0, "normalization": "softmax"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": _GATE}, "temperature 1.0"),
        ({"scale": {"rule": "d/T", "denominator": 3}}, "scale 'd/T'"),
        ({"sharing": "model"}, "sharing 'model'"),
        ({"kernel_sizes": [1, 2]}, "kernel size of 1"),
    ],
)
def test_rules_of_the_released_variant(
    write_paper: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    written = write_paper({UP: (12, 10)}, (2, 3))
    _damaged(written, _set("variant", value="released"))
    _damaged(written, _set("gate", value=_RELEASED_GATE))
    read_config(written.ckpt)
    for key, value in options.items():
        _damaged(written, _set(key, value=value))
    with pytest.raises(CheckpointError, match=words):
        read_config(written.ckpt)


def test_heads_go_to_the_task_with_the_longest_name(copy_native: Any) -> None:
    """Of the tasks `tone` and `tone.long`, heads.tone.long.x belongs to the latter."""
    config_file = copy_native.ckpt / "ept_config.json"
    config = json.loads(config_file.read_text())
    config["tasks"][1]["name"] = "tone.long"
    config_file.write_text(json.dumps(config))
    file = copy_native.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    renamed = {n.replace("heads.same.", "heads.tone.long."): t for n, t in tensors.items()}
    safetensors.numpy.save_file(renamed, file)
    heads = checkpoint.read(copy_native.ckpt, copy_native.base).contents.heads
    assert heads.keys() == {"tone", "tone.long", "score"}
    names = {"classifier.weight", "classifier.bias"}
    assert all(names <= set(head) for head in heads.values())


def test_a_task_without_a_head(copy_native: Any) -> None:
    file = copy_native.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    kept = {n: t for n, t in tensors.items() if not n.startswith("heads.same.")}
    safetensors.numpy.save_file(kept, file)
    with pytest.raises(CheckpointError, match="none for 'same'"):
        checkpoint.read(copy_native.ckpt, copy_native.base)
