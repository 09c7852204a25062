"""Experts and routers: forwards against matrices built from the definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from eptc.errors import TaskError
from eptc.nn import EptConfig, EptLinear, GateConfig, ScaleConfig, TaskRouter
from eptc.nn.linear import TaskContext
from eptc.tasks import Task

TASKS = tuple(Task(name, "generation") for name in "abc")
# Divisible, odd, prime, smaller than every kernel, and far larger than the input.
SHAPES = ((24, 36), (13, 29), (48, 7), (3, 5), (40, 130))
SIZES = ((2, 2, 4, 4), (3, 5, 7, 8), (2, 64, 128, 6))


def layer(
    inputs: int, outputs: int, sizes: tuple[int, ...], variant: str = "paper", **options: object
) -> EptLinear:
    """Return a layer whose every parameter is random."""
    config = EptConfig(
        variant=variant,  # type: ignore[arg-type]
        targets=("linear",),
        kernel_sizes=sizes,
        tasks=TASKS,
        **{"top_k": 2, "rank": 3, **options},  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(inputs * 1000 + outputs)
    made = EptLinear(nn.Linear(inputs, outputs), config, "linear", TaskContext())
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    # Sharp gates would hide all but one expert.
    nn.init.normal_(made.task_embedding, std=0.02, generator=generator)
    return made


def definition(made: EptLinear, task: int) -> np.ndarray:
    """Return the branch's matrix in float64, with numpy and from the formulas alone."""
    parts = {name: p.detach().double().numpy() for name, p in made.parts().items()}
    config, (h, w) = made.config, (made.out_features, made.in_features)
    logits = parts["router.weight"] @ parts["task_embedding"][task]
    logits = (logits + parts.get("router.bias", 0.0)) / config.gates.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = np.argsort(-p, kind="stable")[: config.top_k]
    kept = p[chosen]
    if config.gates.normalization == "softmax":
        kept = np.exp(kept) / np.exp(kept).sum()
    elif config.gates.normalization == "sum":
        kept = kept / kept.sum()
    total = np.zeros((h, w))
    for i, gate in zip(chosen, kept, strict=True):
        s, kernel = config.kernel_sizes[i], parts[f"kernels.{i}"]
        if config.variant == "paper":
            rows, columns = math.ceil(h / s), math.ceil(w / s)
            matrix = np.kron(parts["B"][:rows] @ parts["A"][:, :columns], kernel)[:h, :w]
        else:
            matrix = np.zeros((h, w))
            for o, column in itertools.product(range(h), range(max(1, w // s))):
                if o // s < len(kernel):
                    product = parts["B"][o // s] @ parts["A"][:, column]
                    matrix[o, column] = kernel[o // s, o % s] * product
        scale = expected_scale(config, math.ceil(min(h, w) / s))
        total += scale * gate * matrix
    return total


def expected_scale(config: EptConfig, width: int) -> float:
    if config.scale.rule == "d/T":
        return width / float(config.scale.denominator or 0)
    alpha = float(config.scale.alpha or 0)
    return alpha / (config.rank if config.scale.rule == "alpha/r" else math.sqrt(config.rank))


def check(made: EptLinear) -> None:
    """Branch and `dense` against the definition, for inputs of one, two and three axes."""
    x = torch.randn(2, 3, made.in_features, generator=torch.Generator().manual_seed(1))
    for task in range(len(TASKS)):
        wanted = definition(made, task)
        # Float32: sums of a few hundred products of normal numbers, times scales up to 16.
        bound = 1e-4 * max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(made.dense(task).numpy(), wanted, rtol=0, atol=bound)
        y = x.double().numpy() @ wanted.T
        bound = 1e-5 * max(1.0, float(np.abs(y).max()))
        for rows, answers in ((x, y), (x[0], y[0]), (x[0, 0], y[0, 0])):
            found = made.delta(rows, task).detach().numpy()
            np.testing.assert_allclose(found, answers, rtol=0, atol=bound)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(shape: tuple[int, int], sizes: tuple[int, ...], variant: str) -> None:
    """Every size against every shape, padding and cropping included."""
    if variant == "paper":
        sizes = (1, *sizes[1:])
    check(layer(*shape, sizes, variant, top_k=len(sizes)))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("normalization", ["softmax", "sum", "none"])
def test_gates(top_k: int, normalization: str) -> None:
    gate = GateConfig("task", 0.1, normalization)  # type: ignore[arg-type]
    check(layer(24, 36, (2, 3, 4, 4), gate=gate, top_k=top_k))
    if normalization == "softmax":
        check(layer(24, 36, (2, 3, 4, 4), "released", top_k=top_k))


@pytest.mark.parametrize(
    "scale",
    [
        ScaleConfig("alpha/r", alpha=16),
        ScaleConfig("alpha/sqrt(r)", alpha=7.5),
        ScaleConfig("d/T", denominator=4),
    ],
    ids=lambda scale: scale.rule,
)
def test_scales(scale: ScaleConfig) -> None:
    check(layer(24, 36, (2, 3, 4, 4), scale=scale, top_k=3))
    if scale.rule != "d/T":
        check(layer(24, 36, (2, 3, 4, 4), "released", scale=scale, top_k=3))


def test_paper_gates_are_trained() -> None:
    """Renormalised top-k: the router and the embedding get gradients, unused kernels none."""
    made = layer(24, 36, (2, 3, 4, 4))
    made.delta(torch.ones(5, 24), 1).square().sum().backward()  # type: ignore[no-untyped-call]
    route = made.route(1)
    for i, kernel in enumerate(made.experts.kernels):
        assert (kernel.grad is not None and bool(kernel.grad.any())) == (i in route.experts)
    assert made.router.weight.grad is not None
    # Left out, an expert's probability cancels from the renormalised ones, but for rounding.
    moved = made.router.weight.grad.abs().amax(1)
    assert (moved > 1e-3 * moved.max()).tolist() == [i in route.experts for i in range(4)]
    assert made.task_embedding.grad is not None
    assert made.task_embedding.grad.any(1).tolist() == [False, True, False]


def test_ties_go_to_the_lower_index() -> None:
    made = layer(8, 8, (2,) * 6, top_k=4)
    nn.init.zeros_(made.router.weight)
    assert made.route(0).experts == (0, 1, 2, 3)
    assert made.route(0).weights == (0.25,) * 4
    assert made.route(0).margin == 0.0


def test_probabilities_that_underflow_keep_their_order() -> None:
    """At a low temperature most probabilities are 0 in float32: logits still order them."""
    router = TaskRouter(1, 3, 2, GateConfig("task", 1e-3, "sum"), bias=False)
    router.weight.data = torch.tensor([[0.0], [1.0], [0.5]])
    route = router.route(torch.ones(1))
    assert route.experts == (1, 2)
    assert route.weights == (1.0, 0.0)
    assert route.margin == pytest.approx(500)


def test_all_experts_kept_have_no_margin() -> None:
    assert layer(8, 8, (2, 2), top_k=2).route(0).margin == math.inf


def test_no_task_is_active() -> None:
    with pytest.raises(TaskError, match="no task is active"):
        layer(8, 8, (2, 2))(torch.ones(1, 8))


def test_released_code_reads_only_the_first_columns() -> None:
    made = layer(24, 36, (4, 4), "released")
    x = torch.zeros(1, 24)
    x[:, 6:] = 1.0
    assert not made.delta(x, 0).any()


def test_dropout_only_while_training() -> None:
    config = layer(24, 36, (2, 4)).config
    made = EptLinear(nn.Linear(24, 36), config, "linear", TaskContext(), dropout=1.0)
    for parameter in made.parameters():
        nn.init.constant_(parameter, 0.1)
    x = torch.ones(1, 24)
    assert not made.train().delta(x, 0).any()
    assert made.eval().delta(x, 0).all()
