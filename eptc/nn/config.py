"""What an EPT checkpoint says about itself: `EptConfig`, whose JSON form is `ept_config.json`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from eptc.errors import CheckpointError, OptionError
from eptc.tasks import Task

__all__ = ["BaseInfo", "EptConfig", "GateConfig", "ModuleConfig", "ScaleConfig"]

SCHEMA_VERSION = 1

Variant = Literal["released", "paper"]
Sharing = Literal["per-linear", "model"]
Normalization = Literal["softmax", "sum", "none"]
ScaleRule = Literal["alpha/r", "alpha/sqrt(r)", "d/T"]


def _choice(value: object, choices: Sequence[str], what: str) -> None:
    if value not in choices:
        raise OptionError(f"{what} is {value!r}", expected=" or ".join(map(repr, choices)))


def _count(value: object, what: str, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{what} is {value!r}", expected=f"an integer of {least} or more")


def _positive(value: object, what: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[operator,arg-type]
        raise OptionError(f"{what} is {value!r}", expected="a finite number above 0")


def _strings(value: object, what: str) -> None:
    if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
        raise OptionError(f"{what} is {value!r}", expected="a tuple of names")
    if len(set(value)) != len(value):
        raise OptionError(f"{what} names something twice: {', '.join(value)}")


@dataclasses.dataclass(frozen=True)
class BaseInfo:
    """Which base model a checkpoint belongs to.

    Args:
        model_type: the base's `model_type`; None until a model is attached.
        name: what its users call it.
        sha256: SHA-256 of its stored tensors (`base_sha256`); None where it was not recorded.
    """

    model_type: str | None = None
    name: str = ""
    sha256: str | None = None

    def __post_init__(self) -> None:
        for key in ("model_type", "sha256"):
            if not isinstance(getattr(self, key), str | None):
                raise OptionError(f"base.{key} is {getattr(self, key)!r}", expected="a string")
        if not isinstance(self.name, str):
            raise OptionError(f"base.name is {self.name!r}", expected="a string")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How an expert's gate follows from the router's logits.

    Args:
        router_input: what the router reads; `task` is the task embedding alone.
        temperature: divides the logits (no unit).
        normalization: of the kept probabilities: `softmax` of them (released code), division by
            their `sum` (paper), or `none`.
    """

    router_input: Literal["task"] = "task"
    temperature: float = 0.05
    normalization: Normalization = "sum"

    def __post_init__(self) -> None:
        _choice(self.router_input, ("task",), "gate.router_input")
        _positive(self.temperature, "gate.temperature")
        _choice(self.normalization, get_args(Normalization), "gate.normalization")


RELEASED_GATE = GateConfig("task", 1.0, "softmax")


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """The factor of every expert.

    Args:
        rule: `alpha/r`, `alpha/sqrt(r)`, or the paper's `d/T`: an expert's latent width
            ceil(min(out, in) / s) over a fixed denominator.
        alpha: of the first two rules.
        denominator: of `d/T`.
    """

    rule: ScaleRule = "alpha/r"
    alpha: float | None = None
    denominator: float | None = None

    def __post_init__(self) -> None:
        _choice(self.rule, get_args(ScaleRule), "scale.rule")
        used, unused = ("denominator", "alpha") if self.rule == "d/T" else ("alpha", "denominator")
        if getattr(self, unused) is not None:
            raise OptionError(f"scale.{unused} is given, and the rule {self.rule!r} has none")
        _positive(getattr(self, used), f"scale.{used}")


@dataclasses.dataclass(frozen=True)
class ModuleConfig:
    """What differs from the defaults in one linear; None keeps the default."""

    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            _count(self.rank, "a module's rank")
        if self.alpha is not None:
            _positive(self.alpha, "a module's alpha")


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
        gate: how gates follow from logits; the variant's own where not given.
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
    scale: ScaleConfig = ScaleConfig("alpha/r", alpha=16)
    gate: GateConfig | None = None
    sharing: Sharing = "per-linear"
    modules: Mapping[str, ModuleConfig] = dataclasses.field(default_factory=dict)
    base: BaseInfo = BaseInfo()

    def __post_init__(self) -> None:
        _choice(self.variant, get_args(Variant), "variant")
        _choice(self.sharing, get_args(Sharing), "sharing")
        _strings(self.targets, "targets")
        if not self.targets:
            raise OptionError("targets is empty", expected="names of linears")
        self._check_experts()
        _count(self.rank, "rank")
        if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
            raise OptionError(f"tasks is {self.tasks!r}", expected="one task or more")
        _strings(tuple(task.name for task in self.tasks), "tasks")
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
            _count(size, "a kernel size", least=2 if self.variant == "released" else 1)
        _count(self.top_k, "top_k")
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
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise OptionError(
                f"unknown key '{prefix}{key}'" + (f"; nearest: {close[0]!r}" if close else ""),
                expected=", ".join(known),
            )
    if missing := [key for key in required if key not in data]:
        raise OptionError(f"the key {missing[0]!r} is missing", expected=", ".join(required))
