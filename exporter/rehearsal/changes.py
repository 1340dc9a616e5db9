"""What a commit does to a tree, and what the Hub decides about a file before it takes it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from exporter.rehearsal.front_matter import check_front_matter
from exporter.rehearsal.repository import Blob, Refusal
from exporter.rehearsal.storage import Storage

INITIAL_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""
"""What goes to LFS in a new model repository: the Hub's own list, in its order."""

REGULAR_LIMIT = 10_000_000
"""Bytes above which a file is large whatever its name."""


def upload_mode(
    file: Mapping[str, Any], tree: Mapping[str, Blob], patterns: list[str], ignored: list[str]
) -> dict[str, object]:
    """The Hub's decision about a file of a ``preupload`` request: large if its name matches an LFS pattern, if it has
    more than 10 MB, or if it is binary (a zero byte in its first 512, as git decides)."""
    path = file["path"]
    large = file["size"] > REGULAR_LIMIT or matches(path, patterns) or b"\0" in base64.b64decode(file["sample"])
    blob = tree.get(path)
    return {
        "path": path,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": matches(path, ignored),
        "oid": blob and (blob.sha256 or blob.oid),
    }


def changed_tree(
    tree: Mapping[str, Blob], operations: Iterable[Mapping[str, Any]], storage: Storage
) -> dict[str, Blob]:
    """The tree after a commit's operations. As on the Hub, a large file that no LFS pattern covers gets a line in
    ``.gitattributes``."""
    changed = dict(tree)
    for operation in operations:
        _apply(changed, operation["key"], operation["value"], storage)
    attributes = storage.text(changed, ".gitattributes")
    patterns = lfs_patterns(attributes)
    uncovered = sorted(path for path, blob in changed.items() if blob.sha256 and not matches(path, patterns))
    if uncovered:
        changed[".gitattributes"] = storage.add((attributes + lfs_attributes(uncovered)).encode())
    return changed


def _apply(tree: dict[str, Blob], key: str, value: Mapping[str, Any], storage: Storage) -> None:
    path = value["path"]
    if key == "file":
        tree[path] = _regular(path, base64.b64decode(value["content"]), storage)
    elif key == "lfsFile":
        tree[path] = _large(path, value["oid"], value.get("size"), storage)
    elif key == "deletedFile":
        _delete(tree, [path] if path in tree else [], path)
    elif key == "deletedFolder":
        _delete(tree, [name for name in tree if name.startswith(f"{path.rstrip('/')}/")], path)
    else:
        raise Refusal(400, f"Unknown operation {key}")


def _regular(path: str, data: bytes, storage: Storage) -> Blob:
    if len(data) > REGULAR_LIMIT:
        raise Refusal(400, f"{path} has more than {REGULAR_LIMIT} bytes and must be uploaded as a large file")
    errors = check_front_matter(data.decode(errors="replace"))[0] if path == "README.md" else []
    if errors:
        raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    return storage.add(data)


def _large(path: str, sha256: str, size: int | None, storage: Storage) -> Blob:
    blob = storage.large(sha256)
    if blob is None or size not in (None, blob.size):
        raise Refusal(400, f"{path} refers to a large file that has not been uploaded: {sha256}")
    return blob


def _delete(tree: dict[str, Blob], paths: list[str], wanted: str) -> None:
    if not paths:
        raise Refusal(404, f"{wanted} does not exist and cannot be deleted", "EntryNotFound")
    for path in paths:
        del tree[path]


def lfs_attributes(patterns: Iterable[str]) -> str:
    """The ``.gitattributes`` lines that send the patterns to LFS, as the Hub writes them."""
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)


def lfs_patterns(attributes: str) -> list[str]:
    """The patterns that a ``.gitattributes`` file sends to LFS."""
    return [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()[1:]]


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether git would apply one of the patterns, in the simple forms: a name anywhere, or a whole path."""
    name = PurePosixPath(path).name
    return any(fnmatchcase(path if "/" in pattern else name, pattern.lstrip("/")) for pattern in patterns)
