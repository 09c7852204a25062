"""Declarations of an engine's graphs for TypeScript programs that use onnxruntime-web."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import TensorSpec
from eptc.targets import Target

__all__ = ["TypeScript"]


class TypeScript(Target):
    """Writes `engine.d.ts`: each graph's inputs and outputs, their types and shapes."""

    name = "typescript"
    optimize_for = "any"  # a browser has the standard operators

    def add(self, directory: Path, manifest: Manifest, out: Path) -> None:  # noqa: ARG002
        """Write the declarations."""
        lines = ['import type { TypedTensor } from "onnxruntime-common";', ""]
        for role, graph in manifest.graphs.items():
            lines += _interface(f"{role.capitalize()}Inputs", graph.inputs)
            lines += _interface(f"{role.capitalize()}Outputs", graph.outputs)
            lines += [f"export declare const {role}File: {json.dumps(graph.file)};", ""]
        labels = manifest.task.labels if manifest.task is not None else ()
        lines.append(f"export declare const labels: readonly {json.dumps(list(labels))};")
        (out / "engine.d.ts").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _interface(name: str, tensors: Sequence[TensorSpec]) -> list[str]:
    lines = [f"export interface {name} {{"]
    for tensor in tensors:
        shape = ", ".join(str(size) for size in tensor.shape)
        lines.append(f"  /** [{shape}] */")
        lines.append(f'  {json.dumps(tensor.name)}: TypedTensor<"{tensor.dtype}">;')
    return [*lines, "}", ""]
