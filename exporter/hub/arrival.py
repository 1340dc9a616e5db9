"""Whether a revision on the Hub is an export, whole and readable: told without downloading a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.checkpoints.safetensors_file import MAX_HEADER_BYTES
from exporter.errors import UsageError, VerificationError
from exporter.hub.account import find_token
from exporter.hub.client import HubClient, bounded_and_quiet
from exporter.hub.destination import require_repo_id
from exporter.hub.push import OutgoingFile, PushPlan, git_blob_id, plan_push
from exporter.hub.repository import Repository, Snapshot
from exporter.manifest import MANIFEST_NAME
from exporter.plan import INDEX_NAME
from exporter.shards import WrittenFile

_LIKELY_HEADER = 100_000
_LARGEST_INDEX = 256 * 1024 * 1024


def require_arrived(repository: Repository, commit: str, files: Sequence[OutgoingFile]) -> Snapshot:
    """What ``commit`` holds: exactly ``files``, beside those of other people, by the Hub's own sizes and digests.

    Raises:
        VerificationError: a file is missing, of another size or digest, or left over.
    """
    snapshot = repository.snapshot(commit)
    _require_same(repository, snapshot, snapshot.plan(tuple(files)), {file.path: file.size for file in files})
    return snapshot


@dataclass(frozen=True)
class Proven:
    """A published revision that is what its manifest says: where it is, and the files that are listed."""

    endpoint: str
    url: str
    commit: str
    paths: tuple[str, ...]


def prove_published(repo_id: str, revision: str) -> Proven:
    """Asks whether ``revision`` of ``repo_id`` is what its own manifest says.

    Small files, which git keeps under another digest, are downloaded; of weights sizes, digests and headers are asked.

    Raises:
        UsageError: there is no such repository or revision.
        VerificationError: it has no manifest, or a file is not what the manifest says.
    """
    from huggingface_hub import constants

    require_repo_id(repo_id)
    with bounded_and_quiet():
        endpoint = constants.ENDPOINT.rstrip("/")
        repository = Repository(HubClient(endpoint, find_token(None) or ""), repo_id)
        commit = repository.commit(revision) if repository.info() is not None else None
        if commit is None:
            raise UsageError(
                f"There is no {repo_id}@{revision} on the Hub, or not for this token.", "Check the name and the token."
            )
        paths = _prove(repository, commit)
    return Proven(endpoint, f"{repository.url}/tree/{commit}", commit, paths)


def _prove(repository: Repository, commit: str) -> tuple[str, ...]:
    """The files that the manifest at ``commit`` lists, all of which are there."""
    snapshot = repository.snapshot(commit)
    if not snapshot.owned:
        raise VerificationError(
            f"{repository.repo_id} has no {MANIFEST_NAME} of this program.", "Only its own exports can be verified."
        )
    files = [WrittenFile(path, size, sha256) for path, (size, sha256) in snapshot.owned.items()]
    blob_ids = _blob_ids(repository, snapshot, files)
    manifest = snapshot.files[MANIFEST_NAME]
    listed = [*files, WrittenFile(MANIFEST_NAME, manifest.size, manifest.sha256 or "")]
    plan = plan_push(listed, snapshot.files, blob_ids={**blob_ids, MANIFEST_NAME: manifest.blob_id})
    _require_same(repository, snapshot, plan, {file.path: file.size for file in listed})
    require_readable(repository, snapshot)
    return tuple(sorted(snapshot.owned))


def _blob_ids(repository: Repository, snapshot: Snapshot, files: Iterable[WrittenFile]) -> dict[str, str]:
    """The git blob id of each regular file whose content has the sha256 that the manifest says."""
    found = {}
    for file in files:
        there = snapshot.files.get(file.path)
        if there is not None and there.sha256 is None and there.size == file.size:
            content = repository.read(snapshot.commit, file.path)
            if hashlib.sha256(content).hexdigest() == file.sha256:
                found[file.path] = git_blob_id(len(content), [content])
    return found


def _require_same(repository: Repository, snapshot: Snapshot, plan: PushPlan, sizes: dict[str, int]) -> None:
    if plan.is_empty:
        return
    path = (plan.sent + plan.deleted)[0]
    found = f"{snapshot.files[path].size} bytes of another digest" if path in snapshot.files else "nothing"
    _wrong(
        repository, snapshot, f"{path} is not what was exported: found {found}, expected {sizes.get(path, 'no')} bytes"
    )


def require_readable(repository: Repository, snapshot: Snapshot) -> None:
    """The weights of ``snapshot`` can be read, and their headers name the tensors that the index places in them.

    Raises:
        VerificationError: they do not, or a header does not fit its file.
        HubRefusedError, HubUnreachableError: the Hub does not give the weights back.
    """
    placed: dict[str, str] = {}
    for path in sorted(path for path in snapshot.owned if path.endswith(".safetensors")):
        names, size = _header(repository, snapshot.commit, path)
        if size != snapshot.files[path].size:
            _wrong(repository, snapshot, f"the header of {path} is not that of {snapshot.files[path].size} bytes")
        placed |= dict.fromkeys(names, path)
    if INDEX_NAME in snapshot.files and _weight_map(repository, snapshot) != placed:
        _wrong(repository, snapshot, f"{INDEX_NAME} and the headers of its weight files do not name the same tensors")


def _header(repository: Repository, commit: str, path: str) -> tuple[list[str], int | None]:
    """The tensors that the header of a weight file names, and the size in bytes that it gives to the file."""
    start = repository.read_start(commit, path, _LIKELY_HEADER)
    length = int.from_bytes(start[:8], "little")
    if _LIKELY_HEADER < 8 + length <= MAX_HEADER_BYTES:
        start = repository.read_start(commit, path, 8 + length)
    try:
        header = json.loads(start[8 : 8 + length])
        tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        return list(tensors), 8 + length + max(tensors.values(), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [], None


def _weight_map(repository: Repository, snapshot: Snapshot) -> Any:
    if snapshot.files[INDEX_NAME].size > _LARGEST_INDEX:
        return None
    try:
        return json.loads(repository.read(snapshot.commit, INDEX_NAME)).get("weight_map")
    except (ValueError, AttributeError, RecursionError):
        return None


def _wrong(repository: Repository, snapshot: Snapshot, what: str) -> None:
    raise VerificationError(
        f"At {snapshot.commit[:12]} of {repository.repo_id} {what}.",
        f"Do not use it: close its pull request, or git clone {repository.url}, git revert it and push.",
    )
