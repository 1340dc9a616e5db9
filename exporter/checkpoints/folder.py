"""A checkpoint folder's files: which of them may be read, and how its JSON files are.

A checkpoint is data from elsewhere: a file of it may be a device, a link that leaves the folder, or not JSON at all.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, IncompleteCheckpointError

MAX_JSON_BYTES = 128 * 1024 * 1024
MAX_JSON_MARKS = 8_000_000
"""The most brackets, braces, colons and commas of a JSON text: a parsed value takes up to a hundred bytes for each."""

MAX_JSON_DEPTH = 100
"""The most values of a JSON text that lie within one another; those who walk through it are recursive."""

MAX_NAME_LENGTH = 1024

_SHARED_BLOBS = ".huggingface-shared-blobs"
"""The file by which huggingface_hub 2.4 marks its folder of shared blobs."""


def regular_size(path: Path) -> int:
    """Size of ``path`` in bytes.

    Raises:
        IncompleteCheckpointError: there is no such file.
        CheckpointError: it is not a regular file, cannot be read, or is a link that leaves its checkpoint.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise IncompleteCheckpointError(
            f"{path.name} is missing: {error.strerror}.", "Copy the whole checkpoint folder, with all its files."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error.strerror}.", "Make the file readable, or copy the checkpoint again."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file.", "Remove it, or copy the checkpoint again.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path.name} cannot be read: permission denied.", "Make the file readable.")
    require_inside(path)
    return status.st_size


def require_inside(path: Path) -> None:
    """Refuse a link that leaves its folder.

    Raises:
        CheckpointError: ``path`` is such a link.
    """
    if path.is_symlink() and not _may_follow(path):
        raise CheckpointError(
            f"{path.name} is a symbolic link that leaves the checkpoint folder.",
            "Replace the link by what it means, if that belongs to the checkpoint.",
        )


def is_name(value: Any) -> bool:
    """Whether ``value`` can be the name of a tensor or file: one line of text without control characters."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_NAME_LENGTH


def _may_follow(link: Path) -> bool:
    """Whether ``link`` stays in its folder, or leads from ``snapshots`` to ``blobs`` of one Hub cache.

    huggingface_hub keeps a repository's blobs beside its snapshots; those that are large are since 2.x links to blobs
    that all repositories share, ``blobs/ab/abcd…`` beside the repositories.
    """
    target, folder = link.resolve(), link.parent.resolve()
    if target.is_relative_to(folder):
        return True
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), None)
    if repository is None:
        return False
    shared = repository.parent / "blobs"
    return target.parent == repository / "blobs" or (
        target.parent.parent == shared and (shared / _SHARED_BLOBS).is_file()
    )


def read_json(path: Path, *, unique_keys: bool = False) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: the file is absent, not a regular file, too large, or not a JSON object, or it names a key
            twice where ``unique_keys`` forbids it.
    """
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name} has {size} bytes, too many for a JSON file.", "Remove or replace it.")
    try:
        value = parse_json(path.read_bytes(), unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not valid JSON: {_one_line(error)}.", "Repair or copy it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds {type(value).__name__}, expected a JSON object.", "Repair it.")
    return value


def parse_json(raw: bytes, unique_keys: bool) -> Any:
    """The value of the UTF-8 text ``raw``, in bounded memory.

    Raises:
        ValueError, RecursionError: it is not JSON, has too many values or too many within one another, or a key twice
            against ``unique_keys``.
    """
    if sum(raw.count(mark) for mark in (b"[", b"{", b":", b",")) > MAX_JSON_MARKS:
        raise ValueError("it has too many values")
    value = json.loads(raw.decode(), object_pairs_hook=_unique if unique_keys else None)
    require_shallow(value)
    return value


def require_shallow(value: Any) -> None:
    """Refuse a JSON value with more than :data:`MAX_JSON_DEPTH` values within one another.

    Raises:
        ValueError: it is such a value.
    """
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for outer in level for item in _items(outer)]
        if not level:
            return
    raise ValueError(f"it has more than {MAX_JSON_DEPTH} values within one another")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("it names a key twice")
    return entries


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
