"""The directory of a zip archive as torch.save writes it: uncompressed members below one root folder.

Layout: APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (end records). It is read
strictly, so that no two readers can see different members in one file: the directory must end where its end record
begins, the end record where the file ends, and each local header must agree with its entry.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from exporter.errors import CheckpointError
from exporter.tensors import Member

SIGNATURE = b"PK\x03\x04"
MAX_DIRECTORY_BYTES = 256 * 1024 * 1024
MAX_MEMBERS = 2**20

_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_DESCRIPTOR_FLAG, _UTF8_FLAG = 0x0008, 0x0800
_ELSEWHERE = 0xFFFFFFFF
"""Stands in a 32-bit field whose value is in the zip64 extra field."""


@dataclass(frozen=True)
class Archive:
    """``members`` by their name below the folder ``root``."""

    root: str
    members: dict[str, Member]


@dataclass(frozen=True)
class _Entry:
    """An entry of the directory: ``offset`` is that of the local header, ``packed`` the compressed size in bytes."""

    name: bytes
    flags: int
    method: int
    attributes: int
    offset: int
    nbytes: int
    packed: int
    crc32: int


@dataclass(frozen=True)
class Region:
    """``nbytes`` bytes of an open file from byte ``offset`` on."""

    file: BinaryIO
    offset: int
    nbytes: int

    def read(self, length: int, position: int = 0) -> bytes:
        """At most ``length`` bytes from byte ``position`` of the region on, as if the file ended with the region."""
        length = min(length, max(self.nbytes - position, 0))
        return os.pread(self.file.fileno(), length, self.offset + position) if length else b""


def read_archive(path: Path, region: Region) -> Archive:
    """The members of the archive that ``region`` of the file ``path`` holds, at their places in that file.

    A member's crc32 is None where all are zero: torch.save then wrote no checksums.

    Raises:
        CheckpointError: the archive is damaged, or holds what torch.save never writes.
    """
    start, stop, count = _find_directory(path, region)
    entries = sorted(_entries(path, _pread(path, region, stop - start, start), count), key=lambda entry: entry.offset)
    if not entries or entries[0].offset != 0:
        damaged(path, "its first member does not lie at its start")
    _refuse_program(path, entries)
    has_checksums = any(entry.crc32 for entry in entries)
    root = entries[0].name.partition(b"/")[0]
    members: dict[str, Member] = {}
    for entry, limit in zip(entries, [*(entry.offset for entry in entries[1:]), start], strict=True):
        name = _name_below(path, root, entry.name)
        _check_plain(path, entry, name)
        if name in members:
            damaged(path, f"it has two members {name!r:.100}")
        offset = _data_offset(path, region, entry)
        end = offset + entry.nbytes
        if end > limit:
            damaged(path, f"its member {name!r:.100} ends at byte {end}, where another begins at byte {limit}")
        members[name] = Member(path, region.offset + offset, entry.nbytes, entry.crc32 if has_checksums else None)
    return Archive(_decode(path, root), members)


def _find_directory(path: Path, region: Region) -> tuple[int, int, int]:
    """The directory's first byte, the byte after its last, and its number of entries."""
    end = region.nbytes - _END.size
    if end < 0:
        damaged(path, f"it has {region.nbytes} bytes, too few for an archive")
    signature, disk, first_disk, *fields, comment = _END.unpack(_pread(path, region, _END.size, end))
    if signature != b"PK\x05\x06" or comment:
        damaged(path, "it does not end as an archive does: it was cut short, or something was added to it")
    locator = _pread(path, region, _END64_LOCATOR.size, max(end - _END64_LOCATOR.size, 0))
    if locator.startswith(b"PK\x06\x07"):
        end -= _END64_LOCATOR.size + _END64.size
        fields = _read_end64(path, region, end, locator, fields)
    here, count, length, start = fields
    if disk or first_disk or here != count or start + length != end:
        damaged(path, f"its directory goes from byte {start} to {start + length}, expected to end at byte {end}")
    if length > MAX_DIRECTORY_BYTES or count > MAX_MEMBERS:
        damaged(path, f"its directory has {count} entries in {length} bytes, too many")
    return start, end, count


def _read_end64(path: Path, region: Region, offset: int, locator: bytes, narrow: list[int]) -> list[int]:
    """The fields of the zip64 end record, which must repeat those of the old one where they fit into it."""
    if _END64_LOCATOR.unpack(locator)[2] != offset:
        damaged(path, f"its zip64 end record does not lie at byte {offset}")
    signature, _, _, _, disk, first_disk, *wide = _END64.unpack(_pread(path, region, _END64.size, offset))
    if signature != b"PK\x06\x06" or disk or first_disk:
        damaged(path, f"it has no zip64 end record at byte {offset}")
    limits = (0xFFFF, 0xFFFF, _ELSEWHERE, _ELSEWHERE)
    if any(old not in (new, limit) for old, new, limit in zip(narrow, wide, limits, strict=True)):
        damaged(path, "its two end records disagree")
    return wide


def _entries(path: Path, directory: bytes, count: int) -> Iterator[_Entry]:
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory):
            damaged(path, f"its directory has fewer than {count} entries")
        fields = _ENTRY.unpack_from(directory, position)
        name_length, extra_length, comment_length = fields[10:13]
        name_end = position + _ENTRY.size + name_length
        extra = directory[name_end : name_end + extra_length]
        yield _entry(path, fields, directory[position + _ENTRY.size : name_end], extra)
        position = name_end + extra_length + comment_length
    if position != len(directory):
        damaged(path, f"its directory does not have {count} entries")


def _entry(path: Path, fields: tuple[Any, ...], name: bytes, extra: bytes) -> _Entry:
    signature, _, _, flags, method, _, _, crc32, packed, nbytes, _, _, _, disk, _, attributes, offset = fields
    if signature != b"PK\x01\x02" or disk:
        damaged(path, "its directory is not a list of members")
    if _ELSEWHERE in (nbytes, packed, offset):
        nbytes, packed, offset = _widen(path, extra, (nbytes, packed, offset))
    return _Entry(name, flags, method, attributes, offset, nbytes, packed, crc32)


def _widen(path: Path, extra: bytes, narrow: tuple[int, int, int]) -> list[int]:
    """``narrow`` with the values of the zip64 extra field (APPNOTE 4.5.3) in place of its 0xFFFFFFFF."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1 and length >= 8 * narrow.count(_ELSEWHERE) and len(extra) >= 4 + length:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            return [next(wide) if value == _ELSEWHERE else value for value in narrow]
        extra = extra[4 + length :]
    damaged(path, "its directory lacks a size or an offset of more than 32 bits")


def _refuse_program(path: Path, entries: list[_Entry]) -> None:
    if any(entry.name.partition(b"/")[2].startswith((b"code/", b"constants.pkl")) for entry in entries):
        raise CheckpointError(
            f"{path.name} is a TorchScript archive, which holds a program; expected a file of torch.save.",
            "Load it with torch.jit.load and save its state_dict() with torch.save.",
        )


def _check_plain(path: Path, entry: _Entry, name: str) -> None:
    if entry.method or entry.packed != entry.nbytes:
        damaged(path, f"its member {name!r:.100} is compressed, expected stored")
    file_type = stat.S_IFMT(entry.attributes >> 16)
    if entry.flags & ~(_DESCRIPTOR_FLAG | _UTF8_FLAG) or file_type not in (0, stat.S_IFREG):
        damaged(path, f"its member {name!r:.100} is encrypted or not a plain file")


def _name_below(path: Path, root: bytes, name: bytes) -> str:
    folder, separator, rest = name.partition(b"/")
    if folder != root or not separator or folder in (b"", b".", b".."):
        damaged(path, f"its member {_decode(path, name)!r:.100} does not lie in one folder with the others")
    return _decode(path, rest)


def _decode(path: Path, name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        damaged(path, "a member's name is not UTF-8")


def _data_offset(path: Path, region: Region, entry: _Entry) -> int:
    """Where the member's data begins: after its local header, which must say what the directory says.

    With the descriptor flag, torch.save leaves sizes and checksum of the local header zero.
    """
    header = _pread(path, region, _LOCAL.size + len(entry.name), entry.offset)
    signature, _, flags, method, _, _, crc32, packed, nbytes, name_length, extra_length = _LOCAL.unpack_from(header)
    written = (crc32, packed, nbytes)
    is_deferred = bool(flags & _DESCRIPTOR_FLAG) and written == (0, 0, 0)
    is_same = crc32 == entry.crc32 and {packed, nbytes} <= {entry.nbytes, _ELSEWHERE}
    if (signature, flags, method) != (SIGNATURE, entry.flags, 0) or not (is_deferred or is_same):
        damaged(path, f"the local header of its member {_decode(path, entry.name)!r:.100} disagrees with the directory")
    if name_length != len(entry.name) or header[_LOCAL.size :] != entry.name:
        damaged(path, f"its directory places {_decode(path, entry.name)!r:.100} where another member lies")
    return entry.offset + len(header) + int(extra_length)


def _pread(path: Path, region: Region, length: int, offset: int) -> bytes:
    """``length`` bytes at ``offset``, which a damaged directory may place beyond the end."""
    data = region.read(length, offset)
    if len(data) != length:
        damaged(path, f"it ends before byte {offset + length}, where its directory expects more")
    return data


def damaged(path: Path, reason: str) -> NoReturn:
    """Raise the CheckpointError that says of ``path`` why it cannot be read."""
    raise CheckpointError(f"{path.name} is damaged: {reason}.", "Copy the file again from where it was written.")
