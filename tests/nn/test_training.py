"""Training: losses of each variant, gradients, and that a few steps learn something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eptc.nn import EptConfig, EptModel, load_base
from eptc.tasks import Task

MakeBase = Callable[..., Path]

SENTIMENT = Task("sentiment", "classification", labels=("negative", "positive"), aliases=("mood",))
TOPIC = Task("topic", "classification", labels=("a", "b", "c"))
SCORE = Task("score", "regression")

BERT_TARGETS = ("query", "value", "attention.output.dense", "intermediate.dense")
CLASSIFIERS = (SENTIMENT, TOPIC, SCORE)
TEXTS = (Task("one", "generation"), Task("two", "generation"))


def config(variant: str, targets: tuple[str, ...], tasks: tuple[Task, ...]) -> EptConfig:
    return EptConfig(
        variant=variant,  # type: ignore[arg-type]
        targets=targets,
        kernel_sizes=(2, 2, 3, 4),
        top_k=2,
        rank=4,
        tasks=tasks,
    )


def bert(make_base: MakeBase, variant: str, **options: Any) -> EptModel:
    base = load_base(make_base("bert"))
    return EptModel.attach(base, config(variant, BERT_TARGETS, CLASSIFIERS), **options)


def examples(task: Task) -> dict[str, Tensor]:
    """Return rows in which one token, repeated, tells the label."""
    ids = torch.randint(8, 40, (12, 9), generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(12) % (task.num_outputs if task.kind == "classification" else 3)
    for row, label in enumerate(wanted):
        ids[row, 1:6] = 5 + int(label)
    labels = wanted if task.kind == "classification" else wanted / 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_few_steps_learn(make_base: MakeBase, variant: str) -> None:
    """Three tasks with one set of branches: every loss falls, the base stays as it was."""
    model = bert(make_base, variant, dropout=0.1, seed=3)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any(name.endswith("query.base.weight") for name in frozen)

    def losses() -> list[float]:
        model.eval()
        with torch.no_grad():
            return [float(model(task=t.name, **examples(t)).task_loss) for t in model.tasks]

    before = losses()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(30):
            for task in model.train().tasks:
                optimizer.zero_grad()
                model(task=task.name, **examples(task)).loss.backward()
                optimizer.step()
    after = losses()
    assert all(b < 0.5 * a for a, b in zip(before, after, strict=True)), (before, after)
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_gradients(make_base: MakeBase, variant: str) -> None:
    """Kernels of the chosen experts, routers and embeddings of every linear get gradients."""
    model = bert(make_base, variant).train()
    model(task="topic", **examples(TOPIC)).loss.backward()
    for layer in model.layers.values():
        for i in layer.route(1).experts:
            kernel = layer.experts.kernels[i]
            assert kernel.grad is not None
            assert kernel.grad.any()
        assert layer.task_embedding.grad is not None
        assert layer.task_embedding.grad.any()
    given = {n: p.grad is not None for n, p in model.heads["classifier"].named_parameters()}
    assert given == {n: n.startswith("tasks.1.") for n in given}


def test_training_starts_at_the_base(make_base: MakeBase) -> None:
    """Paper: kernels are 0, so the branch is; released: it is not, as in the released code."""
    x = torch.ones(1, 36)
    for variant, silent in (("paper", True), ("released", False)):
        layer = bert(make_base, variant).layers["bert.encoder.layer.0.attention.self.query"]
        assert bool(layer.delta(x, 0).any()) is not silent


def test_the_seed_decides(make_base: MakeBase) -> None:
    one, same, other = (bert(make_base, "released", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_paper_init_has_unit_scale() -> None:
    """Of an input of unit variance B A x has unit variance."""
    from eptc.nn.experts import Factors
    from eptc.nn.initialise import initialise_factors

    factors = Factors(16, 384, 768)
    initialise_factors(factors, "paper", torch.Generator().manual_seed(0))
    x = torch.randn(384, 256, generator=torch.Generator().manual_seed(1))
    y = (factors.B @ (factors.A @ x)).detach()
    assert float(y.std()) == pytest.approx(1, abs=0.2)


def recorded_inputs(model: EptModel, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Run the model and also return what every adapted linear was given."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, p=path: seen.update({p: args[0]}))
        for path, layer in model.layers.items()
    ]
    output = model(**inputs)
    for handle in handles:
        handle.remove()
    return output, seen


def contrastive(model: EptModel, path: str, x: Tensor, task_id: int) -> Tensor:
    """Return the loss from its definition, one row at a time."""
    rows = []
    for first in x[:, 0]:
        embeddings = model.layers[path].task_embedding
        cosines = functional.cosine_similarity(first[None], embeddings, dim=-1)
        rows.append(-torch.log_softmax(cosines / 0.05, dim=-1)[task_id])
    return torch.stack(rows).mean()


T5_TARGETS = ("q", "k", "v", "o", "wi", "wo")
LLAMA_TARGETS = ("v_proj", "down_proj")
# Which linears' terms are added up, and what their sum is divided by (None: their number).
TERMS = {
    "released t5": ("t5", "released", T5_TARGETS, "encoder.", 72),
    "paper t5": ("t5", "paper", T5_TARGETS, "encoder.", None),
    "released bert": ("bert", "released", BERT_TARGETS, "", None),
    "paper bert": ("bert", "paper", BERT_TARGETS, "", None),
    "paper llama": ("llama", "paper", LLAMA_TARGETS, "", None),
}


@pytest.mark.parametrize(
    ("kind", "variant", "targets", "prefix", "divisor"), TERMS.values(), ids=TERMS
)
def test_contrastive_loss(
    make_base: MakeBase,
    kind: str,
    variant: str,
    targets: tuple[str, ...],
    prefix: str,
    divisor: int | None,
) -> None:
    tasks = CLASSIFIERS if kind == "bert" else TEXTS
    model = EptModel.attach(load_base(make_base(kind)), config(variant, targets, tasks))
    inputs = examples(TOPIC)
    if kind != "bert":
        inputs["labels"] = inputs["input_ids"]
    output, seen = recorded_inputs(model, task=1, **inputs)
    terms = [contrastive(model, p, x, 1) for p, x in seen.items() if p.startswith(prefix)]
    wanted = torch.stack(terms).sum() / (divisor or len(terms))
    torch.testing.assert_close(output.contrastive_loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, output.task_loss + 0.1 * wanted, rtol=1e-5, atol=1e-6)
    # Not detached: the term alone reaches the first linear through the later ones' inputs.
    output.contrastive_loss.backward()
    first = next(layer for path, layer in model.layers.items() if path.startswith(prefix))
    parameter = first.experts.kernels[first.route(1).experts[0]]
    assert parameter.grad is not None
    assert parameter.grad.any()


def test_released_llama_adds_nothing(make_base: MakeBase) -> None:
    model = EptModel.attach(
        load_base(make_base("llama")), config("released", LLAMA_TARGETS, TEXTS)
    )
    ids = examples(TOPIC)["input_ids"]
    output = model.train()(task="two", input_ids=ids, labels=ids)
    assert output.contrastive_loss is None
    assert torch.equal(output.loss, output.task_loss)


def test_no_term_without_an_encoder_pass(make_base: MakeBase) -> None:
    """As in the released code: with precomputed encoder outputs the loss is the task's alone."""
    model = EptModel.attach(load_base(make_base("t5")), config("released", T5_TARGETS, TEXTS))
    ids = examples(TOPIC)["input_ids"]
    with torch.no_grad():
        encoded = model(task="one", input_ids=ids, labels=ids)
        output = model(
            task="one", encoder_outputs=(encoded.encoder_last_hidden_state,), labels=ids
        )
    assert output.contrastive_loss is None
    assert torch.equal(output.loss, encoded.task_loss)


def test_nothing_is_kept_after_a_forward(make_base: MakeBase) -> None:
    model = bert(make_base, "paper").train()
    model(task="mood", **examples(SENTIMENT))
    assert not model._context.terms
    assert not model._context.wanted
    assert model._context.task_id is None
    with pytest.raises(IndexError, match="out of range"):
        model(task="mood", input_ids=torch.tensor([[99]]))
    assert not model._context.terms
    assert model._context.task_id is None


def test_task_losses(make_base: MakeBase) -> None:
    """Each task has logits of its own width, and its own loss."""
    model = bert(make_base, "released").eval()
    for task in CLASSIFIERS:
        inputs = examples(task)
        with torch.no_grad():
            output = model(task=task.name, **inputs)
        labels, logits = inputs["labels"], output.logits
        assert logits.shape == (12, task.num_outputs)
        if task.kind == "regression":
            wanted = functional.mse_loss(logits[:, 0], labels)
        else:
            wanted = functional.cross_entropy(logits, labels)
        assert torch.equal(output.task_loss, wanted)
        assert output[0] is output.loss  # a Trainer reads it there


def test_two_models_keep_their_tasks_apart(make_base: MakeBase) -> None:
    one, two = bert(make_base, "released"), bert(make_base, "released")
    with one.task("topic"), two.task("score"):
        assert one._context.active == 1
        assert two._context.active == 2
    assert one._context.task_id is None
