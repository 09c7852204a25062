"""The graphs of a pack: over the base, with tasks as optional inputs, and without branches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir

from eptc import lower
from eptc.checkpoint import Checkpoint
from eptc.describe import OPSET
from eptc.errors import InternalError
from eptc.fitting import task_config
from eptc.lower.task_inputs import declare_optional, insert_factors, insert_heads
from eptc.lower.weights import WeightTensor, bound
from eptc.pipeline import graph_passes
from eptc.precision import OptimizeFor
from eptc.run_passes import PassRecord, run_graph_passes
from eptc.runtime.pack_spec import LABELS, HeadSpec, LinearSpec
from eptc.skeletons import known_parameters, skeleton

__all__ = ["FOLDED", "PackGraphs", "head_sizes"]

# Before the name of a graph: that of the same without branches.
FOLDED = "folded."

Sizes = tuple[int | str, ...]


def head_sizes(source: Checkpoint, task_ids: Sequence[int]) -> dict[str, Sizes]:
    """Return the shapes of the parameters of which each task has its own, sorted by name.

    These are what the tasks' heads hold, and whatever depends on the number of labels; that size
    is `LABELS`.
    """
    config = task_config(source, task_ids[0])
    wider = copy.deepcopy(config)
    wider.num_labels = config.num_labels + 1
    shapes, others = (
        known_parameters(each, opset=OPSET, tied_head=source.base.tied_head)
        for each in (config, wider)
    )
    names = [source.contents.tasks[task_id].name for task_id in task_ids]
    own = {key for name in names for key in source.contents.heads.get(name, {})}
    return {
        name: tuple(
            size if size == other else LABELS
            for size, other in zip(shape, others[name], strict=True)
        )
        for name, shape in sorted(shapes.items())
        if name in own or shape != others[name]
    }


@dataclasses.dataclass(frozen=True)
class PackGraphs:
    """The graphs of a pack by name: each role's, and with `FOLDED` before it the folded one's.

    Args:
        models: the graphs, bound; nothing of them is read.
        linears: what tasks may adapt, [out, in] by path.
        heads: shapes of what each task has of its own.
        applied: the linears that each role's graph applies, and the heads that it reads.
        records: what the passes did.
    """

    models: Mapping[str, onnx_ir.Model]
    linears: Mapping[str, tuple[int, int]]
    heads: Mapping[str, Sizes]
    applied: Mapping[str, frozenset[str]]
    records: tuple[PassRecord, ...]

    @classmethod
    def make(
        cls,
        source: Checkpoint,
        config: Any,
        linears: Mapping[str, tuple[int, int]],
        heads: Mapping[str, Sizes],
        optimize_for: OptimizeFor,
    ) -> PackGraphs:
        """Trace, bind and rewrite the graphs.

        Args:
            source: the checkpoint, for its base.
            config: the configuration of any of its tasks.
            linears: what tasks may adapt, [out, in] by path.
            heads: shapes of what each task has of its own.
            optimize_for: the execution provider whose kernels the graphs are fused for.
        """
        traced = skeleton(config, opset=OPSET, tied_head=source.base.tied_head)
        models, applied = traced.copy_graphs(), {}
        for role, model in models.items():
            heads_read = insert_heads(model, heads)
            applied[role] = frozenset(insert_factors(model, linears) | heads_read)
        for role, model in traced.copy_graphs().items():
            insert_heads(model, heads)
            models[f"{FOLDED}{role}"] = model
        lower.bind(models, source.weights)
        records = run_graph_passes(models, graph_passes(optimize_for))
        for role in applied:
            declare_optional(models[role], linears, heads)
            declare_optional(models[f"{FOLDED}{role}"], {}, heads)
        return cls(models, linears, heads, applied, tuple(records))

    @property
    def switched(self) -> dict[str, onnx_ir.Model]:
        """The graphs that are fed factors, by role."""
        return {role: self.models[role] for role in self.applied}

    def readers(self, name: str) -> tuple[str, ...]:
        """Return the roles whose graphs apply a linear, or read a head."""
        return tuple(role for role, names in self.applied.items() if name in names)

    def head_specs(self) -> dict[str, HeadSpec]:
        """Return what the manifest says of the heads."""
        return {name: HeadSpec(shape, self.readers(name)) for name, shape in self.heads.items()}

    def linear_specs(
        self, source: Checkpoint, written: lower.WeightsFile
    ) -> dict[str, LinearSpec]:
        """Return what the manifest says of the linears.

        Args:
            source: the checkpoint, for its base.
            written: the weights file.
        """
        found = {}
        for path, (out, columns) in self.linears.items():
            roles = self.readers(path)
            places = {self._place(source, f"{path}.weight", role, written) for role in roles}
            if len(places) != 1:
                raise InternalError(f"{path} is applied by {len(roles)} graphs, and stored as "
                                    f"{sorted(places)}")  # fmt: skip
            offset, transposed = places.pop()
            found[path] = LinearSpec(out, columns, roles, offset, transposed)
        return found

    def _place(
        self, source: Checkpoint, name: str, role: str, written: lower.WeightsFile
    ) -> tuple[int, bool]:
        """Return where a weight lies, and whether transposed, as both graphs of a role read it."""
        plain = bound(source.weights[name], name).key
        layouts = {plain: False, (plain, ("transpose", (1, 0))): True}
        places = set()
        for graph in (role, f"{FOLDED}{role}"):
            value = self.models[graph].graph.initializers.get(name)
            tensor = None if value is None else value.const_value
            if value is None or not isinstance(tensor, WeightTensor) or tensor.key not in layouts:
                raise InternalError(f"{name} is not as it is in the base in the graph {graph}")
            places.add((written.offset(value), layouts[tensor.key]))
        if len(places) != 1:
            raise InternalError(f"the graphs of {role} read {name} in two ways")
        return places.pop()
