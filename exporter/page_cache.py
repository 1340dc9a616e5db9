"""The page cache: what is fetched before it is read, and given back when it is done with.

What an export brings in of the checkpoint goes out again, but for what was read ahead; what was there before stays. A
checkpoint may be larger than the memory, and would push out what others read; and to find new memory for every block
can take the system longer than the reading. All of this is advice: no system has to follow it, and a file that cannot
be opened is left to its reader to report.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from pathlib import Path

from exporter.tensors import Extent, LazyTensor, StoredTensor, StridedTensor

READ_AHEAD_BYTES = 2 * 1024**3
"""About what a disk gives while the libraries are imported."""

STEP_BYTES = 128 * 1024
"""Linux fetches no more for one advice than a disk's own read-ahead, which is seldom less than this."""


def read_ahead(tensors: Collection[LazyTensor]) -> None:
    """Let the system fetch the first :data:`READ_AHEAD_BYTES` of ``tensors`` that are not there, and do not wait."""
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_read_ahead, args=(tensors,), daemon=True).start()


def _read_ahead(tensors: Collection[LazyTensor]) -> None:
    left = READ_AHEAD_BYTES
    for extent in _extents_in(tensors, find_uncached(tensors)):
        with contextlib.suppress(OSError), extent.path.open("rb") as file:
            for start in range(0, min(extent.nbytes, left), STEP_BYTES):
                os.posix_fadvise(file.fileno(), extent.offset + start, STEP_BYTES, os.POSIX_FADV_WILLNEED)
        left -= max(extent.nbytes, STEP_BYTES)
        if left <= 0:
            return


def find_uncached(tensors: Iterable[LazyTensor]) -> frozenset[Path]:
    """The files of which less than half of what ``tensors`` have there is in the page cache, judged by samples."""
    places: dict[Path, list[int]] = {}
    for extent in _extents(tensors):
        places.setdefault(extent.path, []).append(extent.offset + extent.nbytes // 2)
    return frozenset(path for path, sampled in places.items() if 2 * _count_cached(path, sampled) < len(sampled))


def _count_cached(path: Path, places: Sequence[int]) -> int:
    """How many of the bytes at ``places`` are in the page cache; all of them where the system does not tell."""
    count = 0
    try:
        mincore = ctypes.CDLL(None).mincore
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
            first, page = ctypes.c_char.from_buffer(content), ctypes.c_ubyte()
            for place in places:
                start = ctypes.addressof(first) + place // mmap.PAGESIZE * mmap.PAGESIZE
                if mincore(ctypes.c_void_p(start), ctypes.c_size_t(1), ctypes.byref(page)) == 0:
                    count += page.value & 1
            del first
    except (OSError, ValueError, AttributeError):
        return len(places)
    return count


def release(tensors: Iterable[LazyTensor], files: Set[Path]) -> None:
    """Let the system take back the pages of ``tensors`` in ``files``, which are done with."""
    if hasattr(os, "posix_fadvise"):
        for extent in _extents_in(tensors, files):
            with contextlib.suppress(OSError), extent.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)


def _extents_in(tensors: Iterable[LazyTensor], files: Set[Path]) -> Iterator[Extent]:
    return (extent for extent in _extents(tensors) if extent.path in files)


def _extents(tensors: Iterable[LazyTensor]) -> Iterator[Extent]:
    """Where the elements of ``tensors``, or of those that they are computed from, lie."""
    for tensor in tensors:
        match tensor:
            case StoredTensor():
                yield from tensor.extents
            case StridedTensor():
                yield tensor.storage
            case _:
                yield from _extents(tensor.sources)
