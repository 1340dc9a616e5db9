"""What a push does to a repository, decided from two lists of files and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.shards import WrittenFile

_BLOCK_BYTES = 1024 * 1024
_LOADED_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_(config\.json|model\.(safetensors|bin))"
)
"""The names that from_pretrained looks for: beside new weights an old one is read with them, or instead of them."""


@dataclass(frozen=True)
class OutgoingFile:
    """A file to publish: ``path`` in the repository, ``size`` in bytes, ``sha256`` in hex."""

    path: str
    source: Path
    size: int
    sha256: str

    def git_blob_id(self) -> str:
        """The id, in hex, that git gives this file's bytes."""
        with self.source.open("rb") as file:
            return git_blob_id(self.size, iter(lambda: file.read(_BLOCK_BYTES), b""))


def git_blob_id(size: int, blocks: Iterable[bytes]) -> str:
    """The id, in hex, that git gives ``size`` bytes: sha1 of ``blob SIZE``, a zero byte and the bytes."""
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: a large one is known by its ``sha256``, any other (``sha256`` None) by its git ``blob_id``."""

    path: str
    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class PushPlan:
    """Paths in the repository, in order: what one commit adds, replaces and deletes, and what it leaves alone.

    ``unchanged`` are outgoing files that the repository has already, ``kept`` files that are not ours.
    """

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    unchanged: tuple[str, ...]

    @property
    def sent(self) -> tuple[str, ...]:
        """The files that are sent."""
        return tuple(sorted(self.added + self.replaced))

    @property
    def is_empty(self) -> bool:
        """Whether the repository holds the release already."""
        return not (self.added or self.replaced or self.deleted)


@dataclass(frozen=True)
class Forecast:
    """What a push will do, as far as it is known before the weights are written.

    ``undecided`` are weight files of the same name and size as the Hub's, which are sent if their bytes differ.
    ``sent_bytes`` is the size of all that is sent, with them.
    """

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    undecided: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    unchanged: tuple[str, ...]
    sent_bytes: int


def forecast_push(
    texts: Mapping[str, bytes],
    sizes: Mapping[str, int],
    remote: Mapping[str, RemoteFile],
    owned: Mapping[str, tuple[int, str]],
) -> Forecast:
    """What a push of ``texts``, whose content is known, and of files of ``sizes`` in bytes does to ``remote``."""
    known = [WrittenFile(path, len(text), hashlib.sha256(text).hexdigest()) for path, text in texts.items()]
    unknown = [WrittenFile(path, size, "") for path, size in sizes.items()]
    blob_ids = {path: git_blob_id(len(text), [text]) for path, text in texts.items()}
    plan = plan_push([*known, *unknown], remote, owned=owned, blob_ids=blob_ids)
    undecided = tuple(path for path in plan.replaced if sizes.get(path) == remote[path].size)
    return Forecast(
        added=plan.added,
        replaced=tuple(path for path in plan.replaced if path not in undecided),
        undecided=undecided,
        deleted=plan.deleted,
        kept=plan.kept,
        unchanged=plan.unchanged,
        sent_bytes=sum(file.size for file in (*known, *unknown) if file.path in plan.sent),
    )


def plan_push(
    outgoing: Iterable[OutgoingFile | WrittenFile],
    remote: Mapping[str, RemoteFile],
    *,
    owned: Mapping[str, tuple[int, str]] | None = None,
    blob_ids: Mapping[str, str] | None = None,
) -> PushPlan:
    """What makes ``remote`` (by path) hold exactly ``outgoing`` beside the files of other people.

    ``owned`` gives (size, sha256) of the files that an earlier export wrote: those that nobody has changed since are
    deleted where they no longer belong. ``blob_ids`` gives the git blob id of outgoing files that are to be compared
    with a regular remote file.
    """
    files = {file.path: file for file in outgoing}
    same = {path for path in files.keys() & remote.keys() if _same(files[path], remote[path], (blob_ids or {}))}
    others = remote.keys() - files.keys()
    stale = {path for path in others if _is_stale(remote[path], (owned or {}).get(path))}
    return PushPlan(
        added=tuple(sorted(files.keys() - remote.keys())),
        replaced=tuple(sorted(files.keys() & remote.keys() - same)),
        deleted=tuple(sorted(stale)),
        kept=tuple(sorted(others - stale)),
        unchanged=tuple(sorted(same)),
    )


def _same(file: OutgoingFile | WrittenFile, remote: RemoteFile, blob_ids: Mapping[str, str]) -> bool:
    if remote.sha256 is None:
        return file.size == remote.size and blob_ids.get(file.path) == remote.blob_id
    return (file.size, file.sha256) == (remote.size, remote.sha256)


def _is_stale(remote: RemoteFile, owned: tuple[int, str] | None) -> bool:
    if _LOADED_WEIGHTS.fullmatch(remote.path):
        return True
    return owned is not None and owned == (remote.size, remote.sha256 or owned[1])


def blob_ids_for(outgoing: Iterable[OutgoingFile], remote: Mapping[str, RemoteFile]) -> dict[str, str]:
    """The git blob id of each outgoing file whose remote counterpart is a regular file of the same size."""
    return {
        file.path: file.git_blob_id()
        for file in outgoing
        if (there := remote.get(file.path)) and there.sha256 is None and there.size == file.size
    }
