"""The processor's files: what prepares images, video or sound for a model, and is published beside its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.checkpoints.folder import read_json
from exporter.code import localize
from exporter.config import dump_json

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""The names that transformers writes (5.24) and wrote: processor_config.json now holds what the others held."""

_ELSEWHERE = ("_name_or_path", "name_or_path", "chat_template")
"""Keys that go: paths of the trainer, and a chat template, which stands in the tokenizer's chat_template.jinja."""


def read_processor(folder: Path) -> dict[str, bytes]:
    """The processor files in ``folder`` by name, as they stand but for code from elsewhere and paths of the trainer.

    Raises:
        CheckpointError: a file is not a JSON object, or cannot be read safely.
    """
    return {name: _read(folder / name) for name in PROCESSOR_FILES if (folder / name).exists()}


def _read(path: Path) -> bytes:
    document = read_json(path)
    edited = _portable(document)
    if edited == document:
        return path.read_bytes()
    return dump_json(edited)


def _portable(value: Any) -> Any:
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if key not in _ELSEWHERE}
    return {key: localize(item) if key == "auto_map" else _portable(item) for key, item in kept.items()}
