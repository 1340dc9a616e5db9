"""export.json: every file of the export with its size and digest, and what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoints.folder import read_json
from exporter.errors import CheckpointError, VerificationError
from exporter.shards import WrittenFile
from exporter.tensors import LazyTensor, StoredTensor, StridedTensor

MANIFEST_NAME = "export.json"
_FINGERPRINT_BYTES = 64 * 1024


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


def source_files(tensors: Iterable[LazyTensor], folder: Path) -> list[dict[str, Any]]:
    """Name, size in bytes and fingerprint of each file that the tensors are read from, by name.

    The fingerprint is a sha256 of the file's first and last 64 KiB: a safetensors header lies at the start, the
    directory of a torch archive, with the checksums of all its members, at the end.
    """
    paths = sorted({extent.path for tensor in tensors for extent in _extents(tensor)})
    return [
        {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "fingerprint": _fingerprint(path)}
        for path in paths
    ]


def _extents(tensor: LazyTensor) -> Iterable[Any]:
    if isinstance(tensor, StoredTensor):
        return tensor.extents
    if isinstance(tensor, StridedTensor):
        return (tensor.storage,)
    return ()


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(_FINGERPRINT_BYTES)
        file.seek(max(path.stat().st_size - _FINGERPRINT_BYTES, len(start)))
        return hashlib.sha256(start + file.read()).hexdigest()


def read_manifest_files(folder: Path) -> tuple[WrittenFile, ...]:
    """The files that an exported folder's manifest lists.

    Raises:
        VerificationError: there is no manifest, or it is not one.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise VerificationError(f"{folder.name} has no {MANIFEST_NAME}.", "Name a folder that this program exported.")
    try:
        return tuple(
            WrittenFile(str(entry["path"]), int(entry["size"]), str(entry["sha256"]))
            for entry in read_json(path)["files"]
        )
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise VerificationError(f"{MANIFEST_NAME} is not a manifest of this program.", "Export again.") from error
