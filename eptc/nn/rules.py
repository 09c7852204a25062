"""The parts of an EPT configuration: base, gates, scales, and what single linears change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

from eptc.errors import OptionError

__all__ = [
    "ANY_BASE",
    "DEFAULT_SCALE",
    "RELEASED_GATE",
    "BaseInfo",
    "GateConfig",
    "ModuleConfig",
    "ScaleConfig",
    "Sharing",
    "Variant",
    "choice",
    "count",
    "strings",
]

Variant = Literal["released", "paper"]
Sharing = Literal["per-linear", "model"]
Normalization = Literal["softmax", "sum", "none"]
RouterInput = Literal["task", "token", "token+task"]
ScaleRule = Literal["alpha/r", "alpha/sqrt(r)", "d/T"]


def choice(value: object, choices: Sequence[str], what: str) -> None:
    """Raise OptionError where a value is none of the choices."""
    if value not in choices:
        raise OptionError(f"{what} is {value!r}", expected=" or ".join(map(repr, choices)))


def count(value: object, what: str, least: int = 1) -> None:
    """Raise OptionError where a value is no integer of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{what} is {value!r}", expected=f"an integer of {least} or more")


def positive(value: object, what: str) -> None:
    """Raise OptionError where a value is no finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[operator,arg-type]
        raise OptionError(f"{what} is {value!r}", expected="a finite number above 0")


def strings(value: object, what: str) -> None:
    """Raise OptionError where a value is no tuple of different names."""
    if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
        raise OptionError(f"{what} is {value!r}", expected="a tuple of names")
    if len(set(value)) != len(value):
        raise OptionError(f"{what} names something twice: {', '.join(value)}")


@dataclasses.dataclass(frozen=True)
class BaseInfo:
    """Which base model a checkpoint belongs to.

    Args:
        model_type: the base's `model_type`; None until a model is attached.
        name: what its users call it; None where nobody said.
        sha256: SHA-256 of its stored tensors (`base_sha256`); None where it was not recorded.
    """

    model_type: str | None = None
    name: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            if not isinstance(value, str | None):
                raise OptionError(f"base.{key} is {value!r}", expected="a string")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How an expert's gate follows from the router's logits.

    Args:
        router_input: what the router reads: the task's embedding e alone (`task`), the linear's
            input x at each position (`token`), or x + e (`token+task`).
        temperature: divides the logits (no unit).
        normalization: of the kept probabilities: `softmax` of them (released code), division by
            their `sum` (paper), or `none`.
    """

    router_input: RouterInput = "task"
    temperature: float = 0.05
    normalization: Normalization = "sum"

    def __post_init__(self) -> None:
        choice(self.router_input, get_args(RouterInput), "gate.router_input")
        positive(self.temperature, "gate.temperature")
        choice(self.normalization, get_args(Normalization), "gate.normalization")


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
        choice(self.rule, get_args(ScaleRule), "scale.rule")
        used, unused = ("denominator", "alpha") if self.rule == "d/T" else ("alpha", "denominator")
        if getattr(self, unused) is not None:
            raise OptionError(f"scale.{unused} is given, and the rule {self.rule!r} has none")
        positive(getattr(self, used), f"scale.{used}")


DEFAULT_SCALE = ScaleConfig("alpha/r", alpha=16)
ANY_BASE = BaseInfo()


@dataclasses.dataclass(frozen=True)
class ModuleConfig:
    """What differs from the defaults in one linear; None keeps the default."""

    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            count(self.rank, "a module's rank")
        if self.alpha is not None:
            positive(self.alpha, "a module's alpha")
