"""Routers that read the input: gates and branches from their definition, and that they learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eptc.errors import OptionError
from eptc.nn import EptConfig, EptLinear, EptModel, GateConfig, TokenRouter, load_base
from eptc.nn.linear import TaskContext
from eptc.tasks import Task

MakeBase = Callable[..., Path]
INPUTS = ("token", "token+task")
TASKS = tuple(Task(name, "generation") for name in "abc")


def layer(router_input: str, normalization: str = "sum", temperature: float = 1.0) -> EptLinear:
    """Return a layer [29, 13] whose every parameter is random; two of its experts share a size."""
    config = EptConfig(
        variant="paper",
        targets=("linear",),
        kernel_sizes=(2, 3, 3, 4),
        top_k=2,
        rank=3,
        tasks=TASKS,
        gate=GateConfig(router_input, temperature, normalization),  # type: ignore[arg-type]
    )
    made = EptLinear(nn.Linear(13, 29), config, "linear", TaskContext())
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


def defined_gates(made: EptLinear, token: np.ndarray, task: int) -> np.ndarray:
    """Return the gates [N] of one token in float64, from the formula alone."""
    parts = {name: p.detach().double().numpy() for name, p in made.parts().items()}
    gate = made.config.gates
    u = token + (parts["task_embedding"][task] if gate.router_input == "token+task" else 0)
    logits = parts["router.weight"] @ u / gate.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = sorted(range(len(p)), key=lambda e: (-logits[e], e))[: made.config.top_k]
    kept = p[chosen]
    if gate.normalization == "softmax":
        kept = np.exp(kept) / np.exp(kept).sum()
    elif gate.normalization == "sum":
        kept = kept / kept.sum()
    gates = np.zeros(len(p))
    gates[chosen] = kept
    return gates


def matrix(made: EptLinear, expert: int) -> np.ndarray:
    """Return one expert's matrix [out, in] in float64, from the formula alone."""
    parts = {name: p.detach().double().numpy() for name, p in made.parts().items()}
    s, (h, w) = made.config.kernel_sizes[expert], (made.out_features, made.in_features)
    latent = parts["B"][: math.ceil(h / s)] @ parts["A"][:, : math.ceil(w / s)]
    return np.asarray(np.kron(latent, parts[f"kernels.{expert}"])[:h, :w])


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 13, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalization", ["sum", "softmax", "none"])
@pytest.mark.parametrize("router_input", INPUTS)
def test_every_token_has_its_own_route(router_input: str, normalization: str) -> None:
    made, x = layer(router_input, normalization), tokens()
    rows = x.double().numpy()
    matrices = [matrix(made, expert) for expert in range(4)]
    wanted_gates, wanted = np.zeros((2, 5, 4)), np.zeros((2, 5, 29))
    for b, t in np.ndindex(2, 5):
        gates = wanted_gates[b, t] = defined_gates(made, rows[b, t], 1)
        mixed = sum(g * m for g, m in zip(gates, matrices, strict=True))
        wanted[b, t] = made.scaling * mixed @ rows[b, t]
    assert len({tuple(np.flatnonzero(g)) for g in wanted_gates.reshape(-1, 4)}) > 2
    found = made.gates(x, 1).numpy()
    np.testing.assert_allclose(found, wanted_gates, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made.delta(x, 1).detach(), wanted, rtol=0, atol=2e-3)
    mixed = made.mixed(x.reshape(10, 13), torch.from_numpy(found).reshape(10, 4))
    torch.testing.assert_close(mixed.reshape(2, 5, 29), made.delta(x, 1).detach())


def test_only_one_of_them_reads_the_task() -> None:
    x = tokens()
    alone, both = layer("token"), layer("token+task")
    assert torch.equal(alone.gates(x, 0), alone.gates(x, 2))
    assert not torch.equal(both.gates(x, 0), both.gates(x, 2))


def test_ties_go_to_the_lower_index() -> None:
    made = layer("token")
    nn.init.zeros_(made.router.weight)
    assert made.gates(tokens(), 0).tolist() == [[[0.5, 0.5, 0, 0]] * 5] * 2


def test_sharp_gates_keep_their_order() -> None:
    """At a low temperature most probabilities are 0 in float32: logits still order them."""
    router = TokenRouter(1, 3, 2, GateConfig("token", 1e-3, "sum"), bias=False)
    router.weight.data = torch.tensor([[0.0], [1.0], [0.5]])
    gates = router(torch.ones(1, 1), torch.zeros(1))
    assert gates.values.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("router_input", INPUTS)
def test_there_is_no_route_of_a_task(router_input: str) -> None:
    with pytest.raises(OptionError, match="no route"):
        layer(router_input).route(1)


def test_the_released_variant_has_none(plain: EptConfig) -> None:
    with pytest.raises(OptionError, match="'released' has the gate"):
        dataclasses.replace(plain, variant="released", gate=GateConfig("token", 1.0, "softmax"))


def attached(make_base: MakeBase, plain: EptConfig, router_input: str) -> EptModel:
    gate = GateConfig(router_input)  # type: ignore[arg-type]
    targets = ("query", "value", "intermediate.dense", "output.dense")
    config = dataclasses.replace(plain, gate=gate, targets=targets)
    return EptModel.attach(load_base(make_base()), config, seed=3)


def rows(model: EptModel, task: str) -> dict[str, torch.Tensor]:
    """Return rows in which one token, repeated, tells the label."""
    ids = torch.randint(8, 40, (12, 9), generator=torch.Generator().manual_seed(0))
    outputs = {t.name: t.num_outputs for t in model.tasks}[task]
    labels = torch.arange(12) % max(outputs, 2)
    for row, label in zip(ids, labels, strict=True):
        row[1:6] = 5 + label
    kind = torch.float32 if outputs == 1 else torch.int64
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.to(kind)}


@pytest.mark.parametrize("router_input", INPUTS)
def test_gradients(make_base: MakeBase, plain: EptConfig, router_input: str) -> None:
    """Kernels of all experts used, routers, A, B and embeddings of every linear get some."""
    model = attached(make_base, plain, router_input)
    generator = torch.Generator().manual_seed(5)
    for branch in model.layers.values():
        for kernel in branch.experts.kernels:
            nn.init.normal_(kernel, generator=generator)
    model.train()(task="topic", **rows(model, "topic")).loss.backward()
    for branch in model.layers.values():
        for part, parameter in branch.parts().items():
            assert parameter.grad is not None, part
            assert parameter.grad.any(), part


def test_the_task_loss_reaches_the_embedding_where_the_router_reads_it(
    make_base: MakeBase, plain: EptConfig
) -> None:
    """With `token` only the contrastive loss does."""
    for router_input in INPUTS:
        model = attached(make_base, plain, router_input)
        generator = torch.Generator().manual_seed(5)
        for branch in model.layers.values():
            for kernel in branch.experts.kernels:
                nn.init.normal_(kernel, generator=generator)
        output = model.train()(task="topic", **rows(model, "topic"))
        output.task_loss.backward(retain_graph=True)
        for branch in model.layers.values():
            grad = branch.task_embedding.grad
            reached = grad is not None and bool(grad.any())
            assert reached is (router_input == "token+task")
        output.contrastive_loss.backward()
        assert all(b.task_embedding.grad is not None for b in model.layers.values())


@pytest.mark.parametrize("router_input", INPUTS)
def test_a_few_steps_learn(make_base: MakeBase, plain: EptConfig, router_input: str) -> None:
    """From the base model, whose answers it starts with: the loss of every task falls."""
    model = attached(make_base, plain, router_input)
    names = [task.name for task in model.tasks]
    x = torch.ones(1, 36)
    assert not any(b.delta(x, 0).any() for b in model.layers.values() if b.in_features == 36)

    def losses() -> list[float]:
        model.eval()
        with torch.no_grad():
            return [float(model(task=name, **rows(model, name)).task_loss) for name in names]

    before = losses()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the base drops at random
        for _ in range(40):
            for name in names:
                optimizer.zero_grad()
                model(task=name, **rows(model, name)).loss.backward()
                optimizer.step()
    after = losses()
    assert all(b < 0.5 * a for a, b in zip(before, after, strict=True)), (before, after)


def test_untrained_gates_are_open(make_base: MakeBase, plain: EptConfig) -> None:
    """The last expert chosen gets a share at the start: a gate of 0 would get no gradient."""
    for router_input in INPUTS:
        model = attached(make_base, plain, router_input)
        branch = model.layers["bert.encoder.layer.0.attention.self.query"]
        x = torch.randn(200, 36, generator=torch.Generator().manual_seed(2))
        gates = branch.gates(x, 0)
        assert float(gates.sort(-1).values[:, -2].median()) > 0.1


def test_close_choices_are_noted(make_base: MakeBase, plain: EptConfig) -> None:
    """Rows with a token whose second expert leads the third by less than rounding."""
    model = attached(make_base, plain, "token").eval()
    ids = torch.arange(3, 21).reshape(2, 9)
    with torch.no_grad(), model.undecided() as undecided:
        model(task="topic", input_ids=ids)
    assert undecided.rows == set()
    branch = model.layers["bert.encoder.layer.1.attention.self.query"]
    seen: list[torch.Tensor] = []
    handle = branch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(task="topic", input_ids=ids)
    handle.remove()
    token = seen[0][1, 4]
    with torch.no_grad():
        # Of the first and second expert, both ahead of the third, the second leads by a hair.
        weight = branch.router.weight
        weight[0], weight[1], weight[2] = token, token / 2, token / 2
        weight[2] -= 1e-7 * token
    with torch.no_grad(), model.undecided() as undecided:
        model(task="topic", input_ids=ids[1:])
    assert undecided.rows == {0}
    with torch.no_grad(), model.undecided() as again:
        weight[2] = -token
        model(task="topic", input_ids=ids[1:])
    assert again.rows == set()
    assert model._context.undecided is None


def test_nothing_is_close_where_all_experts_are_kept() -> None:
    router = TokenRouter(2, 3, 3, GateConfig("token"), bias=False)
    assert not router.close(torch.ones(2, 4, 2), torch.zeros(2)).any()
