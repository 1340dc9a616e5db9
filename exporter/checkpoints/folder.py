"""A checkpoint folder's files: which of them may be read, and how its JSON files are.

A checkpoint is data from elsewhere: a file of it may be a device, a link that leaves the folder, or not JSON at all.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, IncompleteCheckpointError

MAX_JSON_BYTES = 512 * 1024 * 1024


def regular_size(path: Path) -> int:
    """Size of ``path`` in bytes.

    Raises:
        IncompleteCheckpointError: there is no such file.
        CheckpointError: it is not a regular file, cannot be read, or is a link that leaves its checkpoint.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise IncompleteCheckpointError(
            f"{path.name} is missing: {error.strerror}.", "Copy the whole checkpoint folder, with all its files."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file.", "Remove it, or copy the checkpoint again.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path.name} cannot be read: permission denied.", "Make the file readable.")
    if path.is_symlink() and not _may_follow(path):
        raise CheckpointError(
            f"{path.name} is a symbolic link that leaves the checkpoint folder.",
            "Replace the link by the file that it means, if that file belongs to the checkpoint.",
        )
    return status.st_size


def _may_follow(link: Path) -> bool:
    """Whether ``link`` stays in its folder, or leads from ``snapshots`` to ``blobs`` of one repository's Hub cache."""
    target, folder = link.resolve(), link.parent.resolve()
    if target.is_relative_to(folder):
        return True
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), None)
    return repository is not None and target.parent == repository / "blobs"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: the file is absent, not a regular file, too large, or not a JSON object.
    """
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name} has {size} bytes, too many for a JSON file.", "Remove or replace it.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not valid JSON: {_one_line(error)}.", "Repair or copy it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds {type(value).__name__}, expected a JSON object.", "Repair it.")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
