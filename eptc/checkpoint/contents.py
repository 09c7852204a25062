"""What a reader returns, and the account of which tensors it has used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eptc.checkpoint.base import BaseModel, Finite
from eptc.errors import CheckpointError, OptionError
from eptc.ir import Adapter, PromptLayout
from eptc.runtime.routing import STATIC, RoutingSpec
from eptc.tasks import Task
from eptc.tensors import LazyTensor

__all__ = [
    "Contents", "ReadOptions", "Routing", "Source", "check_fit", "check_routing", "consume_all",
]  # fmt: skip


Routing = Literal["exact", "frozen", "batch", "per-sample"]
"""How a build treats what depends on the input: `exact`, as the system's own code does."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What a caller says about a checkpoint beside its folder.

    Args:
        top_k: experts a task uses, where the folder does not say.
        tasks: task names in the order of their ids, where the folder does not say.
        specs: descriptions of tasks by name, where the folder has none.
        allow_pickle: whether a `.bin` file may be read, weights only.
        routing: what is to become of routes that depend on the input.
    """

    top_k: int | None = None
    tasks: tuple[str, ...] | None = None
    specs: Mapping[str, Task] = dataclasses.field(default_factory=dict)
    allow_pickle: bool = False
    routing: Routing = "exact"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint holds beside its base model.

    Args:
        format: which reader read it.
        variant: whose formula its experts follow.
        adapters: by the path of their linear.
        heads: parameters that replace the base's, by task name, then parameter name.
        tasks: in the order of their ids.
        tensors: every tensor of the checkpoint, by its name on disk.
        config: the checkpoint's own configuration file.
        base_sha256: content hash of the base it was trained on; None where it does not say.
        top_k: how many experts a task uses; None where nothing is chosen by task.
        kernel_sizes: one per expert of a pyramid.
        weights: parameters that replace the base's, whatever the task.
        settings: what it changes of the base's configuration.
        routing: what the answer to one row depends on.
        details: what else there is to say of it, for the manifest: JSON values.
        notes: what a user should know although nothing is wrong.
        prompts: the prompts before the text; their parameters are among `weights`.
    """

    format: str
    variant: str
    adapters: Mapping[str, Adapter]
    heads: Mapping[str, Mapping[str, LazyTensor]]
    tasks: tuple[Task, ...]
    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    base_sha256: str | None = None
    top_k: int | None = None
    kernel_sizes: tuple[int, ...] = ()
    weights: Mapping[str, LazyTensor] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    routing: RoutingSpec = STATIC
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    prompts: PromptLayout | None = None


class Source:
    """The tensors of a checkpoint, each to be taken exactly once with the shape it must have."""

    def __init__(self, path: Path, tensors: Mapping[str, LazyTensor]) -> None:
        self.path = path
        self.finite: dict[str, LazyTensor] = {n: Finite(t, path) for n, t in tensors.items()}
        self._left = dict(self.finite)

    def take(self, name: str, shape: tuple[int | None, ...]) -> LazyTensor:
        """Return a tensor and mark it as used; None in `shape` admits any size of that axis.

        Raises:
            CheckpointError: no such tensor, another shape, not floating point, or a NaN or an
                infinity in it.
        """
        if name not in self._left:
            raise CheckpointError(
                f"{self.path} has no tensor {name}", fix="use the file the training run saved"
            )
        tensor = self._left.pop(name)
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{name} in {self.path} has the shape {list(tensor.shape)}",
                expected=f"[{wanted}]",
                fix="check that --base is the model the adapters were trained on",
            )
        if "float" not in tensor.dtype:
            raise CheckpointError(
                f"{name} in {self.path} has the type {tensor.dtype}", expected="floating point"
            )
        tensor.numpy()  # adapters are small: a NaN is better met now than in the middle of a build
        return tensor

    @property
    def left(self) -> list[str]:
        """Names that nothing has taken, sorted."""
        return sorted(self._left)


def consume_all(source: Source) -> None:
    """Check that every tensor was taken.

    Raises:
        CheckpointError: some were not, with their names.
    """
    if source.left:
        raise CheckpointError(
            f"{source.path} has {len(source.left)} tensors that nothing uses: "
            + ", ".join(source.left[:3]),
            expected="exactly the tensors its configuration describes",
        )


def check_routing(asked: Routing, known: Sequence[Routing], whose: str) -> None:
    """Check that a checkpoint can be built with the routing that was asked for.

    Args:
        asked: what the caller wants.
        known: what the checkpoint has.
        whose: the checkpoint, and what about it leaves only these.

    Raises:
        OptionError: it is none of them.
    """
    if asked not in known:
        raise OptionError(f"--routing {asked} was given for {whose}", expected=" or ".join(known))


def check_fit(
    path: Path, base: BaseModel, shapes: Mapping[str, tuple[int, int]], *, halves: bool = False
) -> None:
    """Check that the base model has every adapted linear in the shape the adapters expect.

    Args:
        path: the checkpoint, for the message.
        base: the base model.
        shapes: [out, in] by module path, as far as the adapters tell.
        halves: the adapters tell `out` only up to an odd row (they store out // 2).

    Raises:
        CheckpointError: the first three linears that are missing or of another shape.
    """
    wrong = []
    for module, (out, columns) in sorted(shapes.items()):
        found = base.linears.get(module)
        if found is None:
            wrong.append(f"{module} is missing")
            continue
        rows = found[0] - found[0] % 2 if halves else found[0]
        if (rows, found[1]) != (out, columns):
            wrong.append(f"{module} is {list(found)}, adapted as [{out}, {columns}]")
    if wrong:
        raise CheckpointError(
            f"the base model {base.path} does not fit the adapters of {path} in {len(wrong)} of "
            f"{len(shapes)} linears: " + "; ".join(wrong[:3]),
            fix="give the base model the adapters were trained on with --base",
        )
