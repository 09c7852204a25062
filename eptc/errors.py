"""Every error eptc raises on purpose, and the exit code each one ends the command with.

::

    EptcError
    ├── InputError             2   what the caller gave cannot be used
    │   ├── CheckpointError        an adapter checkpoint: files, names, shapes, values
    │   ├── BaseModelError         the base model's folder
    │   ├── TaskError              a task's name, id, alias or description
    │   ├── OptionError            an option, or two that contradict each other
    │   ├── BundleError            a bundle that is damaged, too new or not one
    │   ├── OutputError            the place to write to
    │   ├── MissingExtraError      a package that an extra would have installed
    │   ├── PluginError            an installed package that extends eptc, by name
    │   └── RecipeError            a recipe or a plan: its form, its keys, their values
    ├── ParityError            1   the engine does not give the reference's answers
    └── InternalError         70   a bug in eptc
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BaseModelError",
    "BundleError",
    "CheckpointError",
    "EptcError",
    "InputError",
    "InternalError",
    "MissingExtraError",
    "OptionError",
    "OutputError",
    "ParityError",
    "PluginError",
    "RecipeError",
    "TaskError",
]


class EptcError(Exception):
    """An error with what was found, what was expected and what to do.

    Args:
        found: what was found, one sentence without a full stop.
        expected: what was expected instead.
        fix: what the caller can do about it.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, found: str, *, expected: str | None = None, fix: str | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.found]
        if self.expected is not None:
            lines.append(f"expected: {self.expected}")
        if self.fix is not None:
            lines.append(f"to fix: {self.fix}")
        return "\n".join(lines)


class InputError(EptcError):
    """What the caller gave cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """An adapter checkpoint cannot be read: files, names, shapes or values."""


class BaseModelError(InputError):
    """A base model's folder cannot be used."""


class TaskError(InputError):
    """A task's name, id, alias or description is not known or not well formed."""


class OptionError(InputError):
    """An option is wrong, missing, or contradicts the checkpoint."""


class BundleError(InputError):
    """A bundle is damaged, newer than this version, or not a bundle."""


class OutputError(InputError):
    """The output cannot be written where it was asked for."""


class MissingExtraError(InputError):
    """A package is not installed; the message names the extra that installs it."""


class PluginError(InputError):
    """A package that extends eptc cannot be used, or fails; the message names it."""


class RecipeError(InputError):
    """A recipe, or a plan of many builds, cannot be read or written."""


class ParityError(EptcError):
    """The engine does not give the reference's answers."""

    exit_code = 1


class InternalError(EptcError):
    """A bug in eptc: a pass or a lowering broke a rule of its own."""

    exit_code = 70
