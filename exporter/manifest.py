"""export.json: every file of the export with its size and digest, and what they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoints.folder import read_json
from exporter.errors import CheckpointError, VerificationError
from exporter.shards import WrittenFile

MANIFEST_NAME = "export.json"


@dataclass(frozen=True)
class Manifest:
    """What export.json holds. The same checkpoint and options give the same manifest."""

    files: tuple[WrittenFile, ...]
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    checks: tuple[Mapping[str, str], ...]

    def dump(self) -> bytes:
        value = {
            "schema": 1,
            "files": [asdict(file) for file in sorted(self.files, key=lambda file: file.path)],
            "source": dict(self.source),
            "options": dict(self.options),
            "versions": dict(self.versions),
            "checks": [dict(check) for check in self.checks],
        }
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_manifest_files(folder: Path) -> tuple[WrittenFile, ...]:
    """The files that an exported folder's manifest lists.

    Raises:
        VerificationError: there is no manifest, or it is not one.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise VerificationError(f"{folder.name} has no {MANIFEST_NAME}.", "Name a folder that this program exported.")
    try:
        return listed_files(read_json(path))
    except (CheckpointError, ValueError) as error:
        raise VerificationError(f"{MANIFEST_NAME} is not a manifest of this program.", "Export again.") from error


def listed_files(manifest: Any) -> tuple[WrittenFile, ...]:
    """The files that a manifest lists. Raises ValueError if it is not one."""
    try:
        return tuple(
            WrittenFile(_inside(str(entry["path"])), int(entry["size"]), str(entry["sha256"]))
            for entry in manifest["files"]
        )
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError("it lists no files") from error


def _inside(path: str) -> str:
    """``path`` as it stands. Raises ValueError if no file of the folder can have it, and so it may name another."""
    if path.startswith("/") or b"\0" in path.encode() or ".." in path.split("/"):
        raise ValueError(f"{path} is outside of the folder")
    return path
