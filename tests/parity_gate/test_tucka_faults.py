"""Faults in TuckA's reader and in its lowering: each is found, and nothing is published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import eptc
from eptc.checkpoint import tucka, tucka_factors
from eptc.errors import ParityError
from eptc.ir import CentroidRouter
from eptc.lower import branches, merging
from eptc.lower.calls import Call
from eptc.lower.edit import constant, insert
from eptc.lower.tucker import lower_centroids
from eptc.tensors import ArrayTensor

Patch = pytest.MonkeyPatch


def one_norm_for_all_groups(patch: Patch) -> None:
    def core(g: Any, c: Any, group: int, slot: int) -> Any:
        exact = g.numpy().astype(np.float64)
        mixing = c.numpy().astype(np.float64)
        mixing /= np.linalg.norm(mixing)
        return np.tensordot(mixing[slot], exact[group] / np.linalg.norm(exact), 1)

    patch.setattr(tucka, "core", core)


def a_norm_for_each_column(patch: Patch) -> None:
    def unit(tensor: Any) -> Any:
        exact = tensor.numpy().astype(np.float64)
        return exact / np.linalg.norm(exact, axis=0)

    patch.setattr(tucka, "unit", unit)


def alpha_divided_by_the_rank(patch: Patch) -> None:
    read = tucka_factors.TuckaSettings.read

    def divided(path: Any) -> Any:
        found = read(path)
        return dataclasses.replace(found, alpha=found.alpha / found.r)

    patch.setattr(tucka_factors.TuckaSettings, "read", divided)


def transposed_cores(patch: Patch) -> None:
    core = tucka_factors.core
    patch.setattr(tucka, "core", lambda *arguments: core(*arguments).T)


def swapped_experts(patch: Patch) -> None:
    core = tucka_factors.core
    patch.setattr(tucka, "core", lambda g, c, group, slot: core(g, c, group, 1 - slot))


def router(patch: Patch, change: Callable[[CentroidRouter], CentroidRouter]) -> None:
    def lower(found: Any, call: Call) -> ir.Value:
        return lower_centroids(change(found), call)

    patch.setattr(branches, "ROUTERS", {CentroidRouter: lower})


def slots_before_groups(patch: Patch) -> None:
    def change(found: CentroidRouter) -> CentroidRouter:
        rows = found.centroids.numpy()
        swapped = rows.reshape(found.groups, -1, rows.shape[1]).transpose(1, 0, 2)
        table = np.ascontiguousarray(swapped).reshape(rows.shape)
        return dataclasses.replace(found, centroids=ArrayTensor("e", table))

    router(patch, change)


def a_norm_for_all_groups_logits(patch: Patch) -> None:
    """All groups as one: none is dropped, and all share a norm."""
    router(patch, lambda found: dataclasses.replace(found, groups=1))


def a_mean_for_each_row(patch: Patch) -> None:
    router(patch, lambda found: dataclasses.replace(found, unit="row"))


def padding_left_out(patch: Patch) -> None:
    """The direction of the mean over what the mask marks."""

    @dataclasses.dataclass(frozen=True)
    class Masked:
        path: str
        node: ir.Node
        x: ir.Value

    def lower(found: Any, call: Call) -> ir.Value:
        graph = call.node.graph
        assert isinstance(graph, ir.Graph)
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        to = {"to": int(ir.DataType.FLOAT)}
        cast = insert(call.node, "Cast", [mask], to).outputs[0]
        cast.type = ir.TensorType(ir.DataType.FLOAT)
        last = constant(graph, np.array([2], np.int64))
        wide = insert(call.node, "Unsqueeze", [cast, last]).outputs[0]
        x = insert(call.node, "Mul", [call.x, wide]).outputs[0]
        return lower_centroids(found, Masked(call.path, call.node, x))  # type: ignore[arg-type]

    patch.setattr(branches, "ROUTERS", {CentroidRouter: lower})


def the_first_route_for_good(patch: Patch) -> None:
    """The router's second call changes nothing."""
    first: dict[Any, ir.Value] = {}

    def lower(found: Any, call: Call) -> ir.Value:
        # A graph of its own each time the passes are tried one by one.
        key = found, call.node.graph
        if key not in first:
            first[key] = lower_centroids(found, call)
        return first[key]

    patch.setattr(branches, "constant_gates", lambda *_: None)
    patch.setattr(branches, "ROUTERS", {CentroidRouter: lower})


def another_constant_route(patch: Patch) -> None:
    def gates(*arguments: Any) -> Any:
        found = merging.constant_gates(*arguments)
        return None if found is None else tuple(reversed(found))

    patch.setattr(branches, "constant_gates", gates)


def merged_only_where_it_is_routed_once(patch: Patch) -> None:
    """The table is projected with the weight of the text's call."""
    patch.setattr(merging, "set_weight", lambda *_: None)


FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    fault.__name__: (kind, fault)
    for kind, found in {
        "bert": (
            one_norm_for_all_groups, a_norm_for_each_column, alpha_divided_by_the_rank,
            transposed_cores, swapped_experts, slots_before_groups, a_norm_for_all_groups_logits,
            a_mean_for_each_row, padding_left_out,
        ),
        "deberta-v2": (
            the_first_route_for_good, another_constant_route, merged_only_where_it_is_routed_once,
        ),
    }.items()
    for fault in found
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(write_tucka: Any, monkeypatch: Patch, name: str) -> None:
    kind, fault = FAULTS[name]
    folders = write_tucka(kind)
    fault(monkeypatch)
    with pytest.raises(ParityError):
        eptc.export(folders.ckpt, base=folders.base, out=folders.out, optimize_for="any")
    assert not folders.out.exists()


def test_a_decoder_is_compared_in_the_engines_own_steps(
    write_tucka: Any, monkeypatch: Patch
) -> None:
    folders = write_tucka("llama")
    a_mean_for_each_row(monkeypatch)
    with pytest.raises(ParityError):
        eptc.export(folders.ckpt, base=folders.base, out=folders.out, optimize_for="any")
