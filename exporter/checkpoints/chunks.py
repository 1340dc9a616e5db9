"""Tensors that were cut into boxes: whether the boxes make up the tensor, and its elements in order."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.tensors import BLOCK_BYTES, DType, Extent, LazyTensor, SourceFiles, StoredTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: the index of its first element in each dimension, and its elements, in one extent."""

    offsets: tuple[int, ...]
    tensor: StoredTensor

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.tensor.shape[1:]

    def rows(self, start: int, stop: int) -> StoredTensor:
        """The part of this chunk in rows ``start`` to ``stop`` of the whole tensor, all of which the chunk has."""
        first = (start - self.offsets[0]) * math.prod(self.row_shape)
        return self.tensor.slice(first, (stop - start, *self.row_shape))

    def in_row(self, row: int) -> Chunk:
        """The part of this chunk in one row of the whole tensor, as a chunk of that row."""
        return Chunk(self.offsets[1:], replace(self.rows(row, row + 1), shape=self.row_shape))


@dataclass(frozen=True)
class ChunkedTensor(LazyTensor):
    """A tensor whose chunks lie in ``bands``, from its first row on: those of one band have the same rows.

    Rows of a band are put together in memory, as many at once as a block holds. A row larger than a block is itself a
    tensor in chunks.
    """

    shape: tuple[int, ...]
    dtype: DType
    bands: tuple[tuple[Chunk, ...], ...]

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset(extent.path for extent in self.extents)

    @property
    def extents(self) -> Iterator[Extent]:
        """Where the chunks lie: not in the order of the elements."""
        return (extent for band in self.bands for chunk in band for extent in chunk.tensor.extents)

    @property
    def rows_at_once(self) -> int:
        """Number of rows that a block holds."""
        return BLOCK_BYTES // (math.prod(self.shape[1:]) * self.dtype.itemsize)

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        for band in self.bands:
            start = band[0].offsets[0]
            stop = start + band[0].tensor.shape[0]
            if len(band) == 1:
                yield from band[0].tensor.blocks(files)
            elif self.rows_at_once:
                yield from self._whole_rows(band, start, stop, files)
            else:
                for row in range(start, stop):
                    chunks = [chunk.in_row(row) for chunk in band]
                    yield from join_chunks(self.shape[1:], self.dtype, chunks).blocks(files)

    def _whole_rows(self, band: Sequence[Chunk], start: int, stop: int, files: SourceFiles) -> Iterator[torch.Tensor]:
        import torch

        rows = torch.empty((min(self.rows_at_once, stop - start), *self.shape[1:]), dtype=self.dtype.torch)
        for first in range(start, stop, len(rows)):
            last = min(first + len(rows), stop)
            for chunk in band:
                part = chunk.rows(first, last)
                columns = (slice(at, at + size) for at, size in zip(chunk.offsets[1:], chunk.row_shape, strict=True))
                (block,) = part.blocks(files)
                rows[(slice(last - first), *columns)] = block.view(part.shape)
            yield rows[: last - first].flatten()


def join_chunks(shape: tuple[int, ...], dtype: DType, chunks: Iterable[Chunk]) -> StoredTensor | ChunkedTensor:
    """The tensor of ``shape`` that the chunks make up; chunks without elements do not count.

    Raises:
        ValueError: they leave a hole, overlap, or are not cut along whole rows first.
    """
    filled = [chunk for chunk in chunks if chunk.tensor.numel]
    numel: int = math.prod(shape)
    if shape and numel:
        bands = _bands(shape, filled, 0)
    elif len(filled) == numel:
        bands = tuple((chunk,) for chunk in filled)
    else:
        raise ValueError(f"{len(filled)} chunks have elements, expected {numel}")
    if any(len(band) > 1 for band in bands):
        return ChunkedTensor(shape, dtype, bands)
    return StoredTensor(shape, dtype, tuple(extent for (chunk,) in bands for extent in chunk.tensor.extents))


def _bands(shape: tuple[int, ...], chunks: Iterable[Chunk], dimension: int) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks by their range in ``dimension``; the ranges, and within each the further ones, make up the shape."""
    ranges: dict[tuple[int, int], list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        start = chunk.offsets[dimension]
        ranges[start, start + chunk.tensor.shape[dimension]].append(chunk)
    end, bands = 0, []
    for (start, stop), band in sorted(ranges.items(), key=lambda entry: entry[0]):
        if start != end:
            raise ValueError(f"in dimension {dimension} a chunk begins at {start}, expected {end}")
        if dimension + 1 < len(shape):
            _bands(shape, band, dimension + 1)
        elif len(band) > 1:
            raise ValueError(f"{len(band)} chunks lie at {list(band[0].offsets)}")
        end = stop
        bands.append(tuple(band))
    if end != shape[dimension]:
        raise ValueError(f"in dimension {dimension} the chunks end at {end}, expected {shape[dimension]}")
    return tuple(bands)
