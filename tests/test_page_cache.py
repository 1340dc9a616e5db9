"""What an export brings into the page cache, and what it leaves there, as the system itself counts."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic import Model, write_pretrained
from exporter.page_cache import find_uncached, read_ahead, release
from exporter.tensors import DType, Extent, StoredTensor

SIZE = 64 * 1024 * 1024
PAGES = SIZE // mmap.PAGESIZE


@pytest.fixture
def tensor(tmp_path: Path) -> StoredTensor:
    """A tensor in a file of its own, which is not in the page cache."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    drop(path)
    return StoredTensor((SIZE // 4,), DType.F32, (Extent(path, 0, DType.F32, SIZE // 4),))


def drop(path: Path) -> None:
    """Put a file onto the disk, and out of the page cache. Where that is all there is, there is nothing to be seen."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path):
        pytest.skip("Temporary files lie in memory, which has no page cache: set TMPDIR to a folder on a disk.")


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as content:
        pages = (ctypes.c_ubyte * -(-len(content) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(content)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(content)), pages)
        del start
    assert not failed
    return sum(page & 1 for page in pages)


def test_what_is_read_ahead_is_there_before_anybody_reads_it(tensor: StoredTensor) -> None:
    (path,) = tensor.paths
    read_ahead([tensor])
    deadline = time.monotonic() + 10
    while cached_pages(path) < PAGES:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_fetched_is_given_back_and_what_was_there_stays(tensor: StoredTensor) -> None:
    (path,) = tensor.paths
    uncached = find_uncached([tensor])
    assert uncached == {path}
    path.read_bytes()
    assert find_uncached([tensor]) == frozenset()
    release([tensor], frozenset())
    assert cached_pages(path) == PAGES
    release([tensor], uncached)
    assert cached_pages(path) == 0


def test_a_checkpoint_is_in_the_page_cache_after_an_export_if_it_was_before(
    export: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.preparation.read_ahead", lambda tensors: None)
    checkpoint, path = tmp_path / "checkpoint", tmp_path / "checkpoint" / "model.safetensors"
    write_pretrained(checkpoint, Model(hidden=256, intermediate=512, layers=1, vocabulary=1024))
    pages = cached_pages(path)
    export(checkpoint, dtype="bf16")
    assert cached_pages(path) == pages
    drop(path)
    export(checkpoint, dtype="bf16")
    assert cached_pages(path) < pages / 4
