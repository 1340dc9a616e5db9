"""The directory of a zip archive as torch.save writes it: uncompressed members below one root folder.

Layout: APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (end records). It is read
strictly, so that no two readers can see different members in one file: the directory must end where its end record
begins, the end record where the file ends, and each local header must agree with its entry.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from exporter.errors import CheckpointError
from exporter.tensors import Member

if TYPE_CHECKING:
    from numpy import bool_, int64, uint32, void
    from numpy.typing import NDArray

SIGNATURE = b"PK\x03\x04"
MAX_DIRECTORY_BYTES = 256 * 1024 * 1024
MAX_MEMBERS = 2**20

_COMMON = [
    ("version", "<u2"),
    ("flags", "<u2"),
    ("method", "<u2"),
    ("time", "<u2"),
    ("date", "<u2"),
    ("crc32", "<u4"),
    ("packed", "<u4"),
    ("nbytes", "<u4"),
    ("name_length", "<u2"),
    ("extra_length", "<u2"),
]
_LOCAL = [("signature", "<u4"), *_COMMON]
_ENTRY = [
    ("signature", "<u4"),
    ("made_by", "<u2"),
    *_COMMON,
    ("comment_length", "<u2"),
    ("disk", "<u2"),
    ("internal", "<u2"),
    ("attributes", "<u4"),
    ("offset", "<u4"),
]
"""What stands before the name in a local header and in an entry of the directory, as numpy reads it.

``packed`` is the compressed size, ``offset`` that of the local header."""

_LOCAL_BYTES, _ENTRY_BYTES = 30, 46
_LENGTHS, _LENGTHS_AT = struct.Struct("<3H"), 28
"""The lengths of what follows an entry: name, extra field, comment."""

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_DESCRIPTOR_FLAG, _UTF8_FLAG = 0x0008, 0x0800
_ELSEWHERE = 0xFFFFFFFF
"""Stands in a 32-bit field whose value is in the zip64 extra field."""

_BATCH, _BATCH_BYTES = 4096, 4 * 1024 * 1024
"""The most local headers, and about the most bytes of them, that are looked at at a time."""

_NEAR_BYTES = 512
"""Local headers are read at once where there is no more than this between them."""


@dataclass(frozen=True, eq=False)
class Archive:
    """The members below the folder ``root``. They are made when they are asked for, since there may be many of them.

    ``rows`` has the row of each member by its whole name: it is ``nbytes`` bytes of ``path`` from byte ``offset`` on.
    """

    root: str
    path: Path
    rows: Mapping[bytes, int]
    offset: NDArray[int64]
    nbytes: NDArray[int64]
    crc32: NDArray[uint32] | None

    def member(self, name: str) -> Member | None:
        """The member of this name below the root; None where there is none."""
        row = self.rows.get(f"{self.root}/{name}".encode())
        if row is None:
            return None
        crc32 = None if self.crc32 is None else int(self.crc32[row])
        return Member(self.path, int(self.offset[row]), int(self.nbytes[row]), crc32)


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


@dataclass(frozen=True, eq=False)
class _Directory:
    """All entries in the order of their local headers: ``names``, and in columns their ``fields`` (``_ENTRY``).

    The last three are such fields too, with the values of zip64.
    """

    names: list[bytes]
    fields: NDArray[void]
    nbytes: NDArray[int64]
    packed: NDArray[int64]
    offset: NDArray[int64]


def read_archive(path: Path, region: Region) -> Archive:
    """The members of the archive that ``region`` of the file ``path`` holds, at their places in that file.

    A member's crc32 is None where all are zero: torch.save then wrote no checksums.

    Raises:
        CheckpointError: the archive is damaged, or holds what torch.save never writes.
    """
    start, stop, count = _find_directory(path, region)
    directory = _read_directory(path, _pread(path, region, stop - start, start), count)
    if not directory.names or directory.offset[0] != 0:
        damaged(path, "its first member does not lie at its start")
    root = _find_root(path, directory.names)
    _check_plain(path, directory)
    rows = _number(path, directory.names)
    begins = _find_data(path, region, directory, start)
    crc32 = directory.fields["crc32"].copy()
    return Archive(root, path, rows, region.offset + begins, directory.nbytes, crc32 if crc32.any() else None)


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


def _read_directory(path: Path, directory: bytes, count: int) -> _Directory:
    import numpy

    positions = _positions(path, directory, count)
    fields = _gather(directory, positions, _ENTRY)
    if (fields["signature"] != int.from_bytes(b"PK\x01\x02", "little")).any() or fields["disk"].any():
        damaged(path, "its directory is not a list of members")
    starts = positions + _ENTRY_BYTES
    stops = starts + fields["name_length"]
    nbytes, packed, offset = (fields[name].astype(numpy.int64) for name in ("nbytes", "packed", "offset"))
    is_wide = (nbytes == _ELSEWHERE) | (packed == _ELSEWHERE) | (offset == _ELSEWHERE)
    for row in numpy.flatnonzero(is_wide).tolist():
        extra = directory[stops[row] : stops[row] + fields["extra_length"][row]]
        wide = _widen(path, extra, [int(nbytes[row]), int(packed[row]), int(offset[row])])
        nbytes[row], packed[row], offset[row] = wide
    order = numpy.argsort(offset, kind="stable")
    names = [directory[start:stop] for start, stop in zip(starts[order].tolist(), stops[order].tolist(), strict=True)]
    return _Directory(names, _gather(directory, positions[order], _ENTRY), nbytes[order], packed[order], offset[order])


def _positions(path: Path, directory: bytes, count: int) -> NDArray[int64]:
    """Where in ``directory`` its entries begin."""
    import numpy

    positions: list[int] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY_BYTES > len(directory):
            damaged(path, f"its directory has fewer than {count} entries")
        positions.append(position)
        name_length, extra_length, comment_length = _LENGTHS.unpack_from(directory, position + _LENGTHS_AT)
        position += _ENTRY_BYTES + name_length + extra_length + comment_length
    if position != len(directory):
        damaged(path, f"its directory does not have {count} entries")
    return numpy.array(positions, numpy.int64)


def _gather(data: bytes, positions: NDArray[int64], fields: list[tuple[str, str]]) -> NDArray[void]:
    """The records that begin at ``positions`` of ``data``, each of them whole."""
    import numpy

    kind = numpy.dtype(fields)
    opaque = numpy.dtype((numpy.void, kind.itemsize))  # is copied as a whole, and not field by field
    anywhere: NDArray[void] = numpy.ndarray((max(len(data) - kind.itemsize + 1, 0),), opaque, data, strides=(1,))
    return anywhere[positions].view(kind)


def _widen(path: Path, extra: bytes, narrow: list[int]) -> list[int]:
    """``narrow`` with the values of the zip64 extra field (APPNOTE 4.5.3) in place of its 0xFFFFFFFF."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1 and length >= 8 * narrow.count(_ELSEWHERE) and len(extra) >= 4 + length:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            wide = [next(values) if value == _ELSEWHERE else value for value in narrow]
            if max(wide) >= 2**63:
                damaged(path, f"its directory has the size or offset {max(wide)}")
            return wide
        extra = extra[4 + length :]
    damaged(path, "its directory lacks a size or an offset of more than 32 bits")


def _find_root(path: Path, names: Sequence[bytes]) -> str:
    """The one folder that all members lie in, and no program among them."""
    root = names[0].partition(b"/")[0]
    prefix = root + b"/"
    if [name for name in names if name.startswith((prefix + b"code/", prefix + b"constants.pkl"))]:
        raise CheckpointError(
            f"{path.name} is a TorchScript archive, which holds a program; expected a file of torch.save.",
            "Load it with torch.jit.load and save its state_dict() with torch.save.",
        )
    for name in names:
        _decode(path, name)
    strays = names if root in (b"", b".", b"..") else [name for name in names if not name.startswith(prefix)]
    if strays:
        damaged(path, f"its member {_quoted(strays[0])} does not lie in one folder with the others")
    return _decode(path, root)


def _check_plain(path: Path, directory: _Directory) -> None:
    names, fields = directory.names, directory.fields
    is_packed = (fields["method"] != 0) | (directory.packed != directory.nbytes)
    file_type = fields["attributes"] >> 16 & stat.S_IFMT(0xFFFF)
    is_special = (file_type != 0) & (file_type != stat.S_IFREG)
    is_special |= fields["flags"] & (0xFFFF - _DESCRIPTOR_FLAG - _UTF8_FLAG) != 0
    _refuse(
        path,
        (is_packed, lambda row: f"its member {_below(names[row])} is compressed, expected stored"),
        (is_special, lambda row: f"its member {_below(names[row])} is encrypted or not a plain file"),
    )


def _number(path: Path, names: Sequence[bytes]) -> dict[bytes, int]:
    """The row of each name."""
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) != len(names):
        twice = next(name for row, name in enumerate(names) if rows[name] != row)
        damaged(path, f"it has two members {_below(twice)}")
    return rows


def _refuse(path: Path, *checks: tuple[NDArray[bool_], Callable[[int], str]]) -> None:
    """Refuse the archive for its first member that is wrong; each of ``checks`` says which are, and why one is."""
    found = [(int(wrong.argmax()), reason) for wrong, reason in checks if wrong.any()]
    if found:
        row, reason = min(found, key=lambda item: item[0])
        damaged(path, reason(row))


def _below(name: bytes) -> str:
    return _quoted(name.partition(b"/")[2])


def _quoted(name: bytes) -> str:
    return f"{name.decode()!r:.100}"


def _decode(path: Path, name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        damaged(path, "a member's name is not UTF-8")


def _find_data(path: Path, region: Region, directory: _Directory, limit: int) -> NDArray[int64]:
    """Where in ``region`` each member's data begins: after its local header, which must say what the directory says.

    The data must end before the next local header begins, and that of the last member at byte ``limit``.
    """
    import numpy

    names, fields, offset = directory.names, directory.fields, directory.offset
    local, has_name = _read_headers(path, region, directory)
    has_name &= local["name_length"] == fields["name_length"]
    begins: NDArray[int64] = offset + _LOCAL_BYTES + local["name_length"] + local["extra_length"]
    limits = numpy.append(offset[1:], limit)

    def overlap(row: int) -> str:
        end = int(begins[row]) + int(directory.nbytes[row])
        return f"its member {_below(names[row])} ends at byte {end}, where another begins at byte {limits[row]}"

    _refuse(
        path,
        (
            ~_agree(local, directory),
            lambda row: f"the local header of its member {_quoted(names[row])} disagrees with the directory",
        ),
        (~has_name, lambda row: f"its directory places {_quoted(names[row])} where another member lies"),
        (directory.nbytes > limits - begins, overlap),
    )
    return begins


def _agree(local: NDArray[void], directory: _Directory) -> NDArray[bool_]:
    """Which local headers say what the directory says.

    With the descriptor flag, torch.save leaves sizes and checksum of the local header zero.
    """
    is_deferred = (local["crc32"] == 0) & (local["packed"] == 0) & (local["nbytes"] == 0)
    is_deferred &= local["flags"] & _DESCRIPTOR_FLAG != 0
    is_same = local["crc32"] == directory.fields["crc32"]
    for size in (local["packed"], local["nbytes"]):
        is_same &= (size == directory.nbytes) | (size == _ELSEWHERE)
    is_header = (local["signature"] == int.from_bytes(SIGNATURE, "little")) & (local["method"] == 0)
    agree: NDArray[bool_] = is_header & (local["flags"] == directory.fields["flags"]) & (is_deferred | is_same)
    return agree


def _read_headers(path: Path, region: Region, directory: _Directory) -> tuple[NDArray[void], NDArray[bool_]]:
    """The local headers, and whether each comes with the name that the directory has for it."""
    import numpy

    starts, lengths = directory.offset, directory.fields["name_length"].astype(numpy.int64) + _LOCAL_BYTES
    is_beyond = starts > region.nbytes - lengths
    _refuse(path, (is_beyond, lambda row: _cut_short(int(starts[row]) + int(lengths[row]))))
    stops = starts + lengths
    headers, has_name = [], []
    count = max(min(_BATCH, _BATCH_BYTES // int(lengths.max(initial=1))), 1)
    for first in range(0, len(directory.names), count):
        rows = slice(first, first + count)
        data, positions = _read_near(path, region, starts[rows], stops[rows])
        headers.append(_gather(data, positions, _LOCAL))
        names = map(data.startswith, directory.names[rows], (positions + _LOCAL_BYTES).tolist())
        has_name.append(numpy.fromiter(names, numpy.bool_, len(positions)))
    return numpy.concatenate(headers), numpy.concatenate(has_name)


def _read_near(
    path: Path, region: Region, starts: NDArray[int64], stops: NDArray[int64]
) -> tuple[bytes, NDArray[int64]]:
    """The bytes from each of ``starts``, which ascend, to its stop, joined, and where in them each begins.

    What lies near one another is read at once, since there may be many members without data; data is not read.
    """
    import numpy

    firsts = numpy.append(0, numpy.flatnonzero(starts[1:] - stops[:-1] > _NEAR_BYTES) + 1)
    run_starts, run_stops = starts[firsts], numpy.maximum.reduceat(stops, firsts)
    runs = zip(run_starts.tolist(), run_stops.tolist(), strict=True)
    data = b"".join([_pread(path, region, stop - start, start) for start, stop in runs])
    lengths = run_stops - run_starts
    shifts = run_starts - (numpy.cumsum(lengths) - lengths)
    return data, starts - numpy.repeat(shifts, numpy.diff(firsts, append=len(starts)))


def _pread(path: Path, region: Region, length: int, offset: int) -> bytes:
    """``length`` bytes at ``offset``, which a damaged directory may place beyond the end."""
    data = region.read(length, offset)
    if len(data) != length:
        damaged(path, _cut_short(offset + length))
    return data


def _cut_short(stop: int) -> str:
    return f"it ends before byte {stop}, where its directory expects more"


def damaged(path: Path, reason: str) -> NoReturn:
    """Raise the CheckpointError that says of ``path`` why it cannot be read."""
    raise CheckpointError(f"{path.name} is damaged: {reason}.", "Copy the file again from where it was written.")
