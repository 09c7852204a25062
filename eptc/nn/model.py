"""`EptModel`: a Hugging Face model whose linears carry EPT branches."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eptc.errors import BaseModelError, CheckpointError, OptionError
from eptc.nn import losses, native
from eptc.nn.adapted import ReferenceModel, Undecided
from eptc.nn.base import base_sha256, is_classifier
from eptc.nn.config import EptConfig
from eptc.nn.heads import fill_heads, install_heads
from eptc.nn.initialise import initialise, initialise_factors
from eptc.nn.linear import EptLinear, TaskContext, fill_parameter
from eptc.nn.restore import prepare
from eptc.nn.rules import BaseInfo
from eptc.nn.sites import contributing, shared_factors, target_linears
from eptc.nn.stored import Stored, name_some
from eptc.tasks import Task, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eptc.nn.meta_base import MetaBase

__all__ = ["EptModel"]


class EptModel(ReferenceModel):
    """A Hugging Face model with an `EptLinear` in the place of every target linear.

    The base's parameters are frozen; the branches' and the heads' are not. An encoder classifier
    has a head for each task. Use `attach` to train, `load` and its kin to read a checkpoint.

    Args:
        hf_model: the task model, changed in place.
        config: what to adapt, and how.
        dropout: probability of dropping an element of a branch's input while training.
        head_modules: full names of modules beside the classification head that each task of an
            encoder classifier has its own copy of.
        seed: of everything that is drawn at random.

    Attributes:
        hf: the Hugging Face model; use it inside `with model.task(name):`.
        config: the configuration, with the base's `model_type`.
        layers: the adapted linears, by their full names.
        heads: per-task modules, by the full name of the module they stand for.

    Raises:
        OptionError: a target names no linear, or an option does not fit the model.
        BaseModelError: the model cannot be adapted.
    """

    layers: dict[str, EptLinear]

    def __init__(
        self,
        hf_model: PreTrainedModel,
        config: EptConfig,
        *,
        dropout: float = 0.0,
        head_modules: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        model_type = hf_model.config.model_type
        base = dataclasses.replace(config.base, model_type=model_type)
        if config.base.model_type not in (None, model_type):
            raise BaseModelError(
                f"the base is a {model_type!r}",
                expected=f"{config.base.model_type!r}, which the checkpoint was trained on",
            )
        self.config = dataclasses.replace(config, base=base)
        self._context = TaskContext()
        generator = torch.Generator().manual_seed(seed)
        linears = target_linears(hf_model, config)
        hf_model.requires_grad_(False)
        self.hf: PreTrainedModel = hf_model
        self.heads = {}
        if is_classifier(hf_model):
            self.heads = install_heads(
                hf_model,
                config.tasks,
                self._context,
                modules=head_modules,
                generator=generator,
            )
        elif head_modules:
            raise OptionError(f"{type(hf_model).__name__} has no heads for each task")
        _refuse_overlap(linears, self.heads)
        self.shared = shared_factors(linears, config)
        self.layers = {
            path: EptLinear(
                linear, config, path, self._context, factors=self.shared, dropout=dropout
            )
            for path, linear in linears.items()
        }
        for path, layer in self.layers.items():
            hf_model.set_submodule(path, layer)
        self._initialise(generator)
        self._contributing = frozenset(contributing(hf_model, self.config, self.layers))

    @classmethod
    def attach(
        cls,
        hf_model: PreTrainedModel,
        config: EptConfig,
        *,
        dropout: float = 0.0,
        head_modules: Collection[str] = (),
        seed: int = 0,
    ) -> EptModel:
        """Return a model ready to be trained; the arguments and errors are the class's."""
        return cls(hf_model, config, dropout=dropout, head_modules=head_modules, seed=seed)

    def _initialise(self, generator: torch.Generator) -> None:
        if self.shared is not None:
            initialise_factors(self.shared, self.config.variant, generator)
        for layer in self.layers.values():
            if self.shared is None:
                initialise_factors(layer.experts.factors, self.config.variant, generator)
            initialise(layer, generator)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order of their ids."""
        return self.config.tasks

    def plain_name(self, name: str, task_id: int) -> str:
        """Return the name a parameter of `hf` has in the plain task model; empty where none."""
        if ".experts." in name or ".router." in name or name.endswith(".task_embedding"):
            return ""
        for path in self.layers:
            if name.startswith(f"{path}.base."):
                return f"{path}.{name.removeprefix(f'{path}.base.')}"
        for head in self.heads:
            if name.startswith(f"{head}.tasks."):
                number, _, rest = name.removeprefix(f"{head}.tasks.").partition(".")
                return f"{head}.{rest}" if int(number) == task_id else ""
        return name

    @contextlib.contextmanager
    def task(self, task: str | int) -> Iterator[int]:
        """Make a task the active one, by name, alias or id; yield its id.

        Raises:
            TaskError: there is no such task.
        """
        before = self._context.task_id
        self._context.task_id = resolve(task, self.tasks)
        try:
            yield self._context.task_id
        finally:
            self._context.task_id = before

    @contextlib.contextmanager
    def undecided(self) -> Iterator[Undecided]:
        """Yield what takes note of tokens' routes within rounding until the context is left."""
        before, self._context.undecided = self._context.undecided, Undecided()
        try:
            yield self._context.undecided
        finally:
            self._context.undecided = before

    def forward(
        self, *, task: str | int | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> Any:
        """Return the Hugging Face model's output for a task.

        Where labels are given its `loss` is `task_loss` plus 0.1 times `contrastive_loss`, in
        training and in eval mode, as the released code does. The attributes `task_loss` and
        `contrastive_loss` hold the two; None where there is none.

        Args:
            task: name, alias or id; None: the one of an enclosing `with model.task(name):`.
            labels: [batch] for an encoder classifier; else [batch, length], -100 is ignored.
            inputs: what the Hugging Face model takes.

        Raises:
            TaskError: there is no such task, or none is active.
        """
        with contextlib.ExitStack() as stack:
            if task is not None:
                stack.enter_context(self.task(task))
            task_id = self._context.active
            if self.training or labels is not None:
                stack.enter_context(self._context.recording(self._contributing))
            if labels is not None and not self.heads:
                inputs["labels"] = labels
            output = self.hf(**inputs, return_dict=True)
            terms = dict(self._context.terms)
        task_loss = output.get("loss")
        if labels is not None and self.heads:
            task_loss = losses.head_loss(self.tasks[task_id], output.logits, labels)
        contrastive = losses.combine(self.config, self.hf.config.model_type, terms)
        loss = task_loss
        if loss is not None and contrastive is not None:
            loss = loss + losses.CONTRASTIVE_WEIGHT * contrastive
        # Made anew rather than assigned to: the loss comes first in the output's own order.
        output = type(output)(**{**output, "loss": loss})
        output.task_loss, output.contrastive_loss = task_loss, contrastive
        return output

    def save(
        self,
        directory: str | Path,
        *,
        base_dir: str | Path | None = None,
        base_name: str | None = None,
    ) -> None:
        """Write the native checkpoint: `ept_config.json` and `ept_model.safetensors`.

        Args:
            directory: made where it is missing; a checkpoint in it is replaced.
            base_dir: the base's folder, whose hash is recorded; None keeps the recorded one.
            base_name: what users call the base; None keeps the recorded one.

        Raises:
            BaseModelError: the base's weights cannot be read.
            OutputError: the folder cannot be written.
        """
        base = self.config.base
        config = dataclasses.replace(
            self.config,
            base=BaseInfo(
                base.model_type,
                base.name if base_name is None else base_name,
                base.sha256 if base_dir is None else base_sha256(base_dir),
            ),
        )
        native.write(Path(directory), config, self._tensors())
        self.config = config

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if self.shared is not None:
            tensors |= {"shared.ept.A": self.shared.A, "shared.ept.B": self.shared.B}
        for path, layer in self.layers.items():
            tensors |= {f"{path}.ept.{part}": p for part, p in layer.parts().items()}
        for module, heads in self.heads.items():
            for task, copied in zip(self.tasks, heads.tasks, strict=True):
                prefix = f"heads.{task.name}.{module}"
                tensors |= {f"{prefix}.{name}": p for name, p in copied.named_parameters()}
        return tensors

    @classmethod
    def load(cls, directory: str | Path, base_dir: str | Path) -> EptModel:
        """Return a native checkpoint on its base, in eval mode.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit the base.
            BaseModelError: the base cannot be used, or is another than the recorded one.
        """
        return cls.restore(native.read(Path(directory)), Path(base_dir))

    @classmethod
    def restore(cls, stored: Stored, base_dir: Path, base: MetaBase | None = None) -> EptModel:
        """Return a checkpoint that was read on its base, in eval mode.

        Args:
            stored: the checkpoint.
            base_dir: the base's folder.
            base: it, where it is not to be in memory as a whole; the adapters and the heads are.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit the base.
            BaseModelError: the base cannot be used, or is another than the recorded one.
        """
        prepared = prepare(stored, base_dir, base)
        try:
            model = cls(prepared.hf_model, prepared.config, head_modules=prepared.head_modules)
        except OptionError as error:
            raise CheckpointError(
                error.found, expected=error.expected, fix="check that this is the right base"
            ) from error
        model._fill(stored, prepared.needed)
        return model.eval()

    def _fill(self, stored: Stored, needed: Mapping[str, Collection[str]]) -> None:
        """Set every parameter from a checkpoint; every tensor has exactly one place."""
        if lost := sorted(self.layers.keys() - stored.layers.keys()):
            raise CheckpointError(f"the checkpoint has no tensors for {name_some(lost)}")
        if extra := sorted(stored.layers.keys() - self.layers.keys()):
            raise CheckpointError(
                f"the checkpoint has tensors for {name_some(extra)}",
                expected=f"linears named {', '.join(self.config.targets)}",
            )
        for path, layer in self.layers.items():
            layer.fill(stored.layers[path])
        if self.shared is not None:
            if stored.shared.keys() != {"A", "B"}:
                raise CheckpointError(
                    f"the shared tensors are {sorted(stored.shared)}", expected="A and B"
                )
            fill_parameter(self.shared.A, stored.shared["A"], "shared.ept.A", spare=1)
            fill_parameter(self.shared.B, stored.shared["B"], "shared.ept.B", spare=0)
        fill_heads(self.heads, self.tasks, stored.heads, needed)


def _refuse_overlap(linears: Collection[str], heads: Collection[str]) -> None:
    """Refuse a linear that is to be adapted and that each task has its own copy of."""
    for path in linears:
        for head in heads:
            if path == head or path.startswith(f"{head}."):
                raise OptionError(
                    f"the target {path} is part of {head}, which each task has its own copy of",
                    fix="give targets that name the shared linears only, such as "
                    "'attention.output.dense' instead of 'dense'",
                )
