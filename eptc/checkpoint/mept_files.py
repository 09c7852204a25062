"""The state dict of a MEPT or SMoP checkpoint: which file it is, and what its keys are.

The original code saves nothing by itself. Folders hold what its users saved: a state dict, whole
or of what was trained, beside `adapter_config.json` and `train_args.json`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from eptc.checkpoint.peft_folder import read_pickle
from eptc.errors import CheckpointError
from eptc.tensors import LazyTensor, SafetensorsFile

__all__ = ["Keys", "has_state_dict", "read_state_dict"]

# Whole state dicts first, safetensors before pickles.
_FILES = tuple(
    f"{stem}{suffix}"
    for stem in ("model", "pytorch_model", "trainable_only", "adapter_model")
    for suffix in (".safetensors", ".bin")
)
_ROLES = {"prompt_embedding.weight": "experts", "prompt_router.0.weight": "router",
          "embedding.weight": "experts", "router.0.weight": "router",
          "shared_embedding": "shared", "layer_norm.weight": "norm"}  # fmt: skip
_PARTS = r"(?P<part>prompt_embedding\.weight|prompt_router\.0\.weight|shared_embedding)"
_NORM = r"layer_norm\.weight"
_BLOCK = re.compile(
    rf"(?:encoder\.block|model\.layers)\.(?P<block>\d+)\.(?:{_PARTS}|(?P<norm>{_NORM}))"
)
_INPUT = re.compile(
    rf"{_PARTS}|(?P<norm>{_NORM})"
    r"|prompt_encoder\.(?P<t5>embedding\.weight|router\.0\.weight|shared_embedding)"
)
# Norms of decoder blocks, which no forward pass reads; what a router's noise has in training
# only; and the embedding under another name, which is compared with it.
_UNREAD = re.compile(r"decoder\.block\.\d+\.layer_norm\.weight|.*\.noise")
_ALIAS = {"word_embeddings.weight": "shared.weight"}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The names of a state dict, by what they are.

    Args:
        blocks: name on disk by role (`experts`, `router`, `shared`, `norm`), by block; blocks
            that are not adapted have a norm alone.
        input: the same of the text's site.
        model: name on disk by name in the Hugging Face model, of everything else.
    """

    blocks: Mapping[int, Mapping[str, str]]
    input: Mapping[str, str]
    model: Mapping[str, tuple[str, ...]]

    @classmethod
    def sort(cls, names: Collection[str]) -> Keys:
        """Sort names of either backbone."""
        blocks: dict[int, dict[str, str]] = {}
        site: dict[str, str] = {}
        model: dict[str, tuple[str, ...]] = {}
        for name in sorted(names):
            plain = name.removeprefix("base_model.")
            if _UNREAD.fullmatch(plain):
                continue
            if found := _BLOCK.fullmatch(plain):
                role = _ROLES[found["part"] or found["norm"]]
                blocks.setdefault(int(found["block"]), {})[role] = name
            elif found := _INPUT.fullmatch(plain):
                site[_ROLES[found["part"] or found["norm"] or found["t5"]]] = name
            else:
                plain = _ALIAS.get(plain, plain)
                model[plain] = (*model.get(plain, ()), name)
        return cls(blocks, site, model)

    @property
    def adapted(self) -> tuple[int, ...]:
        """The blocks that have experts or a router."""
        return tuple(sorted(b for b, roles in self.blocks.items() if set(roles) - {"norm"}))


def has_state_dict(path: Path) -> bool:
    """Whether a folder has a file that `read_state_dict` would read."""
    return _file(path) is not None


def _file(path: Path) -> Path | None:
    return next((path / name for name in _FILES if (path / name).is_file()), None)


def read_state_dict(path: Path, *, allow_pickle: bool) -> tuple[Path, Mapping[str, LazyTensor]]:
    """Return the file with the tensors, and them by their names on disk.

    Raises:
        CheckpointError: there is none, a pickle that may not be read, or one that holds the
            prompts of the text alone.
    """
    file = _file(path)
    if file is None:
        raise CheckpointError(
            f"{path} holds no state dict",
            expected="pytorch_model.bin, or trainable_only.bin where the base has all else",
            fix="save one: torch.save(model.state_dict(), 'pytorch_model.bin')",
        )
    if file.suffix == ".bin" and not allow_pickle:
        raise CheckpointError(
            f"{path} holds its weights as a pickle, {file.name}",
            expected="safetensors",
            fix="pass --allow-pickle if you trust the file (it is read with weights_only)",
        )
    tensors = read_pickle(file) if file.suffix == ".bin" else SafetensorsFile(file)
    if set(tensors) == {"prompt_embeddings"}:
        raise CheckpointError(
            f"{file} holds prompt_embeddings alone: the prompts of the text, without routers, "
            "shared prompts and the prompts of blocks",
            expected="the model's state dict; save_pretrained of the training code loses it",
            fix="save it in the training run: torch.save(model.state_dict(), 'pytorch_model.bin')",
        )
    return file, tensors
