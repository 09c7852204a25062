"""TuckA's reference: which linears have one route for every input, and a router that is late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch

from eptc.errors import CheckpointError
from eptc.nn.tucka import TuckaModel
from eptc.tasks import Task

ATTENTION = "deberta.encoder.layer.0.attention.self"


def load(folders: Any) -> TuckaModel:
    return TuckaModel.load(folders.ckpt, folders.base, task=Task("default", "generation"))


@pytest.mark.parametrize(("k", "t"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_routes_that_happen_to_be_equal_are_not_constant(
    write_tucka: Callable[..., Any], k: int, t: int, sign: float
) -> None:
    """A group of one expert has two routes: texts share one, perhaps the table's of positions."""
    folders = write_tucka("deberta-v2", k=k, t=t)
    path = folders.ckpt / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[f"base_model.model.{ATTENTION}.query_proj.tucka_ec"] *= sign
    safetensors.torch.save_file(tensors, path)
    layers = load(folders).layers
    dynamic = {name for name, layer in layers.items() if not layer.folds}
    assert dynamic == {f"{ATTENTION}.query_proj", f"{ATTENTION}.value_proj"}


@pytest.mark.parametrize("site", ["0.attention.self.value", "1.attention.self.query"])
def test_a_late_router_is_refused(write_tucka: Callable[..., Any], site: str) -> None:
    folders = write_tucka()
    path = folders.ckpt / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    layer = "base_model.model.bert.encoder.layer."
    tensors[f"{layer}{site}.tucka_ec"] = tensors.pop(f"{layer}0.attention.self.query.tucka_ec")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is executed before") as caught:
        load(folders)
    error = caught.value
    assert error.found.endswith(f"{site}, whose input the router reads")
    assert error.expected == "a router that is executed before every linear it routes"
    assert error.fix is not None
