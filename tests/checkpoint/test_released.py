"""Folders of the released code: routes and weights as recorded, and as the formula says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from eptc import checkpoint
from eptc.checkpoint import Checkpoint
from eptc.errors import CheckpointError, OptionError, TaskError

Float64 = npt.NDArray[np.float64]
SETS = ("t5-tiny", "t5-topk1", "t5-gated-tiny", "llama-tiny")
NAMES = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
LINEAR = "model.layers.0.mlp.up_proj"


def _read_golden(golden: Path, name: str, adapter: str = "adapter", **options: Any) -> Checkpoint:
    folder = golden / "ept" / name
    meta = json.loads((folder / "meta.json").read_text())
    return checkpoint.read(
        folder / adapter, folder / "base", top_k=meta["moe_top_k"], tasks=meta["tasks"], **options
    )


@pytest.mark.parametrize("name", SETS)
def test_recorded_routes(golden: Path, name: str) -> None:
    recorded = json.loads((golden / "ept" / name / "golden" / "routes.json").read_text())
    adapters = _read_golden(golden, name).contents.adapters

    assert len(recorded) == 8
    for task_id, modules in recorded.items():
        assert modules.keys() == adapters.keys()
        for path, want in modules.items():
            router = adapters[path].router
            assert router is not None
            route = router.route(int(task_id))
            assert list(route.experts) == want["experts"]
            # Recorded in float32; computed in float64.
            np.testing.assert_allclose(route.weights, want["weights"], rtol=0, atol=1e-6)
            probabilities = router.probabilities(int(task_id))
            np.testing.assert_allclose(probabilities, want["probs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_recorded_weights(golden: Path, name: str) -> None:
    adapters = _read_golden(golden, name).contents.adapters
    with np.load(golden / "ept" / name / "golden" / "layers.npz") as recorded:
        modules = sorted({key.split("|")[0] for key in recorded.files})
        assert len(modules) == 3
        for path in modules:
            for task_id, want in enumerate(recorded[f"{path}|dW"]):
                got = adapters[path].delta(task_id)
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_factors_agree_with_dense(golden: Path, name: str) -> None:
    adapters = _read_golden(golden, name).contents.adapters
    for adapter in (adapters[path] for path in sorted(adapters)[::5]):
        for branch in adapter.branches:
            dense = branch.delta.dense()
            u, v = branch.delta.factors()
            np.testing.assert_allclose(u @ v, dense, rtol=0, atol=1e-14)
            assert np.linalg.matrix_rank(dense) <= branch.delta.rank_bound <= u.shape[1]


def _softmax(x: Float64) -> Float64:
    powers = np.exp(x - x.max())
    return np.asarray(powers / powers.sum())


def _closed_form(written: Any, path: str, scale: float, k: int, task_id: int) -> Float64:
    """The sum of the chosen experts, entry by entry as the formula is written."""
    out, columns = written.shapes[path]
    t = {
        name.removeprefix(f"{path}."): tensor.astype(np.float64)
        for name, tensor in written.tensors.items()
        if name.startswith(f"{path}.")
    }
    p = _softmax(t["router.weight"] @ t["task_embedding"][task_id] + t["router.bias"])
    chosen = np.argsort(-p, kind="stable")[:k]
    total = np.zeros((out, columns))
    for e, weight in zip(chosen, _softmax(p[chosen]), strict=True):
        kernel = t[f"kernels.{e}"]
        cells, s = kernel.shape
        width = max(1, columns // s)
        for o in range(min(out, cells * s)):
            row = t["B"][o // s] @ t["A"][:, :width]
            total[o, :width] += scale * weight * kernel[o // s, o % s] * row
    return total


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("out", "columns", "sizes"),
    [
        (48, 64, (2, 2, 4, 4, 6, 6, 8, 8)),
        (33, 47, (2, 3, 5, 7)),  # nothing divides
        (130, 257, (2, 16, 64, 128)),
        (9, 40, (2, 8, 16, 64)),  # kernels taller than the output
        (40, 9, (2, 8, 16, 64)),  # and wider than the input
        (2, 2, (2, 3, 4, 5)),
        (31, 12, (3, 3, 3, 3)),
    ],
)
def test_formula(
    write_released: Callable[..., Any], out: int, columns: int, sizes: tuple[int, ...], k: int
) -> None:
    written = write_released({LINEAR: (out, columns)}, sizes, rank=3)
    source = checkpoint.read(written.ckpt, written.base, top_k=k, tasks=NAMES)

    adapter = source.contents.adapters[LINEAR]
    assert source.contents.kernel_sizes == sizes
    for task_id in (0, 5):
        want = _closed_form(written, LINEAR, 16 / 3, k, task_id)
        np.testing.assert_allclose(adapter.delta(task_id), want, rtol=0, atol=1e-11)
        assert np.abs(want).max() > 0
    for branch in adapter.branches:
        u, v = branch.delta.factors()
        np.testing.assert_allclose(u @ v, branch.delta.dense(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("count", [5, 6])
def test_fewer_tasks_than_rows(write_released: Callable[..., Any], count: int) -> None:
    written = write_released({LINEAR: (12, 10)}, (2, 4))
    source = checkpoint.read(written.ckpt, written.base, top_k=1, tasks=NAMES[:count])
    assert [task.name for task in source.contents.tasks] == list(NAMES[:count])


def test_ties_go_to_the_lower_expert(write_released: Callable[..., Any]) -> None:
    written = write_released({LINEAR: (12, 10)}, (2, 3, 4))
    file = written.ckpt / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name in tensors:
        if "lora_gate" in name:
            tensors[name] = np.zeros_like(tensors[name])
    safetensors.numpy.save_file(tensors, file)
    source = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)
    router = source.contents.adapters[LINEAR].router
    assert router is not None
    assert router.route(3).experts == (0, 1)
    assert router.route(3).margin == 0.0


@pytest.mark.parametrize(
    ("options", "ranks", "scales"),
    [
        pytest.param({"use_rslora": True}, {}, (16 / 2.0, 16 / 2.0), id="rslora"),
        pytest.param(
            {"rank_pattern": {"up_proj": 6}}, {"up": 6}, (16 / 6, 16 / 4), id="rank-pattern"
        ),
        pytest.param({"alpha_pattern": {"up_proj": 3}}, {}, (3 / 4, 16 / 4), id="alpha-pattern"),
        pytest.param(
            {"alpha_pattern": {"layers.0.mlp.down_proj": 5.5}}, {}, (16 / 4, 5.5 / 4), id="path"
        ),
        pytest.param(
            {
                "rank_pattern": {"up_proj": 9},
                "alpha_pattern": {"up_proj": 2, "down_proj": 3},
                "use_rslora": True,
            },
            {"up": 9},
            (2 / 3.0, 3 / 2.0),
            id="everything",
        ),
        pytest.param(
            {"rank_pattern": {r"layers\.\d+\.mlp\.(up|down)_proj": 5}},
            {"up": 5, "down": 5},
            (16 / 5, 16 / 5),
            id="pattern-is-a-regular-expression",
        ),
    ],
)
def test_scales(
    write_released: Callable[..., Any],
    options: dict[str, Any],
    ranks: dict[str, int],
    scales: tuple[float, float],
) -> None:
    up, down = LINEAR, LINEAR.replace("up", "down")
    written = write_released(
        {up: (24, 20), down: (20, 24)},
        (2, 3, 4),
        ranks={{"up": up, "down": down}[name]: rank for name, rank in ranks.items()},
        **options,
    )
    source = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)
    for path, scale in zip((up, down), scales, strict=True):
        got = source.contents.adapters[path].delta(1)
        want = _closed_form(written, path, scale, 2, 1)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


def test_the_first_pattern_that_matches_counts_for_both(
    write_released: Callable[..., Any],
) -> None:
    """As in PEFT 0.10: a key of one pattern is looked up in the other as well."""
    written = write_released(
        {LINEAR: (24, 20)},
        (2, 3),
        ranks={LINEAR: 6},
        rank_pattern={"up_proj": 6},
        alpha_pattern={"mlp.up_proj": 99},
    )
    source = checkpoint.read(written.ckpt, written.base, top_k=1, tasks=NAMES)
    assert source.contents.adapters[LINEAR].branches[0].scale == pytest.approx(16 / 6)


def test_pickle_equals_safetensors(golden: Path) -> None:
    plain = _read_golden(golden, "t5-tiny")
    pickled = _read_golden(golden, "t5-tiny", "adapter_bin", allow_pickle=True)
    assert pickled.sha256 == plain.sha256
    assert pickled.contents.tensors.keys() == plain.contents.tensors.keys()
    for path, adapter in plain.contents.adapters.items():
        np.testing.assert_array_equal(pickled.contents.adapters[path].delta(6), adapter.delta(6))


def test_safetensors_are_preferred_to_a_pickle(copy_golden: Callable[..., Any]) -> None:
    folders = copy_golden()
    (folders.ckpt / "adapter_model.bin").write_bytes(b"not a pickle")
    source = checkpoint.read(folders.ckpt, folders.base, top_k=2, tasks=NAMES, allow_pickle=True)
    assert len(source.contents.tensors) == 416


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types(write_released: Callable[..., Any], dtype: str) -> None:
    """Adapters are used in the precision they are stored in."""
    written = write_released({LINEAR: (24, 20)}, (2, 3))
    file = written.ckpt / "adapter_model.safetensors"
    tensors = {
        name: torch.from_numpy(tensor).to(getattr(torch, dtype))
        for name, tensor in safetensors.numpy.load_file(file).items()
    }
    file.unlink()
    safetensors.torch.save_file(tensors, file)
    stored = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)
    for name, tensor in stored.contents.tensors.items():
        want = tensors[name].double().numpy()
        np.testing.assert_array_equal(tensor.numpy().astype(np.float64), want)
    digest = stored.sha256
    file.unlink()
    torch.save(tensors, written.ckpt / "adapter_model.bin")
    pickled = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES, allow_pickle=True)
    assert pickled.sha256 == digest


def test_parameters_in_a_pickle(write_released: Callable[..., Any]) -> None:
    """A state dict of parameters, as `torch.save(model.state_dict())` may hold."""
    written = write_released({LINEAR: (24, 20)}, (2, 3))
    file = written.ckpt / "adapter_model.safetensors"
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(tensor))
        for name, tensor in safetensors.numpy.load_file(file).items()
    }
    plain = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)
    want = plain.sha256
    file.unlink()
    torch.save(parameters, written.ckpt / "adapter_model.bin")
    pickled = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES, allow_pickle=True)
    assert pickled.sha256 == want


def test_a_trainer_folder_with_everything_it_writes(copy_golden: Callable[..., Any]) -> None:
    folders = copy_golden()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folders.ckpt / name).write_bytes(b"\x80never read")
    (folders.ckpt / "trainer_state.json").write_text("{}")
    source = checkpoint.read(folders.ckpt, folders.base, top_k=2, tasks=NAMES)
    assert len(source.contents.adapters) == 32
    shutil.copytree(folders.ckpt, folders.root / "runs" / "checkpoint-300")
    with pytest.raises(CheckpointError, match=r"such as .*checkpoint-300"):
        checkpoint.read(folders.root / "runs", folders.base, top_k=2, tasks=NAMES)


def test_every_tensor_is_taken_once(golden: Path) -> None:
    """Each one is part of exactly one adapter, A and B of all its branches alike."""
    contents = _read_golden(golden, "llama-tiny").contents
    used: list[int] = []
    for adapter in contents.adapters.values():
        assert adapter.router is not None
        first = adapter.branches[0].delta
        used += [id(tensor) for tensor in adapter.router.tensors]
        used += [id(tensor) for tensor in first.tensors[:2]]
        for branch in adapter.branches:
            assert branch.delta.tensors[:2] == first.tensors[:2]
            used.append(id(branch.delta.tensors[2]))
    assert len(used) == len(set(used)) == len(contents.tensors) == 12 * 13
    assert set(used) == {id(tensor) for tensor in contents.tensors.values()}


@pytest.mark.parametrize(("name", "says"), [("t5-tiny", "2 or more"), ("t5-topk1", "suggests 1")])
def test_top_k_is_suggested_from_the_gates(golden: Path, name: str, says: str) -> None:
    folder = golden / "ept" / name
    with pytest.raises(OptionError, match="how many experts") as error:
        checkpoint.read(folder / "adapter", folder / "base", tasks=NAMES)
    assert says in str(error.value)
    assert "not a proof" in str(error.value)
    assert "nowhere" in str(error.value)


def _shape_cases() -> list[Any]:
    """Any part of an adapter that is not what the format says."""
    a, b, gate = "lora_A.weight", "lora_B.weight", "lora_gate.0.weight"
    return [
        pytest.param(part, shape, id=f"{part}-{'x'.join(map(str, shape))}")
        for part, shapes in {
            a: [(), (4,), (4, 9), (5, 10), (0, 10), (4, 10, 1)],
            b: [(), (12,), (11, 4), (12, 5)],
            gate: [(), (20,), (2, 20), (3, 21)],
            "lora_gate.0.bias": [(), (2,), (3, 1), (0,)],
            "lora_task_embedding.weight": [(), (8,), (8, 19), (0, 20)],
            "lora_expert_kernels.1": [(), (8, 3), (1, 8, 3), (1, 7, 3, 1), (1, 8, 3, 2)],
        }.items()
        for shape in shapes
    ]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("part", "shape"), _shape_cases())
def test_other_shapes_are_refused(
    write_released: Callable[..., Any], part: str, shape: tuple[int, ...], top_k: int | None
) -> None:
    written = write_released({LINEAR: (24, 20)}, (2, 3, 4))
    file = written.ckpt / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = f"base_model.model.{LINEAR}.{part}"
    tensors[name] = np.zeros(shape, np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises((CheckpointError, OptionError)):
        checkpoint.read(written.ckpt, written.base, top_k=top_k, tasks=NAMES)


@pytest.mark.parametrize(
    "missing",
    ["lora_A.weight", "lora_B.weight", "lora_gate.0.bias", "lora_gate.0.weight",
     "lora_task_embedding.weight", "lora_expert_kernels.0", "lora_expert_kernels.2"],
)  # fmt: skip
def test_missing_tensors_are_named(write_released: Callable[..., Any], missing: str) -> None:
    """Of two linears one lacks a part; the last expert's kernel is missed by its neighbour."""
    other = LINEAR.replace("up", "down")
    written = write_released({LINEAR: (24, 20), other: (20, 24)}, (2, 3, 4))
    file = written.ckpt / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors[f"base_model.model.{LINEAR}.{missing}"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"up_proj.{missing}"):
        checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"use_dora": True}, "DoRA"),
        ({"fan_in_fan_out": True}, "stored transposed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"loftq_config": {"bits": 4}}, "quantised base"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"r": "four"}, "sound r or lora_alpha"),
        ({"r": None}, "sound r or lora_alpha"),
        ({"r": 0}, "ranks"),
        ({"lora_alpha": None}, "sound r or lora_alpha"),
        ({"lora_alpha": float("nan")}, "alphas .*nan"),
        ({"rank_pattern": [1, 2]}, "sound r or lora_alpha"),
        ({"rank_pattern": {"up_proj": "many"}}, "sound r or lora_alpha"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": {"up_proj": -math.inf}}, "alphas .*inf"),
    ],
)
def test_options_that_change_the_arithmetic_are_refused(
    write_released: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    written = write_released({LINEAR: (24, 20)}, (2, 3))
    file = written.ckpt / "adapter_config.json"
    file.write_text(json.dumps({**written.config, **options}))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)


def test_numbers_written_as_text(write_released: Callable[..., Any]) -> None:
    written = write_released(
        {LINEAR: (24, 20)}, (2, 3), r="4", lora_alpha="8", alpha_pattern={"up_proj": "2"}
    )
    source = checkpoint.read(written.ckpt, written.base, top_k=1, tasks=NAMES)
    assert source.contents.adapters[LINEAR].branches[0].scale == 0.5


def test_tasks_without_a_description_only_generate(write_released: Callable[..., Any]) -> None:
    written = write_released({LINEAR: (24, 20)}, (2, 3))
    source = checkpoint.read(written.ckpt, written.base, top_k=1, tasks=("mine", "sst2"))
    assert [task.kind for task in source.contents.tasks] == ["generation", "text-to-text"]


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        (None, OptionError, "save.* nowhere"),
        ((), OptionError, "save.* nowhere"),
        (tuple(f"t{i}" for i in range(9)), OptionError, "names 9 tasks"),
        (("a", "b", "a"), TaskError, "listed twice"),
    ],
)
def test_bad_tasks(
    write_released: Callable[..., Any],
    tasks: tuple[str, ...] | None,
    error: type[Exception],
    words: str,
) -> None:
    written = write_released({LINEAR: (24, 20)}, (2, 3))
    with pytest.raises(error, match=words):
        checkpoint.read(written.ckpt, written.base, top_k=1, tasks=tasks)


def test_small_margins_are_reported(write_released: Callable[..., Any]) -> None:
    written = write_released({LINEAR: (24, 20)}, (2, 3, 4))
    source = checkpoint.read(written.ckpt, written.base, top_k=2, tasks=NAMES)
    router = source.contents.adapters[LINEAR].router
    assert router is not None
    p = sorted(router.probabilities(4), reverse=True)
    assert router.route(4).margin == pytest.approx(math.log(p[1]) - math.log(p[2]))


@pytest.mark.parametrize("routing", ["frozen", "batch", "per-sample"])
def test_routes_are_the_tasks_alone(write_released: Callable[..., Any], routing: Any) -> None:
    written = write_released({LINEAR: (24, 20)}, (2, 3))
    with pytest.raises(OptionError, match=f"--routing {routing} .*no route reads the input"):
        checkpoint.read(written.ckpt, written.base, top_k=1, tasks=NAMES, routing=routing)
