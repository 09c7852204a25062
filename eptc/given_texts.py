"""The texts a build was given: to verify on, to score on, to see ranges on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc.errors import InputError
from eptc.examples_file import Example, read_task_examples
from eptc.job import Job
from eptc.options import Options

__all__ = ["GivenTexts"]


@dataclasses.dataclass(frozen=True)
class GivenTexts:
    """The texts a build was given.

    Args:
        probe: to verify on, by task where there are several; None for the built-in ones.
        data: labelled ones to score on; None where there are none.
        texts: what ranges of activations are seen on.
        notes: what a user should know about them.
        called: what `texts` are, for people.
    """

    probe: Sequence[Example] | Mapping[str, Sequence[Example]] | None = None
    data: Sequence[Mapping[str, Any]] | None = None
    texts: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    called: str = "the calibration text"

    @classmethod
    def read(cls, options: Options, job: Job) -> GivenTexts:
        """Read what the options name.

        Raises:
            InputError: a file cannot be read, has rows that are none of the task's, or one label.
        """
        if not (options.probe or options.data or options.calibrated):
            return cls()
        if job.several:  # and nothing but probes is taken
            assert options.probe is not None
            return cls(read_task_examples(Path(options.probe), job.tasks))
        task = job.task
        from eptc.calibration import read_calibration
        from eptc.parity_gate import builtin_examples, read_examples

        probe = None if options.probe is None else read_examples(Path(options.probe), task)
        data = None
        if options.data is not None:
            data = read_examples(Path(options.data), task, labelled=True)
            if len({example["label"] for example in data}) < 2:
                raise InputError(
                    f"every row of {options.data} has the label {data[0]['label']!r}",
                    expected="rows of several labels: of one alone there is no score",
                )
        if options.calibration is None:
            called = "labelled data" if data else "probes" if probe else "built-in sentences"
            texts = data or probe or builtin_examples(task)
            return cls(probe, data, texts, called=f"the {called}")
        texts, notes = read_calibration(Path(options.calibration), task)
        return cls(probe, data, texts, notes)

    def cautions(self, found: str) -> tuple[str, ...]:
        """Return a warning where gates were only judged on the text that their means are of.

        Args:
            found: what that judgement was.
        """
        seen = [_fields(text) for text in self.texts]
        if self.data is not None and not any(_fields(row) in seen for row in self.data):
            return ()
        built_in = self.called == "the built-in sentences"
        return (
            f"{found}; the means of the gates were taken from the same text, so that is no "
            "measure on held-out data"
            + ("; nor is it the task's own text: give that with --calibration" if built_in else "")
            + "; score other rows with --data",
        )


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example without its label."""
    return {name: value for name, value in row.items() if name != "label"}
