"""How the Hub's answers spell commits, files and discussions."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.rehearsal.repository import Blob, Commit, Discussion, below, timestamp, tree_oid


def tree_entries(tree: Mapping[str, Blob], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """The files and folders under ``folder`` (empty: the root), sorted by path, as ``tree`` and ``paths-info`` give
    them."""
    paths = [path for path in tree if not folder or path.startswith(f"{folder}/")]
    depth = folder.count("/") + 1 if folder else 0
    parts = [path.split("/") for path in paths]
    folders = {"/".join(names[:end]) for names in parts for end in range(depth + 1, len(names))}
    entries = [file_entry(path, tree[path]) for path in paths] + [folder_entry(tree, path) for path in folders]
    shown = [entry for entry in entries if recursive or str(entry["path"]).count("/") == depth]
    return sorted(shown, key=lambda entry: str(entry["path"]))


def folder_entry(tree: Mapping[str, Blob], path: str) -> dict[str, object]:
    return {"type": "directory", "oid": tree_oid(below(tree, path)), "size": 0, "path": path}


def file_entry(path: str, blob: Blob) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    if blob.xet_hash:
        entry["xetHash"] = blob.xet_hash
    return entry


def sibling(path: str, blob: Blob) -> dict[str, object]:
    """A file as ``model_info`` gives it."""
    row: dict[str, object] = {"rfilename": path, "size": blob.size, "blobId": blob.oid}
    if blob.sha256:
        row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    return row


def commit_row(commit: Commit) -> dict[str, object]:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author}],
        "date": timestamp(commit.date),
    }


def discussion_row(repo_id: str, discussion: Discussion) -> dict[str, object]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "repo": {"name": repo_id, "type": "model"},
        "createdAt": timestamp(discussion.created),
        "status": discussion.status,
        "isPullRequest": discussion.base is not None,
    }
