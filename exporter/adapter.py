"""An adapter that is exported as one: its base on the Hub, its tokenizer, what its card says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from exporter.card import AdapterFacts
from exporter.checkpoints import Checkpoint
from exporter.config import read_generation_config, vocabulary_rows
from exporter.errors import RefusedError
from exporter.tokenizer import Vocabulary, settle_vocabulary


def base_on_hub(checkpoint: Checkpoint) -> tuple[str, str]:
    """The repository of the adapter's base model, and its commit."""
    base = checkpoint.base
    assert base is not None and base.repo_id is not None and base.revision is not None
    return base.repo_id, base.revision


def adapter_facts(checkpoint: Checkpoint, vocabulary: Vocabulary) -> AdapterFacts:
    """What one must know to load the adapter."""
    return AdapterFacts(
        base_revision=base_on_hub(checkpoint)[1],
        rows=checkpoint.config_changes.get("vocab_size"),
        has_tokenizer=bool(vocabulary.files),
    )


def adapter_vocabulary(
    checkpoint: Checkpoint, config: Mapping[str, Any], prompt_format: str, special_tokens: Sequence[str]
) -> Vocabulary:
    """The adapter's own tokenizer; where it has none, its base's as it stands, of which no file is exported.

    Raises:
        RefusedError: something is asked for that would change the base's tokenizer, or add rows to its embedding.
    """
    has_own = checkpoint.tokenizer_folder == checkpoint.folder
    if not has_own and (prompt_format not in ("auto", "none") or special_tokens):
        raise RefusedError(
            "The adapter has no tokenizer of its own to which a prompt format or special tokens could be added.",
            "Copy the tokenizer that it was trained with beside adapter_config.json.",
        )
    vocabulary = settle_vocabulary(
        checkpoint.tokenizer_folder,
        prompt_format=prompt_format if has_own else "none",
        special_tokens=special_tokens,
        config=config,
        generation_config=read_generation_config(checkpoint.config_folder),
    )
    rows = vocabulary_rows(config)
    if rows is not None and vocabulary.size > rows:
        raise RefusedError(
            f"The tokenizer would have {vocabulary.size} tokens, and the embedding has {rows} rows: an adapter cannot "
            "make its base model's embedding larger.",
            "Keep the tokenizer with --prompt_format none, or leave --keep_adapter out.",
        )
    return vocabulary if has_own else replace(vocabulary, files={})
