"""What an EPT checkpoint says about itself: `EptConfig`, whose JSON form is `ept_config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from eptc.errors import CheckpointError, OptionError
from eptc.nn.rules import (
    ANY_BASE,
    DEFAULT_SCALE,
    RELEASED_GATE,
    BaseInfo,
    GateConfig,
    ModuleConfig,
    ScaleConfig,
    Sharing,
    Variant,
    choice,
    count,
    strings,
)
from eptc.similar_names import did_you_mean
from eptc.tasks import Task

__all__ = ["EptConfig"]

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class EptConfig:
    """Everything about an EPT checkpoint that its tensors do not say.

    Args:
        variant: `released` (the authors' code) or `paper` (the published formula).
        targets: names of the linears to adapt; a module matches when its full name equals a
            target or ends with "." + target.
        kernel_sizes: the kernel size of each expert.
        top_k: how many experts a task uses, of at most as many as there are sizes.
        rank: rank r of A and B.
        tasks: in the order of their ids.
        scale: the factor of every expert; alpha/r with alpha 16 where not given.
        gate: what routers read and how gates follow from logits; the variant's own where not
            given.
        sharing: whether each linear has its own A and B, or the model one pair (paper only).
        modules: what differs in single linears, by their full names.
        base: which base model the checkpoint belongs to.

    Raises:
        OptionError: a field of the wrong form, or two that contradict each other.
    """

    variant: Variant
    targets: tuple[str, ...]
    kernel_sizes: tuple[int, ...]
    top_k: int
    rank: int
    tasks: tuple[Task, ...]
    scale: ScaleConfig = DEFAULT_SCALE
    gate: GateConfig | None = None
    sharing: Sharing = "per-linear"
    modules: Mapping[str, ModuleConfig] = dataclasses.field(default_factory=dict)
    base: BaseInfo = ANY_BASE

    def __post_init__(self) -> None:
        choice(self.variant, get_args(Variant), "variant")
        choice(self.sharing, get_args(Sharing), "sharing")
        strings(self.targets, "targets")
        if not self.targets:
            raise OptionError("targets is empty", expected="names of linears")
        self._check_experts()
        count(self.rank, "rank")
        if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
            raise OptionError(f"tasks is {self.tasks!r}", expected="one task or more")
        strings(tuple(task.name for task in self.tasks), "tasks")
        if self.gate is None:
            gate = RELEASED_GATE if self.variant == "released" else GateConfig()
            object.__setattr__(self, "gate", gate)
        if self.variant == "released":
            self._check_released()
        self._check_modules()

    def _check_experts(self) -> None:
        if not isinstance(self.kernel_sizes, tuple) or not self.kernel_sizes:
            raise OptionError(
                f"kernel_sizes is {self.kernel_sizes!r}", expected="a size for each expert"
            )
        for size in self.kernel_sizes:
            # A of the released code has in // 2 columns: a kernel of size 1 would need all of in.
            count(size, "a kernel size", least=2 if self.variant == "released" else 1)
        count(self.top_k, "top_k")
        if self.top_k > len(self.kernel_sizes):
            raise OptionError(
                f"top_k is {self.top_k}", expected=f"at most the {len(self.kernel_sizes)} experts"
            )

    def _check_released(self) -> None:
        if self.gate != RELEASED_GATE:
            raise OptionError(
                f"the variant 'released' has the gate {self.gate}", expected=str(RELEASED_GATE)
            )
        if self.sharing != "per-linear":
            raise OptionError("the variant 'released' shares A and B", fix="use 'per-linear'")
        if self.scale.rule == "d/T":
            raise OptionError(
                "the variant 'released' has the scale rule 'd/T'",
                expected="'alpha/r' or 'alpha/sqrt(r)'",
            )

    def _check_modules(self) -> None:
        for path, module in self.modules.items():
            if module.rank is not None and self.sharing == "model":
                raise OptionError(f"{path} has a rank of its own and shares A and B")
            if module.alpha is not None and self.scale.rule == "d/T":
                raise OptionError(f"{path} has an alpha, and the rule 'd/T' has none")

    @property
    def gates(self) -> GateConfig:
        """The gate rule, the variant's own where none was given."""
        assert self.gate is not None  # __post_init__ fills it in
        return self.gate

    def matches(self, path: str) -> bool:
        """Whether a module's full name is one of the targets' (specs, what is adapted)."""
        return any(path == target or path.endswith(f".{target}") for target in self.targets)

    def rank_of(self, path: str) -> int:
        """Return the rank of one linear."""
        module = self.modules.get(path)
        return self.rank if module is None or module.rank is None else module.rank

    def scaling_of(self, path: str) -> float:
        """Return the factor all experts of one linear have in common (1 / T under `d/T`)."""
        if self.scale.denominator is not None:
            return 1 / self.scale.denominator
        module = self.modules.get(path)
        alpha = self.scale.alpha if module is None or module.alpha is None else module.alpha
        assert alpha is not None  # ScaleConfig checks it
        rank = self.rank_of(path)
        return alpha / (math.sqrt(rank) if self.scale.rule == "alpha/sqrt(r)" else rank)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as the JSON values of `ept_config.json`."""
        scale = dataclasses.asdict(self.scale)
        return {
            "schema_version": SCHEMA_VERSION,
            "variant": self.variant,
            "base": dataclasses.asdict(self.base),
            "kernel_sizes": list(self.kernel_sizes),
            "top_k": self.top_k,
            "rank": self.rank,
            "gate": dataclasses.asdict(self.gates),
            "scale": {key: value for key, value in scale.items() if value is not None},
            "sharing": self.sharing,
            "modules": {
                path: {k: v for k, v in dataclasses.asdict(module).items() if v is not None}
                for path, module in sorted(self.modules.items())
            },
            "targets": list(self.targets),
            "tasks": [task.to_json() for task in self.tasks],
        }

    @classmethod
    def from_json(cls, data: object) -> EptConfig:
        """Make a configuration from the JSON values of `ept_config.json`.

        Raises:
            CheckpointError: another schema version, an unknown key (the nearest known one is
                named), a missing key, or a value of the wrong form.
            TaskError: a task that is not well formed.
        """
        try:
            return cls._from_json(_object(data, "ept_config.json"))
        except OptionError as error:
            raise CheckpointError(
                f"ept_config.json: {error.found}", expected=error.expected, fix=error.fix
            ) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> EptConfig:
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise OptionError(
                f"schema_version is {version!r}",
                expected=f"{SCHEMA_VERSION}, the one this version of eptc reads",
            )
        fields = [field.name for field in dataclasses.fields(cls)]
        optional = ("gate", "sharing", "modules", "base")
        _check_keys(data, ["schema_version", *fields], [f for f in fields if f not in optional])
        values = {key: value for key, value in data.items() if key != "schema_version"}
        for key in ("targets", "kernel_sizes"):
            values[key] = tuple(_list(values[key], key))
        values["tasks"] = tuple(Task.from_json(task) for task in _list(values["tasks"], "tasks"))
        for key, kind in (("base", BaseInfo), ("gate", GateConfig), ("scale", ScaleConfig)):
            if key in values:
                values[key] = _record(kind, values[key], key)
        values["modules"] = {
            path: _record(ModuleConfig, module, f"modules[{path!r}]")
            for path, module in _object(values.get("modules", {}), "modules").items()
        }
        return cls(**values)


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{what} is {value!r}", expected="an object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise OptionError(f"{what} is {value!r}", expected="a list")
    return value


def _record(kind: type[Any], value: object, what: str) -> Any:
    data = _object(value, what)
    _check_keys(data, [field.name for field in dataclasses.fields(kind)], [], f"{what}.")
    return kind(**data)


def _check_keys(
    data: Mapping[str, Any], known: Sequence[str], required: Sequence[str], prefix: str = ""
) -> None:
    for key in data:
        if key not in known:
            raise OptionError(
                f"unknown key '{prefix}{key}'{did_you_mean(key, known)}",
                expected=", ".join(known),
            )
    if missing := [key for key in required if key not in data]:
        raise OptionError(f"the key {missing[0]!r} is missing", expected=", ".join(required))
