"""The probes of one engine: which there are, known before anything runs, and how each is made."""

from __future__ import annotations

from collections.abc import Sequence

from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.interface import Tokenizes, check_layout, check_text, position_limit
from eptc.parity_gate.probes import (
    Example,
    Probe,
    builtin_examples,
    odd_examples,
    synthetic,
    text_batches,
)
from eptc.runtime import Manifest
from eptc.tasks import Task
from eptc.text import TrainingTokenizer

__all__ = ["check_texts", "make_probes", "seeded_probes", "text_probe", "texts_by_probe"]


def make_probes(
    engine: Tokenizes,
    reference: ReferenceModel,
    task_id: int,
    tokenizer: TrainingTokenizer | None,
    examples: Sequence[Example] | None,
) -> tuple[list[Probe], int]:
    """Return the probes of an engine, and how many texts both tokenizers agreed on.

    Args:
        engine: the engine, or its bundle, for its own tokenizer.
        reference: the unfolded model, for its vocabulary and its limits.
        task_id: position of the engine's task in the reference's list.
        tokenizer: the tokenizer of training; None where there is none.
        examples: text to use; None for the built-in ones. Where a task only generates, the form
            of its text is not known: then the built-in ones are tokenized, and seeded tokens
            stand alone.

    Raises:
        ParityError: the engine's tokenizer differs from the training tokenizer on a text.
    """
    task, manifest = reference.tasks[task_id], engine.manifest
    probes, agreed = [], 0
    if tokenizer is not None and manifest.tokenizer is not None:
        agreed = check_texts(engine, task, tokenizer, examples)
        texts = texts_by_probe(task, examples)
        probes = [text_probe(engine, name, rows) for name, rows in texts.items()]
    return probes + seeded_probes(manifest, reference), agreed


def check_texts(
    engine: Tokenizes,
    task: Task,
    tokenizer: TrainingTokenizer,
    examples: Sequence[Example] | None,
) -> int:
    """Return how many texts both tokenizers agree on, odd ones and such as are cut among them.

    Raises:
        ParityError: the first text on which they differ.
    """
    assert engine.manifest.tokenizer is not None
    shown = examples if examples is not None else builtin_examples(task)
    odd = odd_examples(task, engine.manifest.tokenizer.max_length)
    return check_text(engine, tokenizer, task, [*shown, *odd])


def texts_by_probe(task: Task, examples: Sequence[Example] | None) -> dict[str, list[Example]]:
    """Return the rows of each probe of text, by its name.

    Args:
        task: what the texts are for.
        examples: text to use; None for the built-in ones.
    """
    if examples is None and task.kind == "generation":
        return {}
    return dict(text_batches(examples if examples is not None else builtin_examples(task)))


def text_probe(engine: Tokenizes, name: str, rows: Sequence[Example]) -> Probe:
    """Return a probe of text, tokenized as the engine does it.

    Raises:
        ParityError: it is padded on the wrong side.
    """
    feeds = engine.tokenize(rows, truncate=True)
    check_layout(feeds, engine.manifest.kind)
    return Probe(name, feeds["input_ids"], feeds["attention_mask"], feeds.get("token_type_ids"))


def seeded_probes(manifest: Manifest, reference: ReferenceModel) -> list[Probe]:
    """Return the probes of seeded tokens of an engine.

    Args:
        manifest: the engine's.
        reference: the unfolded model, for its vocabulary and its limits; its weights are not read.
    """
    config, limit = reference.hf.config, position_limit(reference)
    if manifest.generation is not None and limit is not None:
        limit = max(1, limit - manifest.generation.max_new_tokens)
    reads_types = any(
        spec.name == "token_type_ids"
        for graph in manifest.graphs.values()
        for spec in graph.inputs
    )
    return synthetic(
        int(config.vocab_size),
        limit,
        token_types=int(config.type_vocab_size) if reads_types else 0,
        left=manifest.kind == "decoder-only",
        answers=_start(manifest) if manifest.kind == "encoder-decoder" else None,
        # T5's prompts may change places where a batch has as many rows.
        rows=reference.prompts,
    )


def _start(manifest: Manifest) -> int:
    generation = manifest.generation
    assert generation is not None
    assert generation.decoder_start_token_id is not None
    return generation.decoder_start_token_id
