"""A reference under constant gates: what it answers, and that it comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eptc.nn import EptConfig, EptModel, GateConfig
from eptc.nn.frozen import FrozenLinear, frozen

Trained = Callable[..., EptModel]


@pytest.fixture
def routed(make_base: Callable[..., Path], plain: EptConfig, trained: Trained) -> EptModel:
    """A tiny BERT whose experts are chosen by token."""
    gate = GateConfig("token+task", 1.0)
    return trained(make_base(), dataclasses.replace(plain, gate=gate))


def logits(model: EptModel) -> torch.Tensor:
    ids = torch.arange(3, 21).reshape(2, 9)
    with torch.no_grad(), model.task("topic"):
        found: torch.Tensor = model.hf(input_ids=ids).logits
    return found


def test_one_mixture_for_every_token(routed: EptModel) -> None:
    """The weight may be folded: base plus the dense sum of the experts under these gates."""
    gates = {path: [0.5, 0.0, 0.25] for path in routed.layers}
    before = logits(routed)
    with frozen(routed, gates):
        under = logits(routed)
        assert not torch.allclose(under, before, atol=1e-3)
        for path, layer in routed.layers.items():
            assert isinstance(layer, FrozenLinear)
            assert layer.routed_experts == 0
            own = layer.__dict__["routed"]
            want = own.scaling * (0.5 * own.experts.dense(0) + 0.25 * own.experts.dense(2))
            torch.testing.assert_close(layer.dense(1), want, rtol=1e-4, atol=1e-5)
            plain = torch.nn.Linear(layer.in_features, layer.out_features)
            plain.weight.data, plain.bias.data = layer.weight + layer.dense(1), layer.bias
            routed.hf.set_submodule(path, plain)
        torch.testing.assert_close(logits(routed), under, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(routed), before)
    assert all(layer.routed_experts == 3 for layer in routed.layers.values())


def test_parameters_keep_their_plain_names(routed: EptModel) -> None:
    plain = {routed.plain_name(n, 1) for n, _ in routed.hf.named_parameters()} - {""}
    with frozen(routed, {path: [1.0, 0.0, 0.0] for path in routed.layers}):
        found = {routed.plain_name(n, 1) for n, _ in routed.hf.named_parameters()} - {""}
    assert found == plain


def test_also_after_an_error(routed: EptModel) -> None:
    before = logits(routed)
    with (
        pytest.raises(ValueError, match="no"),
        frozen(routed, {path: [1.0, 0.0, 0.0] for path in routed.layers}),
    ):
        raise ValueError("no")
    assert torch.equal(logits(routed), before)
