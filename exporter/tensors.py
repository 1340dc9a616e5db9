"""Lazy tensors: a weight's shape, dtype and where its elements lie, without a byte of it in memory.

A lazy tensor holds no open file, so it can be pickled and read by any thread or process. Its elements come in order
(row-major), in blocks of at most :data:`BLOCK_BYTES`, so that the memory of an export is bounded by a few blocks and
not by a tensor.
"""

from __future__ import annotations

import bisect
import enum
import functools
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from isal import isal_zlib

from exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 2 * 1024 * 1024
"""The most bytes that are read at once: what is done with them then finds them in the processor's cache."""

MAX_OPEN_FILES = 16
"""The most source files that one reader holds open: many ranks times many threads are more than a process may have."""

SAMPLE_ELEMENTS = 4096
"""The most elements by which :func:`start_alike` compares."""


class DType(enum.Enum):
    """A tensor's element type: the member's name is safetensors', its value torch's."""

    F64 = "float64"
    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"
    F8_E4M3 = "float8_e4m3fn"
    F8_E5M2 = "float8_e5m2"
    I64 = "int64"
    I32 = "int32"
    I16 = "int16"
    I8 = "int8"
    U64 = "uint64"
    U32 = "uint32"
    U16 = "uint16"
    U8 = "uint8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]

    @property
    def is_floating(self) -> bool:
        return self.value.startswith(("float", "bfloat"))

    @property
    def torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


_ITEMSIZE = {
    dtype: 1 if dtype is DType.BOOL or dtype.name.startswith("F8") else int(dtype.name.lstrip("BFIU")) // 8
    for dtype in DType
}


@dataclass(frozen=True)
class Member:
    """A region of a file that carries its own checksum: one entry of a zip archive.

    ``offset`` and ``nbytes`` are in bytes; ``crc32`` is None where the archive was written without checksums.
    """

    path: Path
    offset: int
    nbytes: int
    crc32: int | None


@dataclass(frozen=True)
class Piece:
    """``nbytes`` bytes of a file from byte ``offset`` on, and their CRC-32."""

    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class Extent:
    """``numel`` consecutive little-endian elements of ``dtype`` at byte ``offset`` of ``path``."""

    path: Path
    offset: int
    dtype: DType
    numel: int
    member: Member | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def part(self, start: int, stop: int) -> Extent:
        """Elements ``start`` to ``stop`` of this extent."""
        return Extent(self.path, self.offset + start * self.dtype.itemsize, self.dtype, stop - start, self.member)


@dataclass(frozen=True)
class Vector:
    """Extents joined to one long vector, of which any part can be had in logarithmic time."""

    extents: tuple[Extent, ...]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(extent.numel for extent in self.extents))

    @functools.cached_property
    def paths(self) -> frozenset[Path]:
        """The files of all extents."""
        return frozenset(extent.path for extent in self.extents)

    @property
    def numel(self) -> int:
        """Number of elements of all extents."""
        return self._ends[-1] if self.extents else 0

    def cut(self, start: int, stop: int) -> tuple[Extent, ...]:
        """Elements ``start`` to ``stop``, or to the end where that comes first."""
        parts = []
        for index in range(bisect.bisect_right(self._ends, start), len(self.extents)):
            extent = self.extents[index]
            position = self._ends[index] - extent.numel
            if position >= stop:
                break
            first, last = max(start - position, 0), min(stop - position, extent.numel)
            if first < last:
                parts.append(extent.part(first, last))
        return tuple(parts)


class LazyTensor(ABC):
    """A weight that is read when it is written, and not before."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements, in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def kept_dtype(self) -> DType:
        """The dtype in which ``--dtype keep`` writes it: for a computed tensor, that of what it was computed from."""
        return self.dtype

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        """The tensors that this one is computed from; none where its elements lie in files."""
        return ()

    @property
    def paths(self) -> frozenset[Path]:
        """The files that the elements are read from."""
        return frozenset().union(*(source.paths for source in self.sources))

    @abstractmethod
    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        """The elements in order, as one-dimensional tensors of ``dtype``.

        A block is valid until the next one is asked for.
        """

    def parts(self, numel: int) -> Iterator[LazyTensor]:
        """This tensor cut into consecutive ones of at most ``numel`` elements, or itself where it cannot be cut."""
        yield self


@dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A tensor whose elements are those of its extents, one extent after the other."""

    shape: tuple[int, ...]
    dtype: DType
    extents: tuple[Extent, ...]

    @property
    def paths(self) -> frozenset[Path]:
        return Vector(self.extents).paths

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        for extent in self.extents:
            yield from files.blocks(extent)

    def parts(self, numel: int) -> Iterator[LazyTensor]:
        if self.numel <= numel:
            yield self
            return
        vector = Vector(self.extents)
        for start in range(0, self.numel, numel):
            stop = min(start + numel, self.numel)
            yield StoredTensor((stop - start,), self.dtype, vector.cut(start, stop))

    def slice(self, start: int, shape: tuple[int, ...]) -> StoredTensor:
        """The tensor of ``shape`` whose first element is this one's element ``start``."""
        return StoredTensor(shape, self.dtype, Vector(self.extents).cut(start, start + math.prod(shape)))


@dataclass(frozen=True)
class StridedTensor(LazyTensor):
    """A view of a storage whose elements do not lie in row-major order, such as a saved transpose."""

    shape: tuple[int, ...]
    dtype: DType
    storage: Extent
    stride: tuple[int, ...]

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset([self.storage.path])

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        import torch

        if not self.numel:
            return
        for _ in files.blocks(self.storage):
            pass  # in the order of the file, for its checksum
        view = torch.as_strided(_mapped(self.storage), self.shape or (1,), self.stride or (1,))
        rows = max(BLOCK_BYTES // (view[:1].numel() * self.dtype.itemsize), 1)
        for part in view.split(rows):
            yield from part.flatten().split(BLOCK_BYTES // self.dtype.itemsize)


def _mapped(extent: Extent) -> torch.Tensor:
    """The elements of ``extent``, one-dimensional, mapped from the file: they are read where they are asked for.

    Raises:
        CheckpointError: the file cannot be mapped.
    """
    import numpy
    import torch

    try:
        mapped = numpy.memmap(extent.path, numpy.uint8, "c", extent.offset, (extent.nbytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{extent.path.name} cannot be mapped into memory: {error}.",
            "Copy it to a local disk, or save it again with contiguous tensors.",
        ) from error
    return torch.from_numpy(mapped).view(extent.dtype.torch)


@dataclass(frozen=True)
class GrownTensor(LazyTensor):
    """A matrix with rows added at the end, each of them the mean of the old rows.

    The old rows keep their bits. The mean is summed in float64 and rounded to float32 once, so that it does not
    depend on the order of the sum.
    """

    shape: tuple[int, ...]
    dtype: DType
    base: LazyTensor

    @property
    def kept_dtype(self) -> DType:
        return self.base.kept_dtype

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        return (self.base,)

    @property
    def added(self) -> MeanRows:
        """The new rows alone."""
        return MeanRows((self.shape[0] - self.base.shape[0], *self.shape[1:]), self.dtype, self.base)

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        yield from self.base.blocks(files)
        yield from self.added.blocks(files)

    def parts(self, numel: int) -> Iterator[LazyTensor]:
        yield from self.base.parts(numel)
        yield self.added


@dataclass(frozen=True)
class MeanRows(LazyTensor):
    """Rows that are each the mean of the rows of ``base``."""

    shape: tuple[int, ...]
    dtype: DType
    base: LazyTensor

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        return (self.base,)

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        mean = self._mean(files).to(self.dtype.torch)
        for _ in range(self.shape[0]):
            yield mean

    def _mean(self, files: SourceFiles) -> torch.Tensor:
        import torch

        width = math.prod(self.shape[1:])
        total = torch.zeros(width, dtype=torch.float64)
        column = 0
        for block in self.base.blocks(files):
            for piece in _row_pieces(block, column, width):
                rows = piece.to(torch.float64).reshape(-1, min(width, piece.numel()))
                start = column % width
                total[start : start + rows.shape[1]] += rows.sum(dim=0)
                column += piece.numel()
        return (total / self.base.shape[0]).to(torch.float32)


def _row_pieces(block: torch.Tensor, position: int, width: int) -> Sequence[torch.Tensor]:
    """``block`` cut into the rest of a started row, whole rows, and the start of a row."""
    head = min(-position % width, block.numel())
    body = (block.numel() - head) // width * width
    return [piece for piece in block.split([head, body, block.numel() - head - body]) if piece.numel()]


@dataclass
class SourceFiles:
    """The source files that one reader holds open, the last :data:`MAX_OPEN_FILES`, and the buffer that it reads into.

    ``pieces`` are the checksums of what was read of each archive member that has one, unless ``checksums`` is False.
    """

    checksums: bool = True
    pieces: dict[Member, set[Piece]] = field(default_factory=dict)
    _descriptors: dict[Path, int] = field(default_factory=dict)
    _buffer: torch.Tensor | None = None

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def blocks(self, extent: Extent) -> Iterator[torch.Tensor]:
        """The elements of ``extent``, at most :data:`BLOCK_BYTES` at once, each block in the same reused buffer."""
        import torch

        if self._buffer is None:
            self._buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        view = memoryview(self._buffer.numpy())
        has_checksum = self.checksums and extent.member is not None and extent.member.crc32 is not None
        position = crc = 0
        while position < extent.nbytes:
            count = min(BLOCK_BYTES, extent.nbytes - position)
            self._read(extent.path, extent.offset + position, view[:count])
            if has_checksum:
                crc = isal_zlib.crc32(view[:count], crc)
            yield self._buffer[:count].view(extent.dtype.torch)
            position += count
        if has_checksum and extent.member is not None:
            self.pieces.setdefault(extent.member, set()).add(Piece(extent.offset, extent.nbytes, crc))

    def _read(self, path: Path, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor(path), [into[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{path.name} cannot be read at byte {offset + done}: {error.strerror}",
                    "Check the disk that holds the checkpoint, or copy the file again.",
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{path.name} ends at byte {offset + done}, but a weight should go on to byte {offset + len(into)}",
                    "The file was cut short while it was read: copy it again.",
                )
            done += count

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[path]


def is_same(tensor: LazyTensor, other: LazyTensor | None) -> bool:
    """Whether both have the same elements, bit for bit, in the same dtype."""
    if tensor == other:
        return True
    if other is None or (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        return False
    with SourceFiles() as mine, SourceFiles() as theirs:
        return same_bits(tensor.blocks(mine), other.blocks(theirs))


def same_bits(first: Iterator[torch.Tensor], second: Iterator[torch.Tensor]) -> bool:
    """Whether two streams of blocks hold the same bytes, wherever the borders of their blocks are."""
    import torch

    nothing = torch.empty(0, dtype=torch.uint8)
    mine = theirs = nothing
    while True:
        mine = mine if mine.numel() else bits(next(first, nothing))
        theirs = theirs if theirs.numel() else bits(next(second, nothing))
        count = min(mine.numel(), theirs.numel())
        if count == 0:
            return bool(mine.numel() == theirs.numel())
        if not are_equal(mine[:count], theirs[:count]):
            return False
        mine, theirs = mine[count:], theirs[count:]


def bits(block: torch.Tensor) -> torch.Tensor:
    """The bytes of a block, as uint8."""
    import torch

    return block.contiguous().view(torch.uint8)


def are_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two blocks hold the same bytes. NumPy looks at many of them at a time, torch.equal at one."""
    import numpy

    return numpy.array_equal(bits(first).numpy(), bits(second).numpy())


def start_alike(master: LazyTensor, copy: LazyTensor) -> bool:
    """Whether the first elements of ``master``, cast to the dtype of ``copy``, are bit for bit those of ``copy``.

    As many are compared as both have, at most :data:`SAMPLE_ELEMENTS`.
    """
    count = min(master.numel, copy.numel, SAMPLE_ELEMENTS)
    return are_equal(_first(master, count).to(copy.dtype.torch), _first(copy, count))


def _first(tensor: LazyTensor, count: int) -> torch.Tensor:
    """The first ``count`` elements."""
    import torch

    blocks = [torch.empty(0, dtype=tensor.dtype.torch)]
    with SourceFiles() as files:
        for block in tensor.blocks(files) if count else ():
            blocks.append(block[:count].clone())
            count -= len(blocks[-1])
            if not count:
                break
    return torch.cat(blocks)
