"""`TuckaModel`: a Hugging Face model with a TuckA adapter, as the authors' code runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eptc.errors import CheckpointError
from eptc.nn.adapted import SingleTaskModel
from eptc.nn.base import read_base, require
from eptc.nn.replace import replace_parameters
from eptc.nn.tucka.linear import RouteState, Routing, TuckaLinear, TuckaRouter
from eptc.nn.tucka.stored import StoredTucka, read
from eptc.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TuckaModel"]


class TuckaModel(SingleTaskModel):
    """A base with a TuckA adapter, its stored centroids used.

    The authors' loader draws the centroids anew on the first forward; what was trained, and what
    they were evaluated with, is what the file holds.

    Args:
        hf_model: the task model, changed in place.
        stored: the checkpoint.
        task: what it was trained on.
        routing: whether all rows of a batch share a route, as in the authors' code, or each has
            its own: the same at batch 1.

    Attributes:
        hf: the Hugging Face model; its forward and `generate` give the system's own answers.
        layers: the adapted linears, by their full names.
        heads: always empty: a trained head stands in the base's place.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        stored: StoredTucka,
        task: Task,
        *,
        routing: Routing = "batch",
    ) -> None:
        super().__init__(hf_model, task)
        hf_model.requires_grad_(False)
        self._state = RouteState(stored.router)
        router = TuckaRouter(stored.centroids, stored.groups, routing)
        self.layers: Mapping[str, TuckaLinear] = {
            path: TuckaLinear(
                _linear(hf_model, path), parts, stored.alpha, self._state,
                router if path == stored.router else None, path,
            )
            for path, parts in sorted(stored.layers.items())
        }  # fmt: skip
        for path, layer in self.layers.items():
            hf_model.set_submodule(path, layer)
        self.requires_grad_(False)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        base_dir: str | Path,
        *,
        task: Task,
        routing: Routing = "batch",
        allow_pickle: bool = False,
    ) -> TuckaModel:
        """Return a checkpoint of the authors' code on its base, in eval mode.

        Args:
            directory: the adapter's folder.
            base_dir: the base model's folder.
            task: what it was trained on.
            routing: what shares a route.
            allow_pickle: whether `adapter_model.bin` may be read.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit the base.
            BaseModelError: the base cannot be used.
            OptionError: the weights are a pickle and it may not be read.
        """
        stored = read(Path(directory), allow_pickle=allow_pickle)
        hf_model, missing = read_base(Path(base_dir))
        require(Path(base_dir), [name for name in missing if name not in stored.parameters])
        replace_parameters(hf_model, stored.parameters)
        model = cls(hf_model, stored, task, routing=routing).eval()
        model._find_constant_routes()
        return model

    @torch.no_grad()
    def _find_constant_routes(self) -> None:
        """Give each linear that runs under one route whatever the input its gates.

        Some models call the router's linear again, on something no input changes (DeBERTa: its
        table of positions); what runs after that runs under that route. Told by what the router
        read, not by its gates: groups of one expert have few routes, and two texts may well
        share one. What depends on the text has the text's batch and length in its shape.
        """
        one = self._read_by_router(torch.tensor([[1, 2, 3]]))
        if max(len(sources) for sources in one.values()) < 2:
            return
        other = self._read_by_router(torch.tensor([[5, 4, 3, 2, 1], [1, 4, 0, 5, 3]]))
        router = next(layer for layer in self.layers.values() if layer.router is not None)
        for path, layer in self.layers.items():
            first, *sources = (*one[path], *other[path])
            if all(torch.equal(source, first) for source in sources):
                layer.constant_gates = router.gates(first)[0]

    def _read_by_router(self, ids: Tensor) -> dict[str, list[Tensor]]:
        """Return what made the route of each call of each adapted linear, for some tokens.

        Inputs of the router's linear [batch, length, in], by the path of the linear routed.
        """
        found: dict[str, list[Tensor]] = {path: [] for path in self.layers}
        read: list[Tensor] = []

        def note(layer: TuckaLinear, inputs: tuple[Tensor], y: object) -> None:
            del y
            if layer.router is not None:
                read.append(inputs[0])
            found[layer.path].append(read[-1])

        hooks = [layer.register_forward_hook(note) for layer in self.layers.values()]
        try:
            self.hf(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield a list that gets group and weights of every call of the router."""
        calls: list[tuple[Tensor, Tensor]] = []
        self._state.calls = calls
        try:
            yield calls
        finally:
            self._state.calls = None


def _linear(hf_model: nn.Module, path: str) -> nn.Linear:
    try:
        module = hf_model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"the base has no module {path}", fix="give the base the checkpoint was trained on"
        ) from error
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{path} is a {type(module).__name__}", expected="a linear")
    return module
