"""tokenizer.json made from the vocabulary files of a tokenizer that was never saved in that form."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import RefusedError
from exporter.tokenizer.files import ADDED_TOKENS, CONFIG, SLOW_NAMES, SPECIAL_TOKENS, TOKENIZER, TokenizerFiles
from exporter.tokenizer.tokens import NAMES

_KEYS = {
    *NAMES,
    "tokenizer_class",
    "additional_special_tokens",
    "added_tokens_decoder",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "add_dummy_prefix_space",
    "do_lower_case",
    "keep_accents",
    "legacy",
    "strip_accents",
    "tokenize_chinese_chars",
}
"""What of tokenizer_config.json takes part in the conversion; other keys can name further files to read."""

_HINT = "Load the tokenizer where it was trained, save it with tokenizer.json (use_fast=True), and copy that file here."


def convert(files: TokenizerFiles, config: Mapping[str, Any]) -> None:
    """Add tokenizer.json to ``files``, converted by transformers from the files of a class of its own.

    Raises:
        RefusedError: the class is custom code, or the files do not convert to the vocabulary that they hold.
    """
    if files.get(CONFIG, "auto_map"):
        raise RefusedError(f"There is no {TOKENIZER}, and the tokenizer is custom code, which is not run.", _HINT)
    if any(name.endswith(".model") for name in files.contents) and not importlib.util.find_spec("sentencepiece"):
        raise RefusedError(
            f"There is no {TOKENIZER}, and to convert a SentencePiece model takes packages that are not installed.",
            "Run `pip install sentencepiece protobuf`, or add tokenizer.json to the checkpoint folder.",
        )
    try:
        tokenizer = _load(files, config)
        content = tokenizer.backend_tokenizer.to_str(pretty=True)
        is_whole = _is_whole(tokenizer.get_vocab(), files, config)
    except Exception as error:  # the classes raise anything on files that are not theirs
        raise RefusedError(
            f"There is no {TOKENIZER}, and transformers cannot convert the files that there are "
            f"({type(error).__name__}).",
            _HINT,
        ) from error
    if not is_whole:
        raise RefusedError(f"There is no {TOKENIZER}, and the files do not convert to their own vocabulary.", _HINT)
    files.replace(TOKENIZER, content.encode())


def _load(files: TokenizerFiles, config: Mapping[str, Any]) -> Any:
    """The tokenizer, loaded from a private folder that holds only what takes part in the conversion."""
    from transformers import AutoTokenizer

    documents = {
        "config.json": {"model_type": config.get("model_type")},
        CONFIG: {key: value for key, value in files.documents.get(CONFIG, {}).items() if key in _KEYS},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, document in documents.items():
            (Path(folder) / name).write_text(json.dumps(document))
        for name in (*SLOW_NAMES, SPECIAL_TOKENS, ADDED_TOKENS):
            if name in files:
                (Path(folder) / name).write_bytes(files.encoded(name))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _is_whole(vocabulary: Mapping[str, int], files: TokenizerFiles, config: Mapping[str, Any]) -> bool:
    """Whether ``vocabulary`` is that of ``files``: a class that does not find its files makes one of a few tokens."""
    stored, rows = _stored_vocabulary(files), config.get("vocab_size")
    if not stored and isinstance(rows, int):
        return len(vocabulary) > rows // 2
    return all(vocabulary.get(token) == number for token, number in stored.items())


def _stored_vocabulary(files: TokenizerFiles) -> dict[str, int]:
    """Tokens and ids of the vocabulary files that are plain text."""
    if "vocab.json" in files:
        vocabulary: dict[str, int] = json.loads(files.contents["vocab.json"])
        return vocabulary
    if "vocab.txt" not in files:
        return {}
    lines = files.contents["vocab.txt"].decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    return {token: number for number, token in enumerate(lines)}
