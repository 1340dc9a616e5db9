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
from itertools import pairwise
from operator import methodcaller
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
    *[("version", "<u2"), ("flags", "<u2"), ("method", "<u2"), ("time", "<u2"), ("date", "<u2"), ("crc32", "<u4")],
    *[("packed", "<u4"), ("nbytes", "<u4"), ("name_length", "<u2"), ("extra_length", "<u2")],
]
_LOCAL = [("signature", "<u4"), *_COMMON]
_ENTRY = [
    *[("signature", "<u4"), ("made_by", "<u2"), *_COMMON, ("comment_length", "<u2"), ("disk", "<u2")],
    *[("internal", "<u2"), ("attributes", "<u4"), ("offset", "<u4")],
]
"""What stands before the name, as numpy reads it: ``packed`` is the compressed size, ``offset`` the local header's."""

_LOCAL_BYTES, _ENTRY_BYTES = 30, 46
_LENGTHS, _LENGTHS_AT = struct.Struct("<3H"), 28
"""The lengths of what follows an entry: name, extra field, comment."""

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_DESCRIPTOR_FLAG, _UTF8_FLAG = 0x0008, 0x0800
_ELSEWHERE = 0xFFFFFFFF
"""Stands in a 32-bit field whose value is in the zip64 extra field."""

_WIDENED = ("nbytes", "packed", "offset")
_WIDE_ENTRY = [(name, "<i8" if name in _WIDENED else kind) for name, kind in _ENTRY]

_NEAR_BYTES = 4096
_RUN_BYTES = 1024 * 1024
"""Local headers with less than ``_NEAR_BYTES`` between them are read at once, about ``_RUN_BYTES`` at most."""


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
        row = self.rows.get(f"{self.root}/{name}".encode(errors="surrogatepass"))
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


def read_archive(path: Path, region: Region) -> Archive:
    """The members of the archive that ``region`` of the file ``path`` holds, at their places in that file.

    A member's crc32 is None where all are zero: torch.save then wrote no checksums.

    Raises:
        CheckpointError: the archive is damaged, or holds what torch.save never writes.
    """
    start, stop, count = _find_directory(path, region)
    names, entries = _read_entries(path, _pread(path, region, stop - start, start), count)
    if not names or entries["offset"][0] != 0:
        damaged(path, "its first member does not lie at its start")
    root = _find_root(path, names)
    _check_plain(path, names, entries)
    rows = _number(path, names)
    offset = _find_data(path, region, names, entries, start)
    crc32 = entries["crc32"].copy() if entries["crc32"].any() else None
    return Archive(root, path, rows, region.offset + offset, entries["nbytes"].copy(), crc32)


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


def _read_entries(path: Path, directory: bytes, count: int) -> tuple[list[bytes], NDArray[void]]:
    """Names and fields (``_WIDE_ENTRY``) of all entries, in the order of their local headers."""
    import numpy

    positions = _positions(path, directory, count)
    narrow = _gather(directory, positions, _ENTRY)
    if (narrow["signature"] != int.from_bytes(b"PK\x01\x02", "little")).any() or narrow["disk"].any():
        damaged(path, "its directory is not a list of members")
    starts = positions + _ENTRY_BYTES
    stops = starts + narrow["name_length"]
    entries = narrow.astype(_WIDE_ENTRY)
    is_wide = numpy.logical_or.reduce([narrow[name] == _ELSEWHERE for name in _WIDENED])
    for row in numpy.flatnonzero(is_wide).tolist():
        extra = directory[stops[row] : stops[row] + narrow["extra_length"][row]]
        wide = _widen(path, extra, [int(narrow[name][row]) for name in _WIDENED])
        for name, value in zip(_WIDENED, wide, strict=True):
            entries[name][row] = value
    order = numpy.argsort(entries["offset"], kind="stable")
    names = [directory[start:stop] for start, stop in zip(starts[order].tolist(), stops[order].tolist(), strict=True)]
    return names, entries[order]


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
    anywhere: NDArray[void] = numpy.ndarray((max(len(data) - kind.itemsize + 1, 0),), kind, data, strides=(1,))
    return anywhere[positions]


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
    if any(map(methodcaller("startswith", (prefix + b"code/", prefix + b"constants.pkl")), names)):
        raise CheckpointError(
            f"{path.name} is a TorchScript archive, which holds a program; expected a file of torch.save.",
            "Load it with torch.jit.load and save its state_dict() with torch.save.",
        )
    _decode(path, b"\0".join(names))  # which is UTF-8 where each name is
    is_below = methodcaller("startswith", prefix)
    if root in (b"", b".", b"..") or not all(map(is_below, names)):
        stray = names[0] if root in (b"", b".", b"..") else next(name for name in names if not is_below(name))
        damaged(path, f"its member {_decode(path, stray)!r:.100} does not lie in one folder with the others")
    return _decode(path, root)


def _check_plain(path: Path, names: Sequence[bytes], entries: NDArray[void]) -> None:
    is_packed = (entries["method"] != 0) | (entries["packed"] != entries["nbytes"])
    file_type = entries["attributes"] >> 16 & stat.S_IFMT(0xFFFF)
    is_special = (file_type != 0) & (file_type != stat.S_IFREG)
    is_special |= entries["flags"] & (0xFFFF - _DESCRIPTOR_FLAG - _UTF8_FLAG) != 0
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


def _find_data(
    path: Path, region: Region, names: Sequence[bytes], entries: NDArray[void], directory: int
) -> NDArray[int64]:
    """Where in ``region`` each member's data begins: after its local header, which must say what the directory says.

    With the descriptor flag, torch.save leaves sizes and checksum of the local header zero. The data must end before
    the next header, or the ``directory``, begins.
    """
    import numpy

    lengths = entries["name_length"].astype(numpy.int64) + _LOCAL_BYTES
    headers = _read_headers(path, region, entries["offset"], lengths)
    local = _gather(b"".join(headers), numpy.cumsum(lengths) - lengths, _LOCAL)
    has_name = numpy.fromiter(map(bytes.endswith, headers, names), numpy.bool_, len(names))
    has_name &= local["name_length"] == entries["name_length"]
    begins: NDArray[int64] = entries["offset"] + lengths + local["extra_length"]
    limits = numpy.append(entries["offset"][1:], directory)

    def overlap(row: int) -> str:
        end = int(begins[row]) + int(entries["nbytes"][row])
        return f"its member {_below(names[row])} ends at byte {end}, where another begins at byte {limits[row]}"

    _refuse(
        path,
        (
            ~_agree(local, entries),
            lambda row: f"the local header of its member {_quoted(names[row])} disagrees with the directory",
        ),
        (~has_name, lambda row: f"its directory places {_quoted(names[row])} where another member lies"),
        (entries["nbytes"] > limits - begins, overlap),
    )
    return begins


def _agree(local: NDArray[void], entries: NDArray[void]) -> NDArray[bool_]:
    """Which local headers say what the directory says, or with the descriptor flag nothing."""
    is_deferred = (local["crc32"] == 0) & (local["packed"] == 0) & (local["nbytes"] == 0)
    is_deferred &= local["flags"] & _DESCRIPTOR_FLAG != 0
    is_same = local["crc32"] == entries["crc32"]
    for size in (local["packed"], local["nbytes"]):
        is_same &= (size == entries["nbytes"]) | (size == _ELSEWHERE)
    is_header = (local["signature"] == int.from_bytes(SIGNATURE, "little")) & (local["method"] == 0)
    agree: NDArray[bool_] = is_header & (local["flags"] == entries["flags"]) & (is_deferred | is_same)
    return agree


def _read_headers(path: Path, region: Region, offsets: NDArray[int64], lengths: NDArray[int64]) -> list[bytes]:
    """``lengths`` bytes at each of ``offsets``, which ascend; those near one another are read at once, and no data."""
    import numpy

    is_beyond = offsets > region.nbytes - lengths
    _refuse(path, (is_beyond, lambda row: _cut_short(int(offsets[row]) + int(lengths[row]))))
    stops = offsets + lengths
    is_far = offsets[1:] - stops[:-1] > _NEAR_BYTES
    firsts = numpy.flatnonzero(is_far | (offsets[1:] // _RUN_BYTES != offsets[:-1] // _RUN_BYTES)) + 1
    spans = list(zip(offsets.tolist(), stops.tolist(), strict=True))
    headers: list[bytes] = []
    for first, last in pairwise([0, *firsts.tolist(), len(spans)]):
        start = spans[first][0]
        run = _pread(path, region, max(stop for _, stop in spans[first:last]) - start, start)
        headers += [run[offset - start : stop - start] for offset, stop in spans[first:last]]
    return headers


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
