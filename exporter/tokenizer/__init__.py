"""The tokenizer of an export: its special tokens, its chat template, and how many rows the embedding needs."""

from __future__ import annotations

from exporter.tokenizer.files import JSON_NAMES, PROCESSOR_TEMPLATE, SLOW_NAMES, TEMPLATE, TEMPLATE_FOLDER
from exporter.tokenizer.template import QUESTION
from exporter.tokenizer.vocabulary import Vocabulary, embedding_rows, settle_vocabulary

__all__ = ["QUESTION", "TEMPLATE_FOLDER", "TOKENIZER_FILES", "Vocabulary", "embedding_rows", "settle_vocabulary"]

TOKENIZER_FILES = (*JSON_NAMES, *SLOW_NAMES, TEMPLATE, PROCESSOR_TEMPLATE)
"""The files that a tokenizer is read from, beside those in :data:`TEMPLATE_FOLDER`."""
