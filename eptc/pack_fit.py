"""Whether a task of a checkpoint goes with a pack that was built without it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptc import checkpoint
from eptc.checkpoint.base import read_json
from eptc.errors import BundleError, CheckpointError
from eptc.pack_task import Factored
from eptc.runtime.pack_manifest import PackManifest
from eptc.runtime.pack_spec import LABELS
from eptc.runtime.verify import file_problem
from eptc.text import CHAT_TEMPLATE, TrainingTokenizer

__all__ = ["check_base", "check_config", "check_inputs", "check_shared", "check_tokenizer"]

_REBUILD = "build the pack again with this task among its first: `eptc export --layout pack`"
# What a configuration says of a task, or of nothing that is computed.
_OF_A_TASK = (
    "_name_or_path", "architectures", "dtype", "id2label", "label2id", "num_labels",
    "problem_type", "torch_dtype", "transformers_version",
)  # fmt: skip


def check_shared(folder: Path, manifest: PackManifest) -> None:
    """Raise BundleError where a file that all tasks share is not as it was written."""
    for name, record in manifest.files.items():
        if problem := file_problem(folder, name, record):
            what = "base file" if name == manifest.weights else "file"
            raise BundleError(
                f"the {what} of the pack was changed: {name} {problem}",
                expected="the pack as it was built",
                fix="copy the pack again, or build it again",
            )


def check_base(folder: Path, manifest: PackManifest, source: checkpoint.Checkpoint) -> None:
    """Raise CheckpointError where a checkpoint's base is not the pack's, or not its own."""
    wanted, found = manifest.base["sha256"], source.base.sha256
    if wanted != found:
        raise CheckpointError(
            f"{source.base.path} is not the base of the pack {folder}: the weights' SHA-256 is "
            f"{found[:16]}...",
            expected=f"{wanted[:16]}...",
            fix="give the model the pack was built on with --base; a checkpoint of another base "
            "needs a pack of its own",
        )
    source.check_base()


def check_config(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the base is configured otherwise than the pack's graphs."""
    from transformers import CONFIG_MAPPING

    stored = read_json(folder / "config.json", CheckpointError)
    wanted = CONFIG_MAPPING[stored["model_type"]].from_dict(stored).to_dict()
    for key in sorted(wanted.keys() | found.keys()):
        if key not in _OF_A_TASK and wanted.get(key) != found.get(key):
            raise CheckpointError(
                f"the base is configured with {key} = {found.get(key)!r}, the pack {folder} with "
                f"{wanted.get(key)!r}",
                fix="give the base with the configuration the pack was built with",
            )


def check_tokenizer(
    folder: Path, manifest: PackManifest, tokenizer: TrainingTokenizer | None
) -> None:
    """Raise CheckpointError where a task was trained with another tokenizer than the pack's."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place)
        if tokenizer is not None:
            tokenizer.write(found)
        for name in ("tokenizer.json", CHAT_TEMPLATE):
            mine, other = folder / name if name in manifest.files else None, found / name
            if (mine and mine.read_bytes()) != (other.read_bytes() if other.exists() else None):
                raise CheckpointError(
                    f"the task was trained with another tokenizer than the pack {folder} has: "
                    f"{name} differs",
                    expected="one tokenizer for all tasks of a pack",
                    fix="export this task by itself",
                )


def check_inputs(
    folder: Path, manifest: PackManifest, source: checkpoint.Checkpoint, task: Factored
) -> None:
    """Raise CheckpointError where a task changes what the pack's graphs have no input for."""
    linears = [path for path in task.linears if f"{path}.weight" not in manifest.heads]
    lost = [path for path in linears if path not in manifest.linears]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise CheckpointError(
            f"{source.path} adapts linears that no task of the pack {folder} did when it was "
            f"built: {', '.join(lost[:3])}{more}",
            expected=f"some of its {len(manifest.linears)} linears",
            fix=_REBUILD,
        )
    described = source.contents.tasks[task.task_id]
    own = source.contents.heads.get(described.name, {})
    if lost := sorted(set(own) - set(manifest.heads)):
        raise CheckpointError(
            f"{source.path} has its own {lost[0]}, for which the pack {folder} has no input",
            expected=", ".join(manifest.heads) or "no head at all",
            fix=_REBUILD,
        )
    for name, spec in manifest.heads.items():
        found = task.model.weights.get(name)
        sizes = () if found is None else found.shape
        wanted = tuple(described.num_outputs if s == LABELS else s for s in spec.shape)
        if sizes != wanted:
            raise CheckpointError(
                f"{name} of {source.path} has the shape {list(sizes)}",
                expected=f"{list(wanted)}, as the pack's graphs read it",
                fix=_REBUILD,
            )
