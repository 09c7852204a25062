"""Reader of stock PEFT LoRA adapters: one constant low-rank branch beside each linear."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc.checkpoint.base import BaseModel, read_json
from eptc.checkpoint.contents import Contents, ReadOptions, Source, check_fit, consume_all
from eptc.checkpoint.peft_folder import CONFIG, read_tensors
from eptc.checkpoint.replaced import head_rows, take_replaced
from eptc.checkpoint.single_task import single_task
from eptc.errors import CheckpointError
from eptc.ir import Adapter, Branch, Constant, LowRank
from eptc.runtime.routing import RoutingSpec

__all__ = ["read_lora"]

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# What PEFT puts around a module of the model: a copy that is trained, or low ranks.
_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
# What that copy stands for: no forward pass reads it.
_ORIGINAL = ".original_module."
_MERGE = "merge it in PEFT (merge_and_unload) and use the merged model"
# Options that change what the tensors mean, and what to call them.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "fan_in_fan_out": "fan_in_fan_out (weights stored transposed)",
    "layer_replication": "layer_replication",
    "lora_bias": "biases of the low ranks (lora_bias)",
    "megatron_config": "Megatron layers",
    "loftq_config": "LoftQ (a quantised base)",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow (a router over several adapters)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract from its weights what the low ranks start with.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_lora(path: Path, base: BaseModel, options: ReadOptions) -> Contents:
    """Read a stock PEFT LoRA adapter, rsLoRA included.

    Args:
        path: the folder: adapter_config.json and adapter_model.safetensors or .bin.
        base: the base model it was trained on.
        options: the task's name and description.

    Raises:
        CheckpointError: a kind of LoRA that is more than a low rank (DoRA and its like); missing,
            extra, misshapen or non-finite tensors.
        OptionError: an option that has no meaning here.
    """
    config = read_json(path / CONFIG, CheckpointError)
    _check(path, config)
    tensors = read_tensors(path, options.allow_pickle)
    matches = {name: match for name in tensors if (match := _KEY.fullmatch(name))}
    modules = sorted({match["module"] for match in matches.values()})
    source = Source(path, tensors)
    others = {name: _plain(path, name) for name in sorted(set(tensors) - set(matches))}
    for name in [name for name in others if _ORIGINAL in name]:
        source.take(name, tensors[name].shape)
        del others[name]
    shapes = {}
    for module in modules:
        pair = [f"{_PREFIX}{module}.lora_{part}.weight" for part in "AB"]
        if lost := [name for name in pair if name not in tensors]:
            raise CheckpointError(f"{path} lacks {lost[0]}", fix="use the file training saved")
        a, b = (tensors[name].shape for name in pair)
        shapes[module] = (b[0], a[-1])
    _check_places(path, base, config, modules)
    check_fit(path, base, shapes)
    scaling = _Scaling.read(path, config)
    adapters = {module: _adapter(source, module, base, scaling) for module in modules}
    replaced = take_replaced(source, base, others)
    consume_all(source)
    task = single_task(options, base.config, head_rows(base, replaced.head))
    return Contents(
        format="lora",
        variant="rslora" if scaling.rslora else "lora",
        adapters=adapters,
        heads={task.name: replaced.head} if replaced.head else {},
        tasks=(task,),
        tensors=source.finite,
        config=config,
        weights=replaced.weights,
        settings=replaced.settings,
        routing=RoutingSpec("constant"),
        details={"ranks": sorted({b.delta.rank_bound for a in adapters.values()
                                  for b in a.branches})},
    )  # fmt: skip


def _check_places(
    path: Path, base: BaseModel, config: Mapping[str, Any], modules: Sequence[str]
) -> None:
    """Refuse adapters of models that are not the base's task model, by what tells them apart."""
    arch = base.architecture
    if config.get("task_type") == "SEQ_CLS" and arch.kind != "encoder-classifier":
        raise CheckpointError(
            f"{path} was trained on a {arch.model_type} with a classification head (SEQ_CLS)",
            expected=f"an adapter of {arch.task_class}: with LoRA only encoders classify",
        )
    for module in modules:
        if f"{module}.weight" == arch.head and base.tied_head:
            raise CheckpointError(
                f"{path} adapts {module}, which is the embedding itself in {base.path}",
                expected="an adapter of linears that have weights of their own",
                fix=_MERGE,
            )
        bare = arch.prefix and module.split(".")[0] in arch.bare
        if bare and module not in base.linears and f"{arch.prefix}.{module}" in base.linears:
            raise CheckpointError(
                f"{path} was trained on the bare {arch.model_type}, without a head (its first "
                f"linear is {module}, not {arch.prefix}.{module})",
                expected=f"an adapter of {arch.task_class}",
                fix="train it on the task model: features are no answers",
            )


def _check(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path / CONFIG} has peft_type {config.get('peft_type')!r}", expected="'LORA'"
        )
    for key, name in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{path / CONFIG} uses {name}: {key} = {config[key]!r}",
                expected="a LoRA that adds B A x to each linear",
                fix=_MERGE,
            )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path / CONFIG} has init_lora_weights = {start!r}, which changes the base model's "
            "weights before training",
            expected="an initialisation that leaves them as they are",
            fix="save the adapter converted to a plain LoRA (path_initial_model_for_weight_"
            "conversion in PEFT's save_pretrained)",
        )


def _plain(path: Path, name: str) -> str:
    """Return what PEFT's name of a parameter that it saved whole is in the Hugging Face model."""
    if ".lora_" in name or not name.startswith(_PREFIX):
        kind = "DoRA's" if "lora_magnitude" in name else "none of a plain LoRA's"
        raise CheckpointError(
            f"{path} has the tensor {name}, which is {kind}",
            expected=f"{_PREFIX}<linear>.lora_A.weight and .lora_B.weight",
            fix=_MERGE,
        )
    return _WRAPPER.sub("", name.removeprefix(_PREFIX))


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """PEFT's rule for the factor of a linear's branch."""

    alpha: float
    patterns: Mapping[str, float]
    ranks: Sequence[str]
    rslora: bool
    where: Path

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any]) -> _Scaling:
        try:
            found = cls(
                float(config["lora_alpha"]),
                {str(k): float(v) for k, v in dict(config.get("alpha_pattern") or {}).items()},
                [str(k) for k in dict(config.get("rank_pattern") or {})],
                bool(config.get("use_rslora")),
                path / CONFIG,
            )
            for key in (*found.patterns, *found.ranks):
                re.compile(key)
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{path / CONFIG} lacks a sound lora_alpha or pattern: {error!r}"
            ) from error
        if not all(map(math.isfinite, (found.alpha, *found.patterns.values()))):
            raise CheckpointError(f"{path / CONFIG} has an alpha that is not finite")
        return found

    def of(self, module: str, rank: int) -> float:
        """Return the factor of a linear's branch.

        Raises:
            CheckpointError: releases of PEFT do not agree on it.
        """
        # Since 0.14 each pattern is looked up by itself; before, the first key of either that
        # matches was looked up in both.
        now = next((k for k in self.patterns if re.match(rf"(.*\.)?({k})$", module)), None)
        keys = (*self.ranks, *self.patterns)
        then = next((k for k in keys if re.match(rf".*\.{k}$", module)), None)
        alpha = self.patterns.get(now or "", self.alpha)
        if self.patterns.get(then or "", self.alpha) != alpha:
            raise CheckpointError(
                f"{self.where} gives {module} another alpha in PEFT before 0.14 than since",
                fix="write alpha_pattern with the full name of each linear",
            )
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _adapter(source: Source, module: str, base: BaseModel, scaling: _Scaling) -> Adapter:
    out, columns = base.linears[module]
    a = source.take(f"{_PREFIX}{module}.lora_A.weight", (None, columns))
    rank = a.shape[0]
    if rank < 1:
        raise CheckpointError(f"{a.name} in {source.path} has no rows", expected="a rank above 0")
    b = source.take(f"{_PREFIX}{module}.lora_B.weight", (out, rank))
    delta = LowRank(a, b, out, columns)
    return Adapter(module, (Branch(delta, Constant(1.0), scaling.of(module, rank)),))
