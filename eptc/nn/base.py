"""Base models: loaded quietly in float32, and known by a hash of their stored tensors."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from eptc.errors import BaseModelError
from eptc.nn.shards import Shards
from eptc.nn.stored import name_some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "base_sha256",
    "is_classifier",
    "load_base",
    "read_base",
    "refusing",
    "require",
    "task_class",
]


def load_base(base_dir: str | Path, *, allow_missing: Collection[str] = ()) -> PreTrainedModel:
    """Return a base model to attach adapters to: float32, eval mode, eager attention.

    Args:
        base_dir: a Hugging Face model folder with safetensors weights. An encoder-decoder gets
            its language-model head, a masked language model's type a sequence-classification
            head, any other a causal one.
        allow_missing: names of modules the folder need not have weights for; they are random.
            A classification head always may be missing: each task has its own.

    Raises:
        BaseModelError: the folder cannot be used, or lacks other weights.
    """
    model, missing = read_base(Path(base_dir))
    heads = ("classifier", "score") if is_classifier(model) else ()
    allowed = tuple(f"{name}." for name in (*heads, *allow_missing))
    require(Path(base_dir), [name for name in missing if not name.startswith(allowed)])
    return model


def read_base(directory: Path) -> tuple[PreTrainedModel, list[str]]:
    """Return a base model and the names of the parameters its folder has no weights for.

    Raises:
        BaseModelError: the folder cannot be used.
    """
    with refusing(directory):
        model, report = _from_pretrained(directory)
    return model.eval(), sorted(report["missing_keys"])


@contextlib.contextmanager
def refusing(directory: Path) -> Iterator[None]:
    """Read a base quietly, its random numbers apart, and say so where it cannot be used.

    Raises:
        BaseModelError: the folder cannot be used.
    """
    if not (directory / "config.json").is_file():
        raise BaseModelError(
            f"{directory} has no config.json", expected="a Hugging Face model folder"
        )
    with _quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the folder lacks is drawn: the same each time
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise BaseModelError(f"{directory} cannot be loaded: {error}") from error


def require(directory: Path, missing: Sequence[str]) -> None:
    """Refuse a base that lacks weights.

    Raises:
        BaseModelError: something is missing.
    """
    if missing:
        raise BaseModelError(f"{directory} has no weights for {name_some(missing)}")


def _from_pretrained(directory: Path) -> tuple[Any, dict[str, Any]]:
    auto, config = task_class(directory)
    model, report = auto.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        output_loading_info=True,
    )
    return model, report


def task_class(directory: Path) -> tuple[Any, Any]:
    """Return the auto class of a base's task model, and the base's configuration."""
    import transformers
    from transformers.models.auto import modeling_auto

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM, config
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return transformers.AutoModelForSequenceClassification, config
    return transformers.AutoModelForCausalLM, config


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress bars and the load report: this package checks the report itself."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_classifier(hf_model: PreTrainedModel) -> bool:
    """Whether a model is an encoder with a classification head."""
    return type(hf_model).__name__.endswith("ForSequenceClassification")


def base_sha256(base_dir: str | Path) -> str:
    """Return the SHA-256 of a base's stored tensors, the same for any sharding.

    Over each tensor sorted by name: its name, dtype and shape, a line each, then its bytes.

    Raises:
        BaseModelError: the folder has no readable safetensors weights.
    """
    shards, digest = Shards(Path(base_dir)), hashlib.sha256()
    for name, stored in sorted(shards.tensors.items()):
        shape = ",".join(map(str, stored.shape))
        digest.update(f"{name}\n{stored.dtype}\n{shape}\n".encode())
        digest.update(shards.stored(name).data)
    return digest.hexdigest()
