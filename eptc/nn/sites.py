"""Where in a model adapters go: its target linears, what they share, which losses count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from eptc.errors import OptionError
from eptc.nn import losses
from eptc.nn.config import EptConfig
from eptc.nn.experts import Factors, PaperExperts
from eptc.similar_names import similar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["block_lists", "contributing", "named", "shared_factors", "target_linears"]


def named(target: str, paths: Iterable[str]) -> bool:
    """Whether a target names one of some modules."""
    return any(path == target or path.endswith(f".{target}") for path in paths)


def target_linears(hf_model: PreTrainedModel, config: EptConfig) -> dict[str, nn.Linear]:
    """Return the linears to adapt, by their full names, in the model's order.

    Raises:
        OptionError: a target names no linear, or something else; an override names no target.
    """
    found = {path: m for path, m in hf_model.named_modules() if config.matches(path)}
    for path, module in found.items():
        if not isinstance(module, nn.Linear):
            raise OptionError(f"{path} is a {type(module).__name__}", expected="a linear")
    names = {p.rpartition(".")[2] for p, m in hf_model.named_modules() if type(m) is nn.Linear}
    for target in config.targets:
        if not named(target, found):
            close = similar(target, names, 3)
            raise OptionError(
                f"no linear of the base is named {target!r}",
                expected=f"one of its linears, such as {', '.join(close or sorted(names))}",
            )
    if unknown := sorted(config.modules.keys() - found.keys()):
        raise OptionError(f"modules names {unknown[0]!r}", expected="an adapted linear")
    return {path: module for path, module in found.items() if isinstance(module, nn.Linear)}


def shared_factors(linears: Mapping[str, nn.Linear], config: EptConfig) -> Factors | None:
    """Return one A and B with the largest crops any linear needs, None where none is shared."""
    if config.sharing != "model":
        return None
    shapes = [
        PaperExperts.factor_shape(linear.in_features, linear.out_features, config.kernel_sizes)
        for linear in linears.values()
    ]
    return Factors(config.rank, max(c for c, _ in shapes), max(r for _, r in shapes))


def contributing(
    hf_model: PreTrainedModel, config: EptConfig, layers: Iterable[str]
) -> tuple[str, ...]:
    """Return the linears whose contrastive losses are part of the total."""
    encoder = None
    if hf_model.config.is_encoder_decoder:
        inner = hf_model.get_encoder()
        encoder = next(path for path, module in hf_model.named_modules() if module is inner)
    kind = hf_model.config.model_type
    return tuple(path for path in layers if losses.contributes(config, kind, path, encoder))


def block_lists(hf_model: nn.Module, heads: Iterable[str] = ()) -> list[list[str]]:
    """Return the full names of the blocks of each stack: the outermost lists of modules.

    Args:
        hf_model: the model.
        heads: modules that stand for one a task; their lists are no stacks.
    """
    lists: list[str] = []
    for path, module in hf_model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in (*lists, *heads))
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(path)
    return [
        [f"{path}.{name}" for name, _ in hf_model.get_submodule(path).named_children()]
        for path in lists
    ]
