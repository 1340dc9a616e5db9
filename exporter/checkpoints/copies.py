"""Whether a rank's file is a copy of another rank's, also where the archive was saved anew under the right name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

from exporter.tensors import Extent, SourceFiles

File = TypeVar("File")


def find_copy(files: Iterable[tuple[File, Sequence[Extent]]]) -> tuple[File, File] | None:
    """Two of ``files`` whose archives have the same checksums; each comes with the extents that count.

    Extents of which each is one number say nothing: padding, or weights that are still as they were initialized. Nor
    does a checksum 0 of what is not empty, which torch.save leaves where it leaves the elements out
    (``torch.serialization.skip_data``).
    """
    seen: dict[tuple[int | None, ...], File] = {}
    for file, extents in files:
        filled = [extent for extent in extents if extent.nbytes]
        checksums = tuple(extent.member.crc32 if extent.member else None for extent in filled)
        other = seen.setdefault(checksums, file)
        if other is not file and all(checksums) and not all(map(is_constant, filled)):
            return file, other
    return None


def is_constant(extent: Extent) -> bool:
    """Whether all elements are one number."""
    if _is_hole(extent):
        return True
    with SourceFiles() as files:
        values = {value for block in files.blocks(extent) for value in (block.min().item(), block.max().item())}
    return len(values) == 1


def _is_hole(extent: Extent) -> bool:
    """Whether the file has no data there on the disk, and so reads as zeros; False where that cannot be asked."""
    with extent.path.open("rb") as file:
        try:
            return os.lseek(file.fileno(), extent.offset, os.SEEK_DATA) >= extent.offset + extent.nbytes
        except OSError as error:
            return error.errno == errno.ENXIO
