"""The target `genai`: a folder that onnxruntime-genai runs, made by its own model builder.

onnxruntime-genai depends on a package that takes the place of `onnxruntime-gpu`, so it lives in
an environment of its own; its interpreter is named with `--genai-python`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from eptc import genai_runner
from eptc.errors import InputError, MissingExtraError, OptionError
from eptc.folder_base import Folder, FolderJob, FolderTarget, write_provenance
from eptc.hf_export import check_model_options, fits, write_folded
from eptc.options import Options

__all__ = ["VARIABLE", "GenAi", "Interpreter"]

# Names the interpreter where no option does.
VARIABLE = "EPTC_GENAI_PYTHON"
_INSTALL = (
    "python -m venv genai && genai/bin/pip install onnxruntime-genai onnx onnx-ir torch "
    "transformers, then --genai-python genai/bin/python, or the environment variable " + VARIABLE
)
_PRECISIONS = ("fp32", "int4")


class GenAi(FolderTarget):
    """A decoder for onnxruntime-genai."""

    name: ClassVar[str] = "genai"
    takes: ClassVar[frozenset[str]] = frozenset({"genai_python", "precision", "probe"})

    def check(self, options: Options) -> None:
        """Raise OptionError for a precision the builder is not asked for."""
        check_model_options(options, _PRECISIONS, "whose model builder is asked for one of two")

    def write(self, job: FolderJob, directory: Path) -> Folder:
        """Fold, let the builder build, and compare what it wrote with the reference."""
        family = job.source.base.architecture
        if family.kind != "decoder-only":
            raise OptionError(
                f"--target {self.name} was given for a {family.model_type} {family.kind}, and "
                "onnxruntime-genai runs decoders alone",
                expected="a decoder, such as a Llama",
                fix="--target onnx compiles it; --target hf writes it for transformers",
            )
        if not fits(job):
            raise OptionError(
                f"--target {self.name} takes the whole model in memory, twice where it is "
                "verified, and that does not fit",
                fix="build it where there is more memory",
            )
        interpreter = Interpreter.find(job.options.genai_python)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            model = Path(scratch, "hf")
            model.mkdir()
            folded = write_folded(job, model, "float32")
            built = Path(scratch, "built")
            with job.clock.stage("onnxruntime-genai's model builder"):
                interpreter.build(model, built, job.options.precision)
            parity: dict[str, Any] = {"verified": False}
            if (gate := folded.gate) is not None:
                from eptc.parity_gate.genai import prove_genai

                with job.clock.stage("parity in onnxruntime-genai"):
                    found = prove_genai(
                        gate.reference, gate.task, gate.probes(folded.tokenizer, folded.examples),
                        functools.partial(interpreter.run, built), folded.tokenizer,
                        precision=job.options.precision,
                    )  # fmt: skip
                parity = {**folded.parity, "genai": found}
            for path in sorted(built.iterdir()):
                shutil.move(path, directory / path.name)
        write_provenance(
            directory, job, job.task_ids, target=self.name, passes=folded.records,
            parity=parity, tools=("safetensors",), precision=job.options.precision,
            genai=dict(interpreter.versions),
        )  # fmt: skip
        names = tuple(task.name for task in job.tasks)
        return Folder(
            directory, self.name, names, tuple(folded.records), _tokenized(parity), {},
            {names[0]: parity},
        )  # fmt: skip


def _tokenized(parity: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a warning where onnxruntime-genai's own tokenizer makes other tokens of texts."""
    found = parity.get("genai", {})
    texts, equal = found.get("texts", 0), found.get("texts_tokenized_equally", 0)
    if equal == texts:
        return ()
    return (
        f"onnxruntime-genai's own tokenizer makes other tokens than training's of {texts - equal} "
        f"of {texts} texts: give it token ids made with tokenizer.json",
    )


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python that has onnxruntime-genai.

    Args:
        path: its executable.
        versions: what is installed there, by package.
    """

    path: Path
    versions: Mapping[str, str]

    @classmethod
    def find(cls, named: str | Path | None) -> Interpreter:
        """Return the one that is named, or that the environment names, or this one.

        Raises:
            OptionError: there is no such interpreter.
            MissingExtraError: it lacks onnxruntime-genai, or what its builder needs.
        """
        given = named or os.environ.get(VARIABLE)
        if given is None and importlib.util.find_spec("onnxruntime_genai") is None:
            raise MissingExtraError(
                "onnxruntime-genai is not installed here, and no other interpreter was named",
                expected="an environment of its own: it takes the place of onnxruntime-gpu",
                fix=_INSTALL,
            )
        found = shutil.which(given or sys.executable)
        if found is None:
            raise OptionError(
                f"{given} is no Python interpreter", expected="one that has onnxruntime-genai",
                fix=_INSTALL,
            )  # fmt: skip
        path = Path(found).absolute()  # not resolved: a link in an environment's folder stays one
        done = _call([path, genai_runner.__file__, "versions"])
        try:
            done.check_returncode()
            return cls(path, dict(json.loads(done.stdout)))
        except (subprocess.CalledProcessError, ValueError, TypeError) as error:
            raise MissingExtraError(
                f"{path} cannot run onnxruntime-genai and its model builder: {_last(done)}",
                fix=_INSTALL,
            ) from error

    def build(self, model: Path, out: Path, precision: str) -> None:
        """Let the model builder write a folder for a CPU.

        Args:
            model: a Hugging Face folder.
            out: a folder that is made.
            precision: `fp32` or `int4`.

        Raises:
            InputError: the builder failed.
        """
        with tempfile.TemporaryDirectory(dir=model.parent) as cache:
            done = _call(
                [self.path, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out,
                 "-p", precision, "-e", "cpu", "-c", cache],
            )  # fmt: skip
        if done.returncode:
            raise InputError(
                f"the model builder of onnxruntime-genai {self.versions['onnxruntime-genai']} "
                f"failed: {_last(done)}",
                fix="see whether that version supports the model; --target hf writes the folder "
                "it was given",
            )

    def run(
        self, folder: Path, probes: Sequence[Sequence[int]], tokens: int, texts: Sequence[str]
    ) -> dict[str, Any]:
        """Return what greedy writing gives: `tokens.{i}` and `logits.{i}` for each probe.

        Args:
            folder: what the builder wrote.
            probes: token ids.
            tokens: how many to write after each, at most.
            texts: what its tokenizer is asked for: `ids.{i}`.

        Raises:
            InputError: it does not run.
        """
        import numpy as np

        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            job, out = Path(scratch, "job.json"), Path(scratch, "out.npz")
            asked = {
                "folder": str(folder), "probes": probes, "new_tokens": tokens, "texts": texts,
            }  # fmt: skip
            job.write_text(json.dumps(asked), "utf-8")
            done = _call([self.path, genai_runner.__file__, "run", job, out])
            if done.returncode:
                raise InputError(f"onnxruntime-genai does not run what it built: {_last(done)}")
            with np.load(out) as found:
                return dict(found)


def _call(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run another environment's interpreter, which neither asks a hub nor sees our modules."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(  # noqa: S603  # an interpreter the caller named, and our own file
        [str(part) for part in command], env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(),
    )  # fmt: skip


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of what a process complained about."""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"
