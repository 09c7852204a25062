"""`TuckaModel`: a Hugging Face model with a TuckA adapter, as the authors' code runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eptc.errors import CheckpointError, TaskError
from eptc.nn.base import is_classifier, read_base, require
from eptc.nn.heads import head_module, last_linear
from eptc.nn.tucka.linear import RouteState, Routing, TuckaLinear, TuckaRouter
from eptc.nn.tucka.stored import StoredTucka, read
from eptc.tasks import Task, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TuckaModel"]


class TuckaModel(nn.Module):
    """A base with a TuckA adapter, its stored centroids used.

    The authors' loader draws the centroids anew on the first forward; what was trained, and what
    they were evaluated with, is what the file holds.

    Args:
        hf_model: the task model, changed in place.
        stored: the checkpoint.
        tasks: the one task.
        routing: whether all rows of a batch share a route, as in the authors' code, or each has
            its own: the same at batch 1.

    Attributes:
        hf: the Hugging Face model; its forward and `generate` give the system's own answers.
        layers: the adapted linears, by their full names.
        heads: always empty: a trained head stands in the base's place.
        tasks: the one task.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        stored: StoredTucka,
        tasks: Sequence[Task] = (),
        *,
        routing: Routing = "batch",
    ) -> None:
        super().__init__()
        hf_model.requires_grad_(False)
        self.hf: PreTrainedModel = hf_model
        self.tasks = tuple(tasks)
        self.heads: Mapping[str, nn.Module] = {}
        self._state = RouteState()
        router = TuckaRouter(stored.centroids, stored.groups, routing)
        self.layers: dict[str, TuckaLinear] = {}
        for path, parts in stored.layers.items():
            own = router if path == stored.router else None
            linear = _linear(hf_model, path)
            self.layers[path] = TuckaLinear(linear, parts, stored.alpha, self._state, own, path)
            hf_model.set_submodule(path, self.layers[path])
        self.requires_grad_(False)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        base_dir: str | Path,
        *,
        tasks: Sequence[Task] = (),
        routing: Routing = "batch",
        allow_pickle: bool = False,
    ) -> TuckaModel:
        """Return a checkpoint of the authors' code on its base, in eval mode.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit the base.
            BaseModelError: the base cannot be used.
            OptionError: the weights are a pickle and it may not be read.
        """
        stored = read(Path(directory), allow_pickle=allow_pickle)
        hf_model, missing = read_base(Path(base_dir))
        require(Path(base_dir), [name for name in missing if name not in stored.parameters])
        _replace(hf_model, stored.parameters)
        return cls(hf_model, stored, tasks, routing=routing).eval()

    @contextlib.contextmanager
    def task(self, task: str | int) -> Iterator[int]:
        """Check that a task is the one there is; yield its id, 0.

        Raises:
            TaskError: there is no such task.
        """
        if not self.tasks:
            raise TaskError("the reference was loaded without a task")
        yield resolve(task, self.tasks)

    def plain_parameters(self, task_id: int = 0) -> dict[str, nn.Parameter]:
        """Return the parameters of the plain task model, the adapters left out, by name."""
        del task_id
        return {
            name.replace(".base.", "."): parameter
            for name, parameter in self.hf.named_parameters(remove_duplicate=False)
            if not name.endswith((".u", ".cores", ".router.centroids"))
        }

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield a list that gets group and weights of every call of the router."""
        self._state.calls = calls = []
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


def _replace(hf_model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Set parameters of the base; the last linear of a classifier's head may change its width."""
    if is_classifier(hf_model):
        head = head_module(hf_model)
        name, last = last_linear(hf_model.get_submodule(head), head)
        rows = len(tensors.get(f"{name}.weight", last.weight))
        if rows != last.out_features:
            hf_model.set_submodule(name, nn.Linear(last.in_features, rows, last.bias is not None))
            hf_model.num_labels = hf_model.config.num_labels = rows
    parameters = dict(hf_model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters:
            raise CheckpointError(f"the base has no parameter {name}, which the checkpoint has")
        if parameters[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)}",
                expected=f"{list(parameters[name].shape)}, as in the base",
            )
        with torch.no_grad():
            parameters[name].copy_(tensor)
