"""A tokenizer's files: which of them are read, and how their JSON is edited.

Only files of a fixed list of names are ever read, whatever a tokenizer_config.json names as its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.checkpoints.folder import read_json, regular_size, require_shallow
from exporter.code import localize
from exporter.errors import CheckpointError
from exporter.local_paths import is_local_path

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
TEKKEN = "tekken.json"

JSON_NAMES = (TOKENIZER, CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)
SLOW_NAMES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "qwen.tiktoken",
    TEKKEN,
)
"""The vocabulary files of tokenizers that are not in tokenizer.json, as transformers' tokenizer classes name them."""

MAX_BYTES = 64 * 1024 * 1024
"""Size of the largest tokenizer file that is read: twice that of the largest in use, and still parsed in 2 GB."""


@dataclass
class TokenizerFiles:
    """The tokenizer's files by name, those that are JSON also parsed.

    A file that is not edited keeps its bytes, and an edited one its other keys and their order.
    """

    contents: dict[str, bytes]
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    _edited: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.documents = {name: _parse(name, self.contents[name]) for name in JSON_NAMES if name in self.contents}

    def __contains__(self, name: str) -> bool:
        return name in self.contents

    def get(self, name: str, key: str) -> Any:
        """The value of ``key`` in the JSON file ``name``; None where there is no such file or key."""
        return self.documents.get(name, {}).get(key)

    def set(self, name: str, key: str, value: Any) -> None:
        """Edit one key of a JSON file, which is made where the checkpoint has none."""
        document = self.documents.setdefault(name, {})
        if key not in document or document[key] != value:
            document[key] = value
            self._edited.add(name)

    def drop(self, name: str, key: str) -> None:
        """Remove one key of a JSON file, if it is there."""
        if key in self.documents.get(name, {}):
            del self.documents[name][key]
            self._edited.add(name)

    def rename(self, name: str, old: str, new: str) -> None:
        """Rename a key of a JSON file; it keeps its place."""
        self.documents[name] = {new if key == old else key: value for key, value in self.documents[name].items()}
        self._edited.add(name)

    def replace(self, name: str, content: bytes) -> None:
        """Put ``content`` in the place of the file ``name``."""
        self.contents[name] = content
        if name in JSON_NAMES:
            self.documents[name] = _parse(name, content)

    def remove(self, name: str) -> None:
        """Leave the file ``name`` out, if it is there."""
        self.contents.pop(name, None)

    def encoded(self, name: str) -> bytes:
        """The bytes of the file ``name``, as Hugging Face libraries write JSON where it was edited."""
        if name in self._edited:
            return _dump(self.documents[name], self.contents.get(name))
        return self.contents[name]

    def export(self) -> dict[str, bytes]:
        """All files by name, edited or as they stand."""
        return {name: self.encoded(name) for name in sorted(self.contents.keys() | self._edited)}


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """The tokenizer's files in a checkpoint folder.

    Raises:
        CheckpointError: there are none, or one is not a regular file of the folder, too large, or not a JSON object
            where it should be one.
    """
    names = (*JSON_NAMES, TEMPLATE, *SLOW_NAMES, *_named_templates(folder))
    contents = {name: _read(folder, name) for name in names if _is_there(folder / name)}
    template = _processor_template(folder)
    if template is not None:
        contents[TEMPLATE] = template.encode("utf-8", "surrogatepass")
    files = TokenizerFiles(contents)
    if not any(name in files for name in (TOKENIZER, *SLOW_NAMES)):
        raise CheckpointError(
            "There is no tokenizer in the checkpoint folder: neither tokenizer.json nor another vocabulary file.",
            "Copy the tokenizer files of the model that was trained beside config.json.",
        )
    return files


def make_portable(files: TokenizerFiles) -> None:
    """Edit what only one machine or one major version of transformers can resolve.

    transformers 5 writes the class TokenizersBackend, which 4.57 does not know (5 knows the older name too), and a list
    of special tokens as ``extra_special_tokens``, where 4.57 expects a dict and fails (5 reads
    ``additional_special_tokens`` as well). 4.57 opens what ``vocab_file`` and the like name, wherever that lies;
    ``name_or_path`` is the trainer's, and a relative folder there looks like a Hub id.
    """
    for key, value in list(files.documents.get(CONFIG, {}).items()):
        if isinstance(value, str) and (key.endswith("_file") or key == "name_or_path" or is_local_path(value)):
            files.drop(CONFIG, key)
    if files.get(CONFIG, "tokenizer_class") == "TokenizersBackend":
        files.set(CONFIG, "tokenizer_class", "PreTrainedTokenizerFast")
    if files.get(CONFIG, "auto_map"):
        files.set(CONFIG, "auto_map", localize(files.get(CONFIG, "auto_map")))
    for name in (CONFIG, SPECIAL_TOKENS):
        _rename_extra_tokens(files, name)


def _rename_extra_tokens(files: TokenizerFiles, name: str) -> None:
    extra, additional = files.get(name, "extra_special_tokens"), files.get(name, "additional_special_tokens")
    if not isinstance(extra, list):
        return
    if isinstance(additional, list):
        files.set(name, "additional_special_tokens", additional + [token for token in extra if token not in additional])
        files.drop(name, "extra_special_tokens")
    else:
        files.drop(name, "additional_special_tokens")
        files.rename(name, "extra_special_tokens", "additional_special_tokens")


def _processor_template(folder: Path) -> str | None:
    """The chat template that only a processor reads; it goes before the tokenizer's (transformers 5.24)."""
    for name in ("processor_config.json", PROCESSOR_TEMPLATE):
        template = read_json(folder / name).get("chat_template") if _is_there(folder / name) else None
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{name} has a chat_template that is not a text.", _REPAIR)
        if template is not None:
            return template
    return None


def _named_templates(folder: Path) -> Sequence[str]:
    templates = folder / TEMPLATE_FOLDER
    if templates.is_symlink() or not templates.is_dir():
        return ()
    return [f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted(templates.glob("*.jinja"))]


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _read(folder: Path, name: str) -> bytes:
    size = regular_size(folder / name)
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{name} has {size} bytes, expected at most {MAX_BYTES} in a tokenizer file.", "Remove or replace it."
        )
    return (folder / name).read_bytes()


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
        require_shallow(value)
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair, which is no character
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {' '.join(str(error).split())}.", _REPAIR) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds {type(value).__name__}, expected a JSON object.", _REPAIR)
    return value


def _dump(document: dict[str, Any], original: bytes | None) -> bytes:
    end = "\n" if original is None or original.endswith(b"\n") else ""
    return (json.dumps(document, indent=2, ensure_ascii=False) + end).encode()


_REPAIR = "Repair it, or copy the tokenizer files of the model that was trained again."
