"""What a stored checkpoint needs before its tensors can be set: its base, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eptc.errors import BaseModelError, CheckpointError
from eptc.nn.base import base_sha256, is_classifier, read_base, require
from eptc.nn.config import EptConfig
from eptc.nn.heads import head_module, last_linear, modules_of
from eptc.nn.sites import named
from eptc.nn.stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eptc.nn.meta_base import MetaBase

__all__ = ["Prepared", "prepare"]


class Prepared(NamedTuple):
    """A base ready for a checkpoint.

    Args:
        hf_model: the base's task model.
        config: the checkpoint's configuration, targets the base does not have left out.
        head_modules: modules beside the head that each task has its own copy of.
        needed: parameters the checkpoint must bring, by task.
    """

    hf_model: PreTrainedModel
    config: EptConfig
    head_modules: list[str]
    needed: dict[str, set[str]]


def prepare(stored: Stored, base_dir: Path, base: MetaBase | None = None) -> Prepared:
    """Load the base of a checkpoint and see what the checkpoint must bring.

    Args:
        stored: the checkpoint.
        base_dir: the base's folder.
        base: it, where it is not to be in memory as a whole; what tasks have copies of is loaded.

    Raises:
        BaseModelError: the base cannot be used, is another than the recorded one, or lacks
            weights that the checkpoint does not have either.
        CheckpointError: heads, and the base is no encoder classifier.
    """
    wanted = stored.config.base.sha256
    if wanted is not None and (found := base_sha256(base_dir)) != wanted:
        raise BaseModelError(
            f"the weights in {base_dir} have the SHA-256 {found}",
            expected=f"{wanted}, the base the checkpoint was trained on",
        )
    hf_model, missing = read_base(base_dir) if base is None else (base.hf, base.missing)
    modules, needed = _head_needs(hf_model, stored, missing)
    if base is not None and is_classifier(hf_model):
        for path in (head_module(hf_model), *modules):
            base.keep(hf_model.get_submodule(path))
    brought = set.intersection(*needed.values())
    require(base_dir, [name for name in missing if name not in brought])
    # Trainers list names of several architectures; what has tensors is compared later.
    paths = [path for path, _ in hf_model.named_modules()]
    targets = tuple(target for target in stored.config.targets if named(target, paths))
    if not targets:
        raise CheckpointError(
            f"no linear of {base_dir} is named {' or '.join(stored.config.targets)}",
            fix="give the base the checkpoint was trained on",
        )
    config = dataclasses.replace(stored.config, targets=targets)
    return Prepared(hf_model, config, modules, needed)


def _head_needs(
    hf_model: PreTrainedModel, stored: Stored, missing: Collection[str]
) -> tuple[list[str], dict[str, set[str]]]:
    """Return the modules beside the head that tasks have copies of, and what each must bring.

    That is whatever of these modules the base has no weights for, and the head's last linear
    where the base's has another width than the task.
    """
    tasks = stored.config.tasks
    if not is_classifier(hf_model):
        if stored.heads:
            raise CheckpointError(
                f"the checkpoint has heads for {', '.join(stored.heads)}",
                expected="none: the base is no encoder classifier",
            )
        return [], {task.name: set() for task in tasks}
    head = head_module(hf_model)
    modules = modules_of({name for given in stored.heads.values() for name in given}, head)
    copied = tuple(f"{module}." for module in (head, *modules))
    absent = {name for name in missing if name.startswith(copied)}
    prefix, linear = last_linear(hf_model.get_submodule(head), head)
    last = {f"{prefix}.{name}" for name, _ in linear.named_parameters()}
    return modules, {
        task.name: absent | (last if linear.out_features != task.num_outputs else set())
        for task in tasks
    }
