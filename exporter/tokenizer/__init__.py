"""The tokenizer of an export: its special tokens, its chat template, and how many rows the embedding needs."""

from __future__ import annotations

from exporter.tokenizer.vocabulary import Vocabulary, embedding_rows, settle_vocabulary

__all__ = ["Vocabulary", "embedding_rows", "settle_vocabulary"]
