"""Routed experts beside a linear: real sessions against the formula in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.errors import InternalError
from eptc.ir import Adapter, Branch, Kronecker, Routed, TokenRouter
from eptc.lower import insert_branches, write
from eptc.lower.weights import bound
from eptc.run_passes import check_graph
from eptc.tensors import ArrayTensor

Array = np.ndarray[Any, Any]
TASK = 1


@dataclasses.dataclass(frozen=True)
class Expert:
    """One linear's experts and router, as arrays.

    Args:
        A, B: the factors, maybe those of another linear too.
        kernels: [s, s] each.
        scales: of each expert.
        router: [experts, in].
        embedding: [tasks, in]; None where the router does not read the task.
        options: top_k, temperature and normalization.
        in_features: in.
        out_features: out.
    """

    A: ArrayTensor
    B: ArrayTensor
    kernels: list[Array]
    scales: list[float]
    router: Array
    embedding: Array | None
    options: tuple[int, float, str]
    in_features: int
    out_features: int

    def adapter(self, path: str) -> Adapter:
        embedding = None if self.embedding is None else ArrayTensor("e", self.embedding)
        router = TokenRouter(
            ArrayTensor(f"{path}.ept.router.weight", self.router),
            embedding,
            None,
            *self.options,  # type: ignore[arg-type]
        ).for_task(TASK)
        branches = [
            Branch(
                Kronecker(
                    self.A, self.B, ArrayTensor(f"K{i}", kernel), self.out_features,
                    self.in_features,
                ),
                Routed(router, i),
                scale,
            )
            for i, (kernel, scale) in enumerate(zip(self.kernels, self.scales, strict=True))
        ]  # fmt: skip
        return Adapter(path, tuple(branches))

    def gates(self, token: Array) -> Array:
        """The gates [experts] of one token."""
        k, temperature, normalization = self.options
        u = token if self.embedding is None else token + self.embedding[TASK]
        logits = self.router.astype(np.float64) @ u / temperature
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        kept = p[chosen]
        if normalization == "softmax":
            kept = np.exp(kept) / np.exp(kept).sum()
        elif normalization == "sum":
            kept = kept / kept.sum()
        gates = np.zeros(len(p))
        gates[chosen] = kept
        return gates

    def dense(self, expert: int) -> Array:
        """kron(B A, K), cropped."""
        s = len(self.kernels[expert])
        rows, columns = math.ceil(self.out_features / s), math.ceil(self.in_features / s)
        a, b = np.asarray(self.A.array, np.float64), np.asarray(self.B.array, np.float64)
        latent = b[:rows] @ a[:, :columns]
        matrix = np.kron(latent, self.kernels[expert])
        return np.asarray(matrix[: self.out_features, : self.in_features])

    def added(self, x: Array) -> Array:
        """What the branches add to each token of x [..., in]."""
        matrices = [s * self.dense(i) for i, s in enumerate(self.scales)]
        total = np.zeros((*x.shape[:-1], self.out_features))
        for at in np.ndindex(*x.shape[:-1]):
            mixed = sum(g * m for g, m in zip(self.gates(x[at]), matrices, strict=True))
            total[at] = mixed @ x[at]
        return total


def make(
    sizes: Sequence[int],
    shape: tuple[int, int] = (29, 13),
    rank: int = 3,
    options: tuple[int, float, str] = (2, 1.0, "sum"),
    *,
    task: bool = True,
    like: Expert | None = None,
    seed: int = 0,
) -> Expert:
    rng = np.random.default_rng(seed)
    out, columns = shape

    def draw(*size: int) -> Array:
        return rng.standard_normal(size).astype(np.float32)

    smallest = min(sizes)
    return Expert(
        like.A if like else ArrayTensor("l.ept.A", draw(rank, -(-columns // smallest) + 2)),
        like.B if like else ArrayTensor("l.ept.B", draw(-(-out // smallest) + 1, rank)),
        [draw(s, s) for s in sizes],
        [float(scale) for scale in rng.uniform(0.5, 2.0, len(sizes))],
        draw(len(sizes), columns) * np.float32(columns**-0.5),
        draw(3, columns) if task else None,
        options,
        columns,
        out,
    )


def graph_of(weights: dict[str, Array], axes: str = "batch,sequence") -> ir.Model:
    """Return y_i = x W_i^T for each weight W_i."""
    columns = next(iter(weights.values())).shape[1]
    names = [f"W{i}" for i in range(len(weights))]
    body = " ".join(
        f"t{n} = Transpose <perm = [1, 0]> ({n}) p{n} = MatMul(x, t{n}) y{n} = Identity(p{n})"
        for n in names
    )
    outputs = ", ".join(
        f"float[{axes},{w.shape[0]}] y{n}" for n, w in zip(names, weights.values(), strict=True)
    )
    inputs = f"float[{axes},{columns}] x"
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, (parameter, array) in zip(names, weights.items(), strict=True):
        tensor = bound(ArrayTensor(parameter, array), parameter)
        value = ir.Value(name=parameter, const_value=tensor)
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, read in enumerate(node.inputs):
                if read is not None and read.name == name:
                    node.replace_input_with(index, value)
    return model


def run(model: ir.Model, x: Array, folder: Path) -> list[Array]:
    check_graph(model)
    folder.mkdir(parents=True)
    write({"model": model}, folder)
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    outputs: list[Array] = session.run(None, {"x": x})
    return outputs


def tokens(columns: int, *shape: int) -> Array:
    rng = np.random.default_rng(3)
    return rng.standard_normal((*shape, columns)).astype(np.float32)


def check(expert: Expert, folder: Path, axes: str = "batch,sequence") -> None:
    """For several shapes of one dynamic graph: x W^T plus what the experts add."""
    weight = tokens(expert.in_features, expert.out_features)
    model = graph_of({"l.weight": weight}, axes)
    assert insert_branches(model, {"l": expert.adapter("l")}, {}) == 1
    shapes = [(1, 1), (2, 5), (3, 1)] if "," in axes else [(1,), (4,)]
    for shape in shapes:
        x = tokens(expert.in_features, *shape)
        want = x.astype(np.float64) @ weight.T + expert.added(x)
        (got,) = run(model, x, folder / str(shape))
        # Float32: sums of some hundred products of normal numbers.
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


CASES: dict[str, dict[str, Any]] = {
    "sizes that divide": {"sizes": (2, 4), "shape": (8, 12)},
    "crops": {"sizes": (2, 3, 5, 4)},
    "one size": {"sizes": (3, 3, 3)},
    "unequal numbers of a size": {"sizes": (2, 4, 2, 2, 3)},
    "kernels of one number": {"sizes": (1, 2)},
    "larger than the linear": {"sizes": (2, 64, 40), "rank": 2},
    "large sizes alone": {"sizes": (24, 24, 32), "shape": (50, 70)},
    "large sizes that divide": {"sizes": (24, 24), "shape": (48, 72)},
    "small and large": {"sizes": (2, 24, 2, 24, 4), "shape": (51, 34)},
    "a large rank": {"sizes": (2, 4), "rank": 40, "shape": (20, 24)},
    "one expert kept": {"sizes": (2, 3, 3), "options": (1, 1.0, "sum")},
    "every expert kept": {"sizes": (2, 3, 3), "options": (3, 0.5, "sum")},
    "second softmax": {"sizes": (2, 3, 3), "options": (2, 0.7, "softmax")},
    "second softmax of all": {"sizes": (2, 3, 3), "options": (3, 0.7, "softmax")},
    "not normalised": {"sizes": (2, 3, 3), "options": (2, 0.7, "none")},
    "not normalised, all": {"sizes": (2, 3, 3), "options": (3, 0.7, "none")},
    "sharp": {"sizes": (2, 3, 3, 4), "options": (2, 0.05, "sum")},
    "tokens alone": {"sizes": (2, 3, 24), "task": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_adds_what_the_formula_says(case: dict[str, Any], tmp_path: Path) -> None:
    check(make(**case), tmp_path)


def test_an_input_without_a_sequence(tmp_path: Path) -> None:
    """A linear behind a pooler reads [batch, in]."""
    check(make((2, 3, 24)), tmp_path, axes="batch")


def test_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    expert = make((2, 3, 3, 24), options=(2, 0.05, "sum"), task=False)
    tied = np.repeat(expert.router[:1], 4, axis=0)
    tied[0] -= 1e-3 * np.abs(tied[0])
    check(dataclasses.replace(expert, router=tied), tmp_path)
    check(dataclasses.replace(expert, router=np.zeros_like(tied)), tmp_path / "zero")


def test_no_dense_matrix_is_stored() -> None:
    """What is beside a linear grows with its sides, not with their product."""
    expert = make((2, 2, 4, 4, 8, 8, 16, 16), (768, 768), rank=8)
    model = graph_of({"l.weight": np.zeros((768, 768), np.float32)})
    insert_branches(model, {"l": expert.adapter("l")}, {})
    sizes = {
        name: math.prod(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if ".branch." in name and value.shape is not None
    }
    assert max(sizes.values()) == 8 * (2 + 4 + 8) * 768
    assert sum(sizes.values()) < 768 * 768 / 2


def test_linears_share_what_they_read_of_one_input(tmp_path: Path) -> None:
    """With one A and B for all linears A x is computed once, each with kernels of its own."""
    first = make((2, 3, 24, 24), (30, 13))
    shared = dataclasses.replace(
        first, A=ArrayTensor("shared.ept.A", first.A.array),
        B=ArrayTensor("shared.ept.B", first.B.array),
    )  # fmt: skip
    second = make((2, 3, 24, 24), (20, 13), like=shared, seed=5)
    weights = {"q.weight": tokens(13, 30), "k.weight": tokens(13, 20)}
    model = graph_of(weights)
    insert_branches(model, {"q": shared.adapter("q"), "k": second.adapter("k")}, {})
    downs = [
        node for node in model.graph
        if any(v is not None and ".branch.down" in str(v.name) for v in node.inputs)
    ]  # fmt: skip
    assert len(downs) == 2  # one for the small sizes, one for the large one
    x = tokens(13, 2, 5)
    got = run(model, x, tmp_path / "out")
    for expert, weight, found in zip((shared, second), weights.values(), got, strict=True):
        want = x.astype(np.float64) @ weight.T + expert.added(x)
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_linears_with_factors_of_their_own_share_nothing(tmp_path: Path) -> None:
    first, second = make((2, 3), (30, 13)), make((2, 3), (20, 13), seed=5)
    second = dataclasses.replace(
        second, A=ArrayTensor("k.ept.A", second.A.array), B=ArrayTensor("k.ept.B", second.B.array)
    )
    weights = {"l.weight": tokens(13, 30), "k.weight": tokens(13, 20)}
    model = graph_of(weights)
    insert_branches(model, {"l": first.adapter("l"), "k": second.adapter("k")}, {})
    x = tokens(13, 2, 5)
    got = run(model, x, tmp_path / "out")
    for expert, weight, found in zip((first, second), weights.values(), got, strict=True):
        want = x.astype(np.float64) @ weight.T + expert.added(x)
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_standard_operators_alone() -> None:
    model = graph_of({"l.weight": np.zeros((29, 13), np.float32)})
    insert_branches(model, {"l": make((2, 3, 24)).adapter("l")}, {})
    assert {node.domain for node in model.graph} == {""}
    assert "NonZero" not in {node.op_type for node in model.graph}


def test_experts_of_two_subspaces_are_refused() -> None:
    expert = make((2, 3))
    adapter = expert.adapter("l")
    other = make((2, 3), seed=9).adapter("l")
    router = adapter.input_router
    assert router is not None
    mixed = dataclasses.replace(
        adapter,
        branches=(
            adapter.branches[0],
            dataclasses.replace(other.branches[1], gate=Routed(router, 1)),
        ),
    )
    model = graph_of({"l.weight": np.zeros((29, 13), np.float32)})
    with pytest.raises(InternalError, match="no A and B in common"):
        insert_branches(model, {"l": mixed}, {})


def test_a_router_of_no_task_is_refused() -> None:
    expert = make((2, 3))
    adapter = expert.adapter("l")
    assert expert.embedding is not None
    unfixed = TokenRouter(
        ArrayTensor("W", expert.router), ArrayTensor("e", expert.embedding), None, 2, 1.0, "sum"
    )
    branches = tuple(
        dataclasses.replace(b, gate=Routed(unfixed, i)) for i, b in enumerate(adapter.branches)
    )
    model = graph_of({"l.weight": np.zeros((29, 13), np.float32)})
    with pytest.raises(InternalError, match="no router that reads tokens alone"):
        insert_branches(model, {"l": dataclasses.replace(adapter, branches=branches)}, {})


def test_the_router_of_the_ir() -> None:
    """`TokenRouter.gates` is the same formula."""
    for options in ((2, 0.7, "sum"), (2, 0.7, "softmax"), (1, 0.7, "none"), (4, 0.7, "sum")):
        expert = make((2, 3, 3, 4), options=options)
        router = expert.adapter("l").input_router
        assert router is not None
        x = tokens(13, 2, 5).astype(np.float64)
        want = np.array([[expert.gates(t) for t in row] for row in x])
        np.testing.assert_allclose(router.gates(x), want, rtol=0, atol=1e-12)
