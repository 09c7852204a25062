"""Parameter names: whichever class and release saved a base, the task class's names come out."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config

from eptc.architectures import ARCHITECTURES, architecture, canonical_name, head_is_tied
from eptc.errors import BaseModelError

BERT, ROBERTA = {"model_type": "bert"}, {"model_type": "roberta"}
DEBERTA = {"model_type": "deberta-v2"}
T5, T5_V11 = {"model_type": "t5"}, {"model_type": "t5", "tie_word_embeddings": False}
LLAMA, TIED_LLAMA = (
    {"model_type": "llama", "tie_word_embeddings": False},
    {"model_type": "llama", "tie_word_embeddings": True},
)
CROSS_BIAS = "EncDecAttention.relative_attention_bias.weight"
BIAS = "SelfAttention.relative_attention_bias.weight"

NAMES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "task class": (BERT, "bert.embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.bias"),
    "bare class": (BERT, "encoder.layer.0.x.bias", "bert.encoder.layer.0.x.bias"),
    "bare pooler": (BERT, "pooler.dense.weight", "bert.pooler.dense.weight"),
    "gamma": (BERT, "embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    "beta": (BERT, "bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
    "head": (BERT, "classifier.weight", "classifier.weight"),
    "position buffer": (BERT, "bert.embeddings.position_ids", None),
    "bare position buffer": (BERT, "embeddings.position_ids", None),
    "another head": (BERT, "cls.predictions.transform.dense.weight", None),
    "roberta": (ROBERTA, "embeddings.x.weight", "roberta.embeddings.x.weight"),
    "roberta pooler": (ROBERTA, "roberta.pooler.dense.weight", None),
    "roberta bare pooler": (ROBERTA, "pooler.dense.weight", None),
    "roberta lm head": (ROBERTA, "lm_head.dense.weight", None),
    "roberta classifier": (ROBERTA, "classifier.out_proj.bias", "classifier.out_proj.bias"),
    "deberta bare": (DEBERTA, "encoder.LayerNorm.bias", "deberta.encoder.LayerNorm.bias"),
    "deberta pooler": (DEBERTA, "pooler.dense.weight", "pooler.dense.weight"),
    "deberta generator": (DEBERTA, "lm_predictions.lm_head.bias", None),
    "deberta discriminator": (DEBERTA, "mask_predictions.dense.weight", None),
    "t5 shared": (T5, "shared.weight", "shared.weight"),
    "t5 encoder embedding": (T5, "encoder.embed_tokens.weight", "shared.weight"),
    "t5 decoder embedding": (T5_V11, "decoder.embed_tokens.weight", "shared.weight"),
    "t5 tied head": (T5, "lm_head.weight", "shared.weight"),
    "t5 v1.1 head": (T5_V11, "lm_head.weight", "lm_head.weight"),
    "t5 unused bias": (T5, f"decoder.block.0.layer.1.{CROSS_BIAS}", None),
    "t5 bias": (T5, f"decoder.block.0.layer.0.{BIAS}", f"decoder.block.0.layer.0.{BIAS}"),
    "llama bare": (LLAMA, "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    "llama norm": (LLAMA, "norm.weight", "model.norm.weight"),
    "llama frequencies": (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq", None),
    "llama head": (LLAMA, "lm_head.weight", "lm_head.weight"),
    "llama tied head": (TIED_LLAMA, "lm_head.weight", "model.embed_tokens.weight"),
    "unknown": (LLAMA, "surprise.weight", "surprise.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "stored", "wanted"), NAMES.values(), ids=NAMES)
def test_canonical_name(config: dict[str, Any], stored: str, wanted: str | None) -> None:
    found = canonical_name(stored, config)
    assert found == wanted
    if found is not None:
        assert canonical_name(found, config) == found


def test_the_caller_may_know_better() -> None:
    """What a base stores decides where its configuration and its tensors disagree."""
    assert canonical_name("lm_head.weight", T5, tied_head=False) == "lm_head.weight"
    assert canonical_name("lm_head.weight", LLAMA, tied_head=True) == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (T5, True),
        (T5_V11, False),
        ({"model_type": "t5", "tie_word_embeddings": True}, True),
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        (T5Config(), True),
        (T5Config(tie_word_embeddings=False), False),
        (T5Config.from_dict(T5Config(tie_word_embeddings=False).to_dict()), False),
        ({"model_type": "llama"}, False),
        (TIED_LLAMA, True),
        (LlamaConfig(tie_word_embeddings=True), True),
        (LlamaConfig(), False),
        (BertConfig(), False),
        (RobertaConfig(), False),
    ],
    ids=lambda value: str(value)[:70].replace("\n", "") if not isinstance(value, bool) else None,
)
def test_head_is_tied(config: Any, tied: bool) -> None:
    assert head_is_tied(config) is tied


def test_unknown_type() -> None:
    with pytest.raises(BaseModelError) as caught:
        architecture({"model_type": "lama"})
    text = str(caught.value)
    assert "'lama'" in text
    assert "'llama'" in text
    assert all(name in text for name in ARCHITECTURES)


def test_no_type() -> None:
    with pytest.raises(BaseModelError, match="None"):
        architecture({})
