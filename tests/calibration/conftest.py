"""Exact engines, and what is made of their graphs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx_ir
import pytest

import eptc
from eptc import lower
from eptc.bundle import write_manifest
from eptc.calibration import float_values
from eptc.passes.cast_half import CastHalf
from eptc.passes.stable_names import StableNames
from eptc.run_passes import run_graph_passes
from eptc.runtime.manifest import load_manifest

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")

Graphs = dict[str, onnx_ir.Model]
Rewrite = Callable[[Path, Path, Callable[[Graphs], None]], Path]


class Halve(Protocol):
    """Writes an engine in 16 bits."""

    def __call__(
        self,
        source: Path,
        out: Path,
        dtype: str = "float16",
        ranges: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Path: ...


@pytest.fixture(scope="session")
def classifier(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of one layer, in float32."""
    out = tmp_path_factory.mktemp("exact") / "classifier"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out, verify=False)
    return out


@pytest.fixture(scope="session", params=["t5-tiny", "llama-tiny"])
def writer(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An engine that writes text, in float32."""
    folder = golden / "ept" / request.param
    out: Path = tmp_path_factory.mktemp("exact") / request.param
    eptc.export(
        folder / "adapter", base=folder / "base", task="sst2", tasks=GLUE, top_k=2, out=out,
        verify=False,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def rewrite() -> Rewrite:
    """Return a function that writes a copy of a bundle with changed graphs."""
    return rewritten


def rewritten(source: Path, out: Path, change: Callable[[Graphs], None]) -> Path:
    manifest = load_manifest(source)
    graphs = {name: onnx_ir.load(source / s.file) for name, s in manifest.graphs.items()}
    change(graphs)
    out.mkdir()
    lower.write(graphs, out)
    written = {path.name for path in out.iterdir()}
    for name in set(manifest.files) - written:
        shutil.copyfile(source / name, out / name)
    specs = {}
    for name, spec in manifest.graphs.items():
        types = {
            str(value.name): value.dtype.numpy().name
            for value in (*graphs[name].graph.inputs, *graphs[name].graph.outputs)
            if value.dtype is not None
        }
        inputs, outputs = (
            tuple(dataclasses.replace(tensor, dtype=types[tensor.name]) for tensor in side)
            for side in (spec.inputs, spec.outputs)
        )
        specs[name] = dataclasses.replace(spec, inputs=inputs, outputs=outputs)
    write_manifest(out, dataclasses.replace(manifest, graphs=specs, files={}))
    return out


@pytest.fixture(scope="session")
def halve() -> Halve:
    """Return a function that writes an engine in 16 bits."""

    def write(
        source: Path,
        out: Path,
        dtype: str = "float16",
        ranges: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Path:
        def change(graphs: Graphs) -> None:
            steps = {
                name: CastHalf(dtype, (ranges or {}).get(name, {}))  # type: ignore[arg-type]
                for name in graphs
            }
            run_graph_passes(graphs, [steps, StableNames()])

        return rewritten(source, out, change)

    return write


@pytest.fixture(scope="session")
def all_values() -> Callable[[Path], dict[str, list[str]]]:
    """Return a function that names every float32 value of a bundle's graphs."""

    def names(bundle: Path) -> dict[str, list[str]]:
        manifest = load_manifest(bundle)
        return {
            name: float_values(onnx_ir.load(bundle / spec.file))
            for name, spec in manifest.graphs.items()
        }

    return names
