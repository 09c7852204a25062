"""The model types eptc lowers: what each is, and how bases saved by others name its parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from eptc.errors import BaseModelError
from eptc.similar_names import similar

__all__ = [
    "ARCHITECTURES",
    "PROMPTED",
    "Architecture",
    "Kind",
    "architecture",
    "canonical_name",
    "head_is_tied",
    "setting",
]

Kind = Literal["encoder-classifier", "encoder-decoder", "decoder-only"]

# Buffers that older releases of transformers saved; they are computed from the configuration.
_BUFFERS = r"(.*\.)?(position_ids|token_type_ids|rotary_emb\.inv_freq|masked_bias)"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model type.

    Args:
        model_type: `model_type` of the configuration.
        kind: which graphs it is lowered to.
        module: the module of transformers that defines it.
        task_class: the class whose parameter names are the canonical ones.
        prefix: the attribute that holds the bare model in the task class; a base saved as the
            bare model has names without it. Empty where both use the same names.
        bare: first components of the names of the bare model.
        embedding: the parameter that tied ones are stored as.
        stacks: the setting that counts the blocks of each stack, by the stack's path.
        aliases: parameters that are always the embedding itself.
        head: the output projection that may be tied to the embedding; empty where none may.
        ignored: what a base may store and the task class has no place for.
    """

    model_type: str
    kind: Kind
    module: str
    task_class: str
    prefix: str
    bare: frozenset[str]
    embedding: str
    stacks: Mapping[str, str]
    aliases: frozenset[str] = frozenset()
    head: str = ""
    ignored: re.Pattern[str] = re.compile(_BUFFERS)


ARCHITECTURES: Mapping[str, Architecture] = {
    arch.model_type: arch
    for arch in (
        Architecture(
            model_type="bert",
            kind="encoder-classifier",
            module="transformers.models.bert.modeling_bert",
            task_class="BertForSequenceClassification",
            prefix="bert",
            bare=frozenset({"embeddings", "encoder", "pooler"}),
            embedding="bert.embeddings.word_embeddings.weight",
            stacks={"bert.encoder.layer": "num_hidden_layers"},
            ignored=re.compile(rf"{_BUFFERS}|cls\..*|lm_head\..*|qa_outputs\..*"),
        ),
        Architecture(
            model_type="roberta",
            kind="encoder-classifier",
            module="transformers.models.roberta.modeling_roberta",
            task_class="RobertaForSequenceClassification",
            prefix="roberta",
            bare=frozenset({"embeddings", "encoder", "pooler"}),
            embedding="roberta.embeddings.word_embeddings.weight",
            stacks={"roberta.encoder.layer": "num_hidden_layers"},
            # The classifier reads the first token itself: the task class has no pooler.
            ignored=re.compile(
                rf"{_BUFFERS}|cls\..*|lm_head\..*|qa_outputs\..*|(roberta\.)?pooler\..*"
            ),
        ),
        Architecture(
            # v2 and v3: the same model, differently trained.
            model_type="deberta-v2",
            kind="encoder-classifier",
            module="transformers.models.deberta_v2.modeling_deberta_v2",
            task_class="DebertaV2ForSequenceClassification",
            prefix="deberta",
            bare=frozenset({"embeddings", "encoder"}),
            embedding="deberta.embeddings.word_embeddings.weight",
            stacks={"deberta.encoder.layer": "num_hidden_layers"},
            ignored=re.compile(
                rf"{_BUFFERS}|cls\..*|lm_head\..*|qa_outputs\..*|(lm|mask)_predictions\..*"
            ),
        ),
        Architecture(
            model_type="t5",
            kind="encoder-decoder",
            module="transformers.models.t5.modeling_t5",
            task_class="T5ForConditionalGeneration",
            prefix="",
            bare=frozenset({"shared", "encoder", "decoder"}),
            embedding="shared.weight",
            stacks={"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"},
            aliases=frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}),
            head="lm_head.weight",
            # Stored by the first T5 releases, read by no forward pass.
            ignored=re.compile(
                rf"{_BUFFERS}|decoder\.block\.0\.layer\.1"
                r"\.EncDecAttention\.relative_attention_bias\.weight"
            ),
        ),
        Architecture(
            model_type="llama",
            kind="decoder-only",
            module="transformers.models.llama.modeling_llama",
            task_class="LlamaForCausalLM",
            prefix="model",
            bare=frozenset({"embed_tokens", "layers", "norm", "rotary_emb"}),
            embedding="model.embed_tokens.weight",
            stacks={"model.layers": "num_hidden_layers"},
            head="lm_head.weight",
        ),
    )
}


# With prompts before the text: what each model type is then.
PROMPTED: Mapping[str, Architecture] = {
    "t5": ARCHITECTURES["t5"],
    "llama": dataclasses.replace(
        ARCHITECTURES["llama"],
        kind="encoder-classifier",
        task_class="LlamaForSequenceClassification",
        head="",
        ignored=re.compile(rf"{_BUFFERS}|lm_head\.weight"),
    ),
}


def setting(config: Any, name: str, default: Any = None) -> Any:
    """Return one setting of a configuration, given as JSON values or as a transformers object."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def architecture(config: Any, *, prompted: bool = False) -> Architecture:
    """Return the architecture of a configuration (or of a model type given as a string).

    Args:
        config: the configuration.
        prompted: whether the model has prompts before the text.

    Raises:
        BaseModelError: eptc does not lower that model type.
    """
    known = PROMPTED if prompted else ARCHITECTURES
    model_type = config if isinstance(config, str) else setting(config, "model_type")
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    near = similar(str(model_type), known)
    hint = f"use a base of one of these types; {near[0]!r} is the nearest" if near else None
    raise BaseModelError(
        f"the base's model type is {model_type!r}" + (" and has prompts" if prompted else ""),
        expected=", ".join(known),
        fix=hint or "use a base of one of these types",
    )


def head_is_tied(config: Any) -> bool:
    """Tell from a configuration alone whether the output projection is the embedding itself.

    T5 says so in an indirect way: T5 v1.1 has `tie_word_embeddings: false` in its file; a
    `T5Config` turns that into `scale_decoder_outputs = False` and calls every model tied.
    A missing `tie_word_embeddings` means tied for T5, untied for Llama.
    """
    arch = architecture(config)
    if not arch.head:
        return False
    if arch.model_type == "t5":
        tied = setting(config, "tie_word_embeddings")
        return bool(setting(config, "scale_decoder_outputs", tied is not False))
    return bool(setting(config, "tie_word_embeddings", False))


def canonical_name(stored_name: str, config: Any, *, tied_head: bool | None = None) -> str | None:
    """Map a stored parameter name to the one the task class uses.

    Args:
        stored_name: the name in the base's file, whichever class saved it.
        config: the configuration, as JSON values or as a transformers object.
        tied_head: whether the output projection is the embedding; None: as `head_is_tied` says.

    Returns:
        The canonical name; None where the tensor is safe to leave out. Tied parameters share
        one name. A name that no rule knows comes back as it is: the caller, who knows what
        is expected, refuses it.
    """
    arch = architecture(config)
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", stored_name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    if arch.ignored.fullmatch(name):
        return None
    if arch.prefix and name.split(".", 1)[0] in arch.bare:
        name = f"{arch.prefix}.{name}"
    if name in arch.aliases:
        return arch.embedding
    tied = head_is_tied(config) if tied_head is None else tied_head
    if tied and name == arch.head:
        return arch.embedding
    return name
