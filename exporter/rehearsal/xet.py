"""The local Xet store: hf_xet's own storage backend behind ``local://`` addresses, with no server.

The real uploader and downloader of hf_xet do the work, in the client's process. What the Hub itself must know, which
Xet hash belongs to a sha256, stands in the shard files that the uploader leaves in the store.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENTRY = 48
"""Bytes of the header and of each record of a shard's file section
(https://huggingface.co/docs/xet/shard, the MDB shard file format)."""

WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
LAST_FILE = b"\xff" * 32
LIFETIME = 24 * 3600
"""Seconds that an access token to the store is said to be valid."""


@dataclass(frozen=True)
class XetFile:
    """A file in the store: its Xet hash, the sha256 that the uploader declared, its size in bytes."""

    hash: str
    sha256: str
    size: int


class XetStore:
    """A store under ``folder``; uploads go to ``write_url``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_url = f"local://{folder / 'store'}"
        (folder / "store").mkdir(parents=True, exist_ok=True)

    def works(self) -> bool:
        """Whether the hf_xet at hand has the local backend, which is not part of its public interface."""
        try:
            import hf_xet

            with hf_xet.XetSession().new_upload_commit(**connection(f"local://{self.folder / 'probe'}")) as commit:
                commit.start_upload_bytes(b"probe", sha256=hf_xet.COMPUTE_SHA256)
        except (ImportError, AttributeError, TypeError, RuntimeError, ConnectionError):
            return False
        return True

    def find(self, sha256: str) -> XetFile | None:
        """The file with these bytes, None if it has not been uploaded."""
        files = (file for path in self.folder.glob("store/xet/xorbs/shards/*.mdb") for file in read_shard(path))
        return next((file for file in files if file.sha256 == sha256), None)

    def read_url(self) -> str:
        """An address to read from what the store holds now. The uploading process keeps the store's database locked,
        so every reader gets a copy of its own, of hard links but for the database itself."""
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder))
        shutil.copytree(self.folder / "store" / "xet" / "xorbs", copy / "xet" / "xorbs", copy_function=link_or_copy)
        return f"local://{copy}"

    def fetch(self, file: XetFile, target: Path) -> None:
        """Write a file's bytes to ``target``."""
        import hf_xet

        with hf_xet.XetSession().new_file_download_group(**connection(self.read_url())) as group:
            group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), str(target))


def connection(url: str) -> dict[str, str | int]:
    """What hf_xet wants to know of a store: address, token, and until when it is valid."""
    return {"endpoint": url, "token": "rehearsal", "token_expiry_unix_secs": expiration()}


def expiration() -> int:
    """The Unix time until which a token that is given now is valid."""
    return int(time.time()) + LIFETIME


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file that never changes, copy the database."""
    if source.endswith(".redb"):
        shutil.copy(source, target)
    else:
        Path(target).hardlink_to(source)


def read_shard(path: Path) -> Iterator[XetFile]:
    """The files that a shard describes: a header (hash, flags, number of segments), the segments with their sizes,
    as many verification records, and the sha256, each of 48 bytes. A shard that is still being written ends early."""
    with path.open("rb") as file:
        file.seek(ENTRY)
        while len(header := file.read(ENTRY)) == ENTRY and header[:32] != LAST_FILE:
            flags, count = struct.unpack_from("<II", header, 32)
            segments = file.read(ENTRY * count)
            file.seek(ENTRY * count if flags & WITH_VERIFICATION else 0, 1)
            metadata = file.read(ENTRY) if flags & WITH_METADATA else b""
            if len(metadata) == ENTRY:
                size = sum(struct.unpack_from("<I", segments, ENTRY * i + 36)[0] for i in range(count))
                yield XetFile(hash_text(header[:32]), hash_text(metadata[:32]), size)


def hash_text(stored: bytes) -> str:
    """A hash as Xet writes it in text: four little-endian numbers of 64 bits, each in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", stored))
