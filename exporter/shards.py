"""Writing a shard: batches of its tensors side by side, each block read, cast, checked and written at its place.

The memory is that of a few blocks for each worker, whatever the size of a tensor. The digest is that of the bytes which
the file gives back, taken in their order while later batches are still written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from isal import isal_zlib

from exporter.errors import OutputError, VerificationError
from exporter.plan import PlannedTensor, Shard
from exporter.tensors import BLOCK_BYTES, Member, Piece, SourceFiles

if TYPE_CHECKING:
    import torch

BATCH_BYTES = 32 * 1024 * 1024
"""About what one worker writes at a time."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were written, checked or sent since the last call."""


def uncounted(size: int) -> None:
    """Progress that nobody is shown."""


@dataclass(frozen=True)
class WrittenFile:
    """A finished file of the export: its name in the folder, its size in bytes, its sha256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class NonFinite:
    """How many elements of a tensor are not finite in the source, and how many became so in the cast."""

    source: int = 0
    cast: int = 0


@dataclass(frozen=True)
class WrittenShard:
    """A shard on disk, its tensors that hold values which are not finite, and the checksums of what was read."""

    file: WrittenFile
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)
    pieces: dict[Member, set[Piece]] = field(default_factory=dict)


@dataclass(frozen=True)
class Portion:
    """Consecutive elements of a tensor: ``tensor`` has these alone, ``start`` is the number of those before them."""

    tensor: PlannedTensor
    start: int


@dataclass(frozen=True)
class Batch:
    """Portions that lie one after the other in the file, from byte ``offset`` on."""

    offset: int
    portions: tuple[Portion, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return sum(portion.tensor.nbytes for portion in self.portions)


def block_workers(count: int | None) -> ThreadPoolExecutor:
    """``count`` threads (None: a few more than cores) for work on blocks.

    Blocks are small and lie side by side: torch's own threads would only wait for one another.
    """
    import torch

    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def batches(shard: Shard) -> Iterator[Batch]:
    """All of the shard's data, cut into batches of at most :data:`BATCH_BYTES` wherever a tensor can be cut."""
    offset, size = len(shard.header), 0
    portions: list[Portion] = []
    for portion in _portions(shard):
        if portions and size + portion.tensor.nbytes > BATCH_BYTES:
            yield Batch(offset, tuple(portions))
            offset, size, portions = offset + size, 0, []
        portions.append(portion)
        size += portion.tensor.nbytes
    if portions:
        yield Batch(offset, tuple(portions))


def _portions(shard: Shard) -> Iterator[Portion]:
    for tensor in shard.tensors:
        start = 0
        for part in tensor.source.parts(BATCH_BYTES // tensor.dtype.itemsize):
            yield Portion(replace(tensor, source=part), start)
            start += part.numel


def write_shard(
    shard: Shard, folder: Path, workers: Executor, progress: Progress, finish: Callable[[Batch], None]
) -> WrittenShard:
    """Write ``shard`` into ``folder``, flushed to the disk; ``workers`` write its batches, and ``finish`` each of them.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the disk does not take the file.
        VerificationError: the file does not give back what was written, or as ``finish`` raises it.
    """
    nonfinite: dict[str, NonFinite] = {}
    pieces: dict[Member, set[Piece]] = {}
    header = shard.header
    with _create(folder / shard.name) as output:
        _resize(output, shard.name, shard.size)
        _write(output, shard.name, memoryview(header), 0)
        with (folder / shard.name).open("rb", buffering=0) as file:
            digest = hashlib.sha256()
            _read_back(file, shard.name, len(header), isal_zlib.crc32(header), digest)
            with _submitted(workers, shard, output, progress, finish) as futures:
                for future in futures:
                    written = future.result()
                    _read_back(file, shard.name, written.nbytes, written.crc32, digest)
                    _merge(written, nonfinite, pieces)
        _sync(output, shard.name)
    return WrittenShard(WrittenFile(shard.name, shard.size, digest.hexdigest()), nonfinite, pieces)


@contextmanager
def _submitted(
    workers: Executor, shard: Shard, output: int, progress: Progress, finish: Callable[[Batch], None]
) -> Iterator[list[Future[_WrittenBatch]]]:
    """The batches being written. None of them is at work any more at the end, when ``output`` may be closed."""
    futures: list[Future[_WrittenBatch]] = []
    try:
        for batch in batches(shard):
            futures.append(workers.submit(_write_batch, batch, shard.name, output, progress, finish))
        yield futures
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@dataclass(frozen=True)
class _WrittenBatch:
    """What is known of a batch in the file; ``crc32`` is that of the bytes that were handed to the disk."""

    nbytes: int
    crc32: int
    nonfinite: dict[str, NonFinite]
    pieces: dict[Member, set[Piece]]


def _write_batch(
    batch: Batch, name: str, output: int, progress: Progress, finish: Callable[[Batch], None]
) -> _WrittenBatch:
    nonfinite: dict[str, NonFinite] = {}
    crc, position = 0, batch.offset
    with SourceFiles() as files:
        for block in _pieces(batch, files, nonfinite):
            _write(output, name, block, position)
            crc = isal_zlib.crc32(block, crc)
            position += len(block)
            progress(len(block))
    if hasattr(os, "posix_fadvise"):
        # Linux takes it as the sign to begin with the writing; the final flush then finds little left to do.
        os.posix_fadvise(output, batch.offset, position - batch.offset, os.POSIX_FADV_DONTNEED)
    finish(batch)
    return _WrittenBatch(position - batch.offset, crc, nonfinite, files.pieces)


def _read_back(file: BinaryIO, name: str, nbytes: int, crc32: int, digest: hashlib._Hash) -> None:
    """Hash the next ``nbytes`` of ``file``, which must have the checksum of what was written."""
    crc = 0
    try:
        while nbytes and (block := file.read(min(nbytes, BLOCK_BYTES))):
            crc = isal_zlib.crc32(block, crc)
            digest.update(block)
            nbytes -= len(block)
    except OSError as error:
        raise VerificationError(f"{name} cannot be read: {error.strerror}.", DISK_HINT) from error
    if nbytes or crc != crc32:
        raise VerificationError(f"{name} does not give back the bytes that were written to it.", DISK_HINT)


DISK_HINT = "Do not use this export. Check the disk, and export again."


def _merge(written: _WrittenBatch, nonfinite: dict[str, NonFinite], pieces: dict[Member, set[Piece]]) -> None:
    for name, count in written.nonfinite.items():
        before = nonfinite.get(name, NonFinite())
        nonfinite[name] = NonFinite(before.source + count.source, before.cast + count.cast)
    for member, read in written.pieces.items():
        pieces.setdefault(member, set()).update(read)


def write_file(name: str, content: bytes, folder: Path) -> WrittenFile:
    """Write a small file into ``folder``, flushed to the disk."""
    with _create(folder / name) as output:
        _write(output, name, memoryview(content), 0)
        _sync(output, name)
    return WrittenFile(name, len(content), hashlib.sha256(content).hexdigest())


def cast_blocks(tensor: PlannedTensor, files: SourceFiles) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensor's blocks as they are in the source and as they are written, side by side.

    Where the dtype does not change, both are the same tensor and no bit is touched. Else torch's own rounding (to
    nearest, ties to even) casts the block. A pair is valid until the next one is asked for.
    """
    import torch

    target = tensor.dtype.torch
    buffer = torch.empty(0, dtype=target)
    for block in tensor.source.blocks(files):
        if block.dtype is target:
            yield block, block
            continue
        if buffer.numel() < block.numel():
            buffer = torch.empty(block.numel(), dtype=target)
        yield block, buffer[: block.numel()].copy_(block)


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a one-dimensional contiguous tensor, without a copy."""
    import torch

    return memoryview(block.contiguous().view(torch.uint8).numpy())


def _pieces(batch: Batch, files: SourceFiles, nonfinite: dict[str, NonFinite]) -> Iterator[memoryview]:
    for tensor in (portion.tensor for portion in batch.portions):
        source = cast = 0
        for block, written in cast_blocks(tensor, files):
            # No cast makes a value finite that was not, so that one look is enough where all is well.
            if written.dtype.is_floating_point and (in_written := _count_nonfinite(written)):
                in_source = _count_nonfinite(block)
                source += in_source
                cast += in_written - in_source
            yield as_bytes(written)
        if source or cast:
            nonfinite[tensor.name] = NonFinite(source, cast)


def _count_nonfinite(block: torch.Tensor) -> int:
    """Number of elements that are NaN or infinite."""
    import torch

    if block.dtype.itemsize == 1:
        block = block.to(torch.float32)
    # A sum is finite only if every element is, and costs a fraction of a test of each.
    if torch.isfinite(block.sum(dtype=torch.float64 if block.dtype is torch.float64 else torch.float32)):
        return 0
    return int(block.numel() - torch.isfinite(block).sum())


@contextmanager
def _create(path: Path) -> Iterator[int]:
    """The descriptor of a new file, mode 0644 less the umask."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _refused(path.name, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _resize(descriptor: int, name: str, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise _refused(name, error) from error


def _write(descriptor: int, name: str, content: memoryview, offset: int) -> None:
    done = 0
    try:
        while done < len(content):
            done += os.pwrite(descriptor, content[done:], offset + done)
    except OSError as error:
        raise _refused(name, error) from error


def _sync(descriptor: int, name: str) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _refused(name, error) from error


def _refused(name: str, error: OSError) -> OutputError:
    return OutputError(
        f"{name} cannot be written: {error.strerror}.", "Make room, or name another place with --output_folder."
    )
