"""Where a Hub keeps bytes: regular files as they come, large ones over LFS or Xet."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exporter.rehearsal.repository import Blob, Refusal
from exporter.rehearsal.xet import XetStore

PART_SIZE = 5 * 1024 * 1024
"""Bytes of each part of a multi-part upload: the smallest that S3 admits."""


@dataclass
class Upload:
    """A large file on its way: what was promised, where it is collected, and the ETag of each part that came."""

    sha256: str
    size: int
    path: Path
    etags: dict[int, str] = field(default_factory=dict)


class Storage:
    """The bytes of every blob, in ``folder``: ``blobs/<git oid>``, ``large/<sha256>``, ``uploads/<random>`` and
    ``xet``, whose files are copied to ``large`` when they are asked for over plain HTTP."""

    def __init__(self, folder: Path, *, xet: bool) -> None:
        self.folder = folder
        self.uploads: dict[str, Upload] = {}
        for name in ("blobs", "large", "uploads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        store = XetStore(folder / "xet") if xet else None
        self.xet = store if store and store.works() else None

    def add(self, data: bytes) -> Blob:
        """Keep a regular file."""
        blob = Blob.regular(data)
        (self.folder / "blobs" / blob.oid).write_bytes(data)
        return blob

    def path(self, blob: Blob) -> Path:
        """The file with a blob's bytes. Raises Refusal if they are not those that their uploader declared."""
        if blob.sha256 is None:
            return self.folder / "blobs" / blob.oid
        path = self.folder / "large" / blob.sha256
        if not path.is_file():
            self._fetch(blob.sha256, path)
        return path

    def text(self, tree: Mapping[str, Blob], path: str) -> str:
        """A text file of a tree, empty if it is not there."""
        return self.path(tree[path]).read_text() if path in tree else ""

    def large(self, sha256: str) -> Blob | None:
        """A large file, None if it has not been uploaded."""
        file = self.xet.find(sha256) if self.xet else None
        if file:
            return Blob.large(sha256, file.size, file.hash)
        path = self.folder / "large" / sha256
        return Blob.large(sha256, path.stat().st_size) if path.is_file() else None

    def begin(self, sha256: str, size: int) -> str:
        """Expect a large file; the answer is the secret name under which its parts may be sent."""
        name = secrets.token_urlsafe(16)
        self.uploads[name] = Upload(sha256, size, self.folder / "uploads" / name)
        return name

    def upload(self, name: str) -> Upload:
        if name not in self.uploads:
            raise Refusal(404, "No such upload")
        return self.uploads[name]

    async def receive(self, upload: Upload, part: int, chunks: AsyncIterator[bytes]) -> str:
        """Take part number ``part`` (from 1) of an upload, also for a second time; the answer is its ETag."""
        digest = hashlib.md5(usedforsecurity=False)
        with os.fdopen(os.open(upload.path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.seek((part - 1) * PART_SIZE)
            async for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
        upload.etags[part] = f'"{digest.hexdigest()}"'
        return upload.etags[part]

    def finish(self, upload: Upload) -> None:
        """Admit an upload, if its bytes are the promised ones. A second time it changes nothing: a client whose answer
        was lost asks again."""
        if upload.path.exists():
            require_digest(upload.path, upload.sha256)
            upload.path.replace(self.folder / "large" / upload.sha256)

    def _fetch(self, sha256: str, path: Path) -> None:
        file = self.xet.find(sha256) if self.xet else None
        if self.xet is None or file is None:
            raise Refusal(404, f"There is no object {sha256}")
        arriving = self.folder / "uploads" / secrets.token_urlsafe(16)
        self.xet.fetch(file, arriving)
        require_digest(arriving, sha256)
        arriving.replace(path)


def require_digest(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise Refusal(400, f"The uploaded bytes have the sha256 {digest.hexdigest()} and not {sha256}")
