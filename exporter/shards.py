"""Writing a shard: one pass over its tensors, each block read, cast, checked, written and hashed.

The memory is that of two blocks, whatever the size of the tensor. The digest is known when the last byte is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import OutputError
from exporter.plan import PlannedTensor, Shard
from exporter.tensors import Member, Piece, SourceFiles

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]
"""Called with the number of bytes that were written since the last call."""


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


def write_shard(shard: Shard, folder: Path, progress: Progress) -> WrittenShard:
    """Write ``shard`` into ``folder``, flushed to the disk.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the disk does not take the file.
    """
    digest = hashlib.sha256()
    nonfinite: dict[str, NonFinite] = {}
    with SourceFiles() as files, _create(folder / shard.name) as output:
        for piece in _pieces(shard, files, nonfinite):
            _write(output, shard.name, piece)
            digest.update(piece)
            progress(len(piece))
        _sync(output, shard.name)
    return WrittenShard(WrittenFile(shard.name, shard.size, digest.hexdigest()), nonfinite, files.pieces)


def write_file(name: str, content: bytes, folder: Path) -> WrittenFile:
    """Write a small file into ``folder``, flushed to the disk."""
    with _create(folder / name) as output:
        _write(output, name, memoryview(content))
        _sync(output, name)
    return WrittenFile(name, len(content), hashlib.sha256(content).hexdigest())


def cast_blocks(tensor: PlannedTensor, files: SourceFiles) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensor's blocks as they are in the source and as they are written, side by side.

    Where the dtype does not change, both are the same tensor and no bit is touched. Else torch's own rounding (to
    nearest, ties to even) casts the block.
    """
    for block in tensor.source.blocks(files):
        yield block, block if block.dtype is tensor.dtype.torch else block.to(tensor.dtype.torch)


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a one-dimensional contiguous tensor, without a copy."""
    import torch

    return memoryview(block.contiguous().view(torch.uint8).numpy())


def _pieces(shard: Shard, files: SourceFiles, nonfinite: dict[str, NonFinite]) -> Iterator[memoryview]:
    yield memoryview(shard.header)
    for tensor in shard.tensors:
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


def _write(descriptor: int, name: str, content: memoryview) -> None:
    done = 0
    try:
        while done < len(content):
            done += os.write(descriptor, content[done:])
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
