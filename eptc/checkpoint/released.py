"""Reader of the folders that the EPT authors' released code writes (a PEFT LoRA with extras).

The folder does not say how many experts a task uses (top-k) nor what its tasks are: both are
supplied by the caller. Everything else is in the tensors' names and shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptc.checkpoint.base import BaseModel, read_json
from eptc.checkpoint.contents import Contents, ReadOptions, Source, check_fit, consume_all
from eptc.checkpoint.peft_folder import CONFIG, read_tensors
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.ir import Adapter, Branch, CellScaledLowRank, PerTask, TaskRouter
from eptc.tasks import GLUE, Task, tasks_from_names
from eptc.tensors import LazyTensor

__all__ = ["PUBLISHED_TASKS", "read_released"]


# The order of the published training script.
PUBLISHED_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_gate\.0\.weight|lora_gate\.0\.bias"
    r"|lora_task_embedding\.weight|lora_expert_kernels\.(?:0|[1-9]\d*))"
)
# Each part and how many axes it has.
_PARTS = {
    "lora_A.weight": 2,
    "lora_B.weight": 2,
    "lora_gate.0.weight": 2,
    "lora_gate.0.bias": 1,
    "lora_task_embedding.weight": 2,
}
_KERNEL = "lora_expert_kernels."
# Options of PEFT that change the arithmetic in ways the released code does not train.
_REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "fan_in_fan_out (weights stored transposed)",
    "layer_replication": "layer_replication",
    "modules_to_save": "modules_to_save",
    "lora_bias": "lora_bias",
    "megatron_config": "Megatron layers",
    "loftq_config": "LoftQ (a quantised base)",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
}


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """PEFT's rules for rank and alpha of one module."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    def of(self, module: str) -> tuple[int, float]:
        """Return the module's rank and the factor of its branches.

        As PEFT 0.10 does: the first key of either pattern that matches the end of the module's
        name is looked up in both.
        """
        keys = itertools.chain(self.rank_pattern, self.alpha_pattern)
        key = next((k for k in keys if re.match(rf".*\.{k}$", module)), module)
        rank = self.rank_pattern.get(key, self.r)
        alpha = self.alpha_pattern.get(key, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_released(path: Path, base: BaseModel, options: ReadOptions) -> Contents:
    """Read a folder of the released code.

    Args:
        path: the folder: adapter_config.json and adapter_model.safetensors or .bin.
        base: the base model it was trained on.
        options: top_k and tasks, which are stored nowhere in the folder; descriptions of tasks
            beside the published GLUE ones.

    Raises:
        CheckpointError: missing, extra, misshapen or non-finite tensors, or a PEFT option that
            the released code does not train.
        OptionError: top-k or tasks missing, with what the folder itself suggests.
    """
    config = read_json(path / CONFIG, CheckpointError)
    scaling = _scaling(path, config)
    tensors = read_tensors(path, options.allow_pickle)
    modules = _group(path, tensors)
    sizes = _kernel_sizes(path, modules)
    k = _check_top_k(options.top_k, modules, len(sizes))
    rows = next(iter(modules.values()))["lora_task_embedding.weight"].shape[0]
    described = _check_tasks(options.tasks, rows, options.specs)
    check_fit(
        path,
        base,
        {
            module: (2 * parts["lora_B.weight"].shape[0], parts["lora_gate.0.weight"].shape[-1])
            for module, parts in modules.items()
        },
        halves=True,
    )
    source = Source(path, tensors)
    adapters = {
        module: _adapter(source, module, parts, base, scaling, k)
        for module, parts in sorted(modules.items())
    }
    consume_all(source)
    return Contents(
        format="released",
        variant="released",
        adapters=adapters,
        heads={},
        tasks=described,
        top_k=k,
        kernel_sizes=sizes,
        tensors=source.finite,
        config=config,
    )


def _scaling(path: Path, config: Mapping[str, Any]) -> _Scaling:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path / CONFIG} has peft_type {config.get('peft_type')!r}",
            expected="'LORA', as the released EPT code writes",
        )
    for key, name in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{path / CONFIG} uses {name}: {key} = {config[key]!r}",
                expected="a checkpoint of the released EPT code, which cannot train that",
            )
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        raise CheckpointError(
            f"{path / CONFIG} has init_lora_weights = {config['init_lora_weights']!r}, which "
            "changes the base model's weights",
            expected="true, false or 'gaussian'",
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path / CONFIG} has bias = {config['bias']!r}", expected="'none'")
    try:
        scaling = _Scaling(
            int(config["r"]),
            float(config["lora_alpha"]),
            {k: int(rank) for k, rank in dict(config.get("rank_pattern") or {}).items()},
            {k: float(alpha) for k, alpha in dict(config.get("alpha_pattern") or {}).items()},
            bool(config.get("use_rslora")),
        )
        for key in (*scaling.rank_pattern, *scaling.alpha_pattern):
            re.compile(key)
    except re.error as error:
        raise CheckpointError(
            f"{path / CONFIG} has a pattern that is no regular expression: {error}"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} lacks a sound r or lora_alpha: {error}") from error
    ranks = [scaling.r, *scaling.rank_pattern.values()]
    alphas = [scaling.alpha, *scaling.alpha_pattern.values()]
    if min(ranks) < 1 or not all(map(math.isfinite, alphas)):
        raise CheckpointError(f"{path / CONFIG} has the ranks {ranks} and alphas {alphas}")
    return scaling


def _group(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
    """Return module path -> part -> tensor; every part of every module, nothing else."""
    modules: dict[str, dict[str, LazyTensor]] = {}
    extra = []
    for name, tensor in tensors.items():
        if match := _KEY.fullmatch(name):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            extra.append(name)
    if extra:
        raise CheckpointError(
            f"{path} has {len(extra)} tensors that are no part of an EPT adapter: "
            + ", ".join(sorted(extra)[:3]),
            expected="base_model.model.<module>.lora_{A,B,gate,task_embedding,expert_kernels}",
        )
    if not modules:
        raise CheckpointError(f"{path} has no tensors")
    numbers = (part.removeprefix(_KERNEL) for parts in modules.values() for part in parts)
    kernels = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    wanted = (*_PARTS, *(f"{_KERNEL}{e}" for e in range(kernels)))
    missing = [f"{m}.{part}" for m in modules for part in wanted if part not in modules[m]]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors: " + ", ".join(sorted(missing)[:3]),
            expected=f"{len(wanted)} tensors for each of {len(modules)} adapted linears",
            fix="use the file the training run saved; a stock PEFT adapter is not an EPT one",
        )
    for part, axes in _PARTS.items():
        for module, parts in modules.items():
            shape = parts[part].shape
            if len(shape) != axes or 0 in shape:
                raise CheckpointError(
                    f"{module}.{part} in {path} has the shape {list(shape)}",
                    expected="a vector" if axes == 1 else "a matrix",
                    fix="use the file the training run saved",
                )
    return modules


def _kernel_sizes(path: Path, modules: Mapping[str, Mapping[str, LazyTensor]]) -> tuple[int, ...]:
    found: dict[tuple[int, ...], str] = {}
    for module, parts in modules.items():
        experts = len(parts) - len(_PARTS)
        shapes = [parts[f"{_KERNEL}{e}"].shape for e in range(experts)]
        for e, shape in enumerate(shapes):
            if len(shape) != 4 or shape[0] != 1 or shape[3] != 1 or shape[2] < 2:
                raise CheckpointError(
                    f"{module}.{_KERNEL}{e} in {path} has the shape {list(shape)}",
                    expected="[1, cells, size, 1] with a size of 2 or more",
                )
        found.setdefault(tuple(shape[2] for shape in shapes), module)
    if len(found) > 1:
        (one, a), (two, b) = list(found.items())[:2]
        raise CheckpointError(
            f"{path} has the kernel sizes {list(one)} at {a} and {list(two)} at {b}",
            expected="one list of kernel sizes for all linears",
        )
    return next(iter(found))


def _check_top_k(
    top_k: int | None, modules: Mapping[str, Mapping[str, LazyTensor]], experts: int
) -> int:
    if top_k is None:
        raise OptionError(
            "the checkpoint does not say how many experts a task uses (moe_top_k): the released "
            "code saves it nowhere",
            expected=f"--top-k, 1 to {experts}. {suggest_top_k(modules)}",
            fix="look up --moe_top_k in the training command (the published script: 2; the "
            "code's default: 1)",
        )
    if not 1 <= top_k <= experts:
        raise OptionError(f"top-k is {top_k}", expected=f"1 to {experts}, the number of experts")
    return top_k


def suggest_top_k(modules: Mapping[str, Mapping[str, LazyTensor]]) -> str:
    """Say what the gates' statistics suggest about top-k, and why they cannot settle it.

    With top-k 1 the single mixing weight is always 1, the gate gets no gradient and its bias
    stays where it was drawn: within 1/sqrt(in) of zero.
    """
    moved = 0
    for parts in modules.values():
        bias, weight = parts["lora_gate.0.bias"], parts["lora_gate.0.weight"]
        limit = 1.0 / math.sqrt(weight.shape[-1])
        moved += bool(np.abs(bias.numpy().astype(np.float64)).max() > limit * (1 + 1e-6))
    kind = "2 or more (which, they cannot tell)" if moved > len(modules) // 2 else "1"
    return (
        f"The gates' biases left their initial range in {moved} of {len(modules)} linears, which "
        f"suggests {kind}; it is a hint, not a proof"
    )


def _check_tasks(
    names: tuple[str, ...] | None, rows: int, specs: Mapping[str, Task]
) -> tuple[Task, ...]:
    if not names:
        raise OptionError(
            "the checkpoint does not say which tasks it was trained on: the released code saves "
            "their names nowhere",
            expected="--tasks with the names in the order they were trained with, as in "
            f"--tasks {','.join(PUBLISHED_TASKS)}",
            fix="look up --tasks in the training command (above: the published script's)",
        )
    if len(names) > rows:
        raise OptionError(
            f"--tasks names {len(names)} tasks", expected=f"at most {rows}: one per embedding row"
        )
    if unknown := [name for name in specs if name not in names and name not in GLUE]:
        raise TaskError(
            f"the task description names {unknown[0]!r}", expected=f"one of {', '.join(names)}"
        )
    return tasks_from_names(names, {**GLUE, **specs})


def _adapter(
    source: Source,
    module: str,
    parts: Mapping[str, LazyTensor],
    base: BaseModel,
    scaling: _Scaling,
    top_k: int,
) -> Adapter:
    out, columns = base.linears[module]
    rank, scale = scaling.of(module)
    experts = len(parts) - len(_PARTS)
    rows = parts["lora_task_embedding.weight"].shape[:1]
    prefix = f"base_model.model.{module}"

    def take(part: str, shape: tuple[int | None, ...]) -> LazyTensor:
        return source.take(f"{prefix}.{part}", shape)

    a = take("lora_A.weight", (rank, columns // 2))
    b = take("lora_B.weight", (out // 2, rank))
    router = TaskRouter(
        weight=take("lora_gate.0.weight", (experts, columns)),
        bias=take("lora_gate.0.bias", (experts,)),
        embedding=take("lora_task_embedding.weight", (*rows, columns)),
        top_k=top_k,
        temperature=1.0,
        normalization="softmax",
    )
    branches = []
    for e in range(experts):
        size = parts[f"{_KERNEL}{e}"].shape[2]
        kernel = take(f"{_KERNEL}{e}", (1, max(1, out // size), size, 1))
        delta = CellScaledLowRank(a, b, kernel, out, columns)
        branches.append(Branch(delta, PerTask(router, e), scale))
    return Adapter(module, tuple(branches))
