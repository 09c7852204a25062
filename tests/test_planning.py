"""What a build is predicted to take: against builds, and against limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc import planning
from eptc.errors import OptionError, TaskError
from eptc.job import Job
from eptc.options import Options
from eptc.tensors import ComputedTensor, StoredTensor

RELEASED: dict[str, Any] = {
    "top_k": 2,
    "tasks": ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"],
}


def test_size_is_the_built_one(small_native: Any, tmp_path: Path) -> None:
    predicted = eptc.plan(small_native.ckpt, task="tone", base=small_native.base)
    built = eptc.export(
        small_native.ckpt, task="tone", base=small_native.base, out=tmp_path / "out", verify=False
    )
    size = built.manifest.files["weights.bin"].size
    # Constants of up to a kilobyte are in the graph; large tensors start on a page.
    tensors = len(list(small_native.base.glob("*.safetensors"))) + 200
    assert abs(predicted.weight_bytes - size) <= 4096 * tensors
    assert predicted.verification == "whole model"
    assert not predicted.own_process


@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_no_weight_of_the_base_is_read(
    golden: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sound = golden / "ept" / name, StoredTensor.numpy

    def numpy(self: StoredTensor) -> Any:
        assert self.path.parent != folder / "base", f"{self.name} was read"
        return sound(self)

    monkeypatch.setattr(StoredTensor, "numpy", numpy)
    found = eptc.plan(folder / "adapter", task="sst2", base=folder / "base", **RELEASED)
    assert found.weight_bytes > 0


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        ("fp32", 1.0, 1.0), ("fp16", 0.5, 0.505), ("bf16", 0.5, 0.505), ("int8", 0.25, 0.26),
        ("int8-static", 0.25, 0.26), ("fp8", 0.25, 0.26), ("fp8-fp16", 0.25, 0.26),
        ("int8-weights", 0.25, 0.27), ("int4", 0.125, 0.18),
    ],
)  # fmt: skip
def test_sizes_of_precisions(golden: Path, precision: Any, least: float, most: float) -> None:
    """As parts of float32, at the widths of a large model; matrices shorter than a block stay."""
    wide = ComputedTensor("wide", "float16", (4096, 11008), lambda: pytest.fail("read"))
    taken = planning._stored_bytes(wide, precision)
    assert least <= taken / (4 * 4096 * 11008) <= most
    norm = dataclasses.replace(wide, shape=(4096,))
    assert planning._stored_bytes(norm, precision) == 4 * 4096
    folder = golden / "ept" / "llama-tiny"
    options: dict[str, Any] = {"optimize_for": "cuda"} if precision == "bf16" else {}
    if precision in ("int8-static", "fp8", "fp8-fp16"):
        options["calibration"] = "never read"
    if precision.startswith("fp8"):
        options["optimize_for"] = "any"
    found = eptc.plan(
        folder / "adapter", task="sst2", base=folder / "base", precision=precision, **RELEASED,
        **options,
    )  # fmt: skip
    assert found.stored == precision


@pytest.mark.parametrize(
    ("precision", "width"), [("int8-static", 4), ("fp8", 4), ("int8-fp16", 2), ("fp8-fp16", 2)]
)
def test_explicit_quantization_leaves_the_table(
    small_native: Any, small_rows: Any, precision: Any, width: int
) -> None:
    """Two or four bytes a number instead of one and a scale a row."""
    table = "bert.embeddings.word_embeddings.weight"
    given: dict[str, Any] = {"task": "score", "base": small_native.base}
    found = Job.read(small_native.ckpt, Options(**given)).source.weights[table]
    explicit = {"precision": precision, "calibration": small_rows.texts, "optimize_for": "any"}
    one, other = (
        eptc.plan(small_native.ckpt, **given, **options).weight_bytes
        for options in (explicit, {"precision": "int8"})
    )
    assert one - other == (width - 1) * found.shape[0] * found.shape[1] - 4 * found.shape[0] > 0


def test_a_large_model_is_verified_elsewhere(
    small_native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_LARGE", 0)
    options: dict[str, Any] = {"task": "tone", "base": small_native.base}
    assert eptc.plan(small_native.ckpt, **options).own_process
    assert not eptc.plan(small_native.ckpt, verify=False, **options).own_process


def test_little_memory_means_block_by_block(
    small_native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"task": "tone", "base": small_native.base}
    whole = eptc.plan(small_native.ckpt, **options)
    monkeypatch.setattr(planning, "available_memory", lambda: whole.verifier_peak - 1)
    assert eptc.plan(small_native.ckpt, **options).verification == "block by block"
    monkeypatch.setattr(planning, "available_memory", lambda: None)
    assert eptc.plan(small_native.ckpt, **options).verification == "whole model"


def test_a_limit_that_is_too_small(small_native: Any) -> None:
    options: dict[str, Any] = {"task": "tone", "base": small_native.base}
    with pytest.raises(OptionError, match=r"takes \d+MB.*the limit is 10MB") as found:
        eptc.plan(small_native.ckpt, max_memory=10_000_000, **options)
    assert "--max-memory" in str(found.value)


def test_in_flight_bytes_give_way_first(
    small_native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than refuse, less is held at once."""
    options: dict[str, Any] = {"task": "tone", "base": small_native.base, "verify": False}
    monkeypatch.setattr(planning, "IN_FLIGHT", 40_000)
    generous = eptc.plan(small_native.ckpt, **options)
    tight = eptc.plan(small_native.ckpt, max_memory=generous.compiler_peak - 1, **options)
    assert tight.in_flight < generous.in_flight
    assert tight.compiler_peak < generous.compiler_peak


def test_bad_input_is_found_first(small_native: Any) -> None:
    with pytest.raises(TaskError, match="nothing"):
        eptc.plan(small_native.ckpt, task="nothing", base=small_native.base)
    with pytest.raises(OptionError, match="precision is 'half'"):
        eptc.plan(small_native.ckpt, task="tone", base=small_native.base, precision="half")


def test_dry_run(cli: Any, small_native: Any, tmp_path: Path) -> None:
    arguments = ("export", small_native.ckpt, "--base", small_native.base, "--task", "tone")
    said = cli(*arguments, "--dry-run")
    assert said.code == 0
    assert "of weights (fp32)" in said.stdout
    data = json.loads(cli(*arguments, "--dry-run", "--json").stdout)
    assert data["verification"] == "whole model"
    out = tmp_path / "out"
    assert cli(*arguments, "--dry-run", "-o", out).code == 0
    assert not out.exists()


def test_an_export_needs_a_place(cli: Any, small_native: Any) -> None:
    result = cli("export", small_native.ckpt, "--base", small_native.base, "--task", "tone")
    assert result.code == 2
    assert "--out" in result.stderr


@pytest.mark.parametrize(
    ("size", "words"),
    [("much", "size such as"), ("0GB", "size such as"), ("-1GB", "size such as"), ("5", "limit")],
)
def test_sizes_that_are_none(cli: Any, small_native: Any, size: str, words: str) -> None:
    result = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "tone", "--dry-run",
        f"--max-memory={size}",
    )  # fmt: skip
    assert result.code == 2
    assert words in result.stderr


def test_sizes(cli: Any, small_native: Any) -> None:
    for size, wanted in (("4GB", 4 * 10**9), ("4GiB", 4 * 2**30), ("4000.5 mb", 4000500000)):
        result = cli(
            "export", small_native.ckpt, "--base", small_native.base, "--task", "tone",
            "--dry-run", "--json", "--max-memory", size,
        )  # fmt: skip
        assert json.loads(result.stdout)["limit"] == wanted
