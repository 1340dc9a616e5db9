"""The shards that are written and proven, recorded one by one, so that a later run need not write them again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.errors import VerificationError
from exporter.plan import Shard
from exporter.shards import NonFinite, Progress, WrittenFile, WrittenShard, write_file
from exporter.tensors import Member, Piece
from exporter.verify import check_file


@dataclass(frozen=True)
class Journal:
    """Records of finished shards, one file each in ``records``; the shards lie in ``folder``.

    ``sources`` are the files that they are made from, by name: records name them so, since a checkpoint may be moved
    before the next run.
    """

    records: Path
    folder: Path
    sources: Mapping[str, Path]

    @property
    def finished_bytes(self) -> int:
        """Size of the shards that are recorded and there, in bytes."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if self._record(path.name).exists())

    def remove_unfinished(self) -> None:
        """Remove every file of ``folder`` that no record names."""
        for path in self.folder.iterdir():
            if not self._record(path.name).exists():
                path.unlink()

    def finished(self, shard: Shard, progress: Progress) -> WrittenShard | None:
        """The shard as an earlier run finished it; None if it did not, or the file is no longer what it wrote."""
        try:
            written = _load(self._record(shard.name).read_bytes(), self.sources)
            check_file(written.file, self.folder, progress)
        except (FileNotFoundError, ValueError, KeyError, TypeError, VerificationError):
            return None
        return written if (written.file.path, written.file.size) == (shard.name, shard.size) else None

    def add(self, written: WrittenShard) -> None:
        """Record a shard that is on the disk and proven."""
        record = self._record(written.file.path)
        temporary = record.with_suffix(".new")
        write_file(temporary.name, _dump(written, {path: name for name, path in self.sources.items()}), self.records)
        os.replace(temporary, record)

    def remove(self, written: WrittenShard) -> None:
        """Remove a finished shard, which is not needed any more, and its record."""
        self._record(written.file.path).unlink()
        (self.folder / written.file.path).unlink()

    def _record(self, name: str) -> Path:
        return self.records / f"{name}.json"


def _dump(written: WrittenShard, names: Mapping[Path, str]) -> bytes:
    value = {
        "file": asdict(written.file),
        "nonfinite": {name: asdict(count) for name, count in written.nonfinite.items()},
        "pieces": [
            [names[member.path], member.offset, member.nbytes, member.crc32, [_numbers(piece) for piece in pieces]]
            for member, pieces in written.pieces.items()
        ],
    }
    return json.dumps(value).encode()


def _numbers(piece: Piece) -> list[int]:
    return [piece.offset, piece.nbytes, piece.crc32]


def _load(content: bytes, sources: Mapping[str, Path]) -> WrittenShard:
    value: Any = json.loads(content)
    return WrittenShard(
        file=WrittenFile(**value["file"]),
        nonfinite={name: NonFinite(**count) for name, count in value["nonfinite"].items()},
        pieces={
            Member(sources[name], offset, nbytes, crc32): {Piece(*piece) for piece in pieces}
            for name, offset, nbytes, crc32, pieces in value["pieces"]
        },
    )
