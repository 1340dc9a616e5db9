"""Tensors in chunks: numpy cuts them, and what is read must be the whole again, in blocks of bounded size."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import tensors
from exporter.checkpoints import chunks
from exporter.checkpoints.chunks import Chunk, join_chunks
from exporter.tensors import DType, Extent, SourceFiles, StoredTensor


def cut(whole: np.ndarray, borders: list[list[int]], path: Path) -> list[Chunk]:
    """The cells of a grid with these inner borders, the last cell first, one after the other in a file."""
    ends = [
        sorted({0, *(border for border in inner if border <= size), size})
        for size, inner in zip(whole.shape, borders, strict=True)
    ]
    cells = []
    with path.open("wb") as file:
        for cell in reversed(list(itertools.product(*(itertools.pairwise(end) for end in ends)))):
            values = np.ascontiguousarray(whole[tuple(slice(*side) for side in cell)])
            extent = Extent(path, file.tell(), DType.I32, values.size)
            file.write(values.tobytes())
            cells.append(Chunk(tuple(side[0] for side in cell), StoredTensor(values.shape, DType.I32, (extent,))))
    return cells


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    return shape, [draw(st.lists(st.integers(1, 6), max_size=3)) for _ in shape]


@given(grid=grids(), block_elements=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_a_grid_of_chunks_is_read_in_order_in_bounded_blocks(
    grid: tuple[list[int], list[list[int]]], block_elements: int
) -> None:
    shape, borders = grid
    whole = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (chunks, tensors):
            patch.setattr(module, "BLOCK_BYTES", 4 * block_elements)
        tensor = join_chunks(tuple(shape), DType.I32, cut(whole, borders, Path(folder, "chunks")))
        with SourceFiles() as files:
            blocks = [block.clone() for block in tensor.blocks(files)]
    assert torch.equal(torch.cat(blocks), torch.from_numpy(whole.reshape(-1)))
    assert max(block.numel() for block in blocks) <= block_elements


def test_chunks_of_whole_rows_become_a_stored_tensor(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.int32).reshape(6, 4)
    assert type(join_chunks((6, 4), DType.I32, cut(whole, [[2, 5], []], tmp_path / "rows"))) is StoredTensor


@given(grid=grids(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_hole_or_an_overlap_is_refused(grid: tuple[list[int], list[list[int]]], data: st.DataObject) -> None:
    shape, borders = grid
    whole = np.zeros(shape, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        cells = cut(whole, borders, Path(folder, "chunks"))
    index = data.draw(st.integers(0, len(cells) - 1))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    offsets, stored = cells[index].offsets, cells[index].tensor
    moved = tuple(at + (axis == dimension) for axis, at in enumerate(offsets))
    longer = tuple(size + (axis == dimension) for axis, size in enumerate(stored.shape))
    others = cells[:index] + cells[index + 1 :]
    for damaged in (
        others,
        [*cells, cells[index]],
        [*others, Chunk(moved, stored)],
        [*others, Chunk(offsets, StoredTensor(longer, DType.I32, stored.extents))],
    ):
        with pytest.raises(ValueError, match="chunk"):
            join_chunks(tuple(shape), DType.I32, damaged)


def test_a_scalar_is_one_chunk_and_no_elements_are_none(tmp_path: Path) -> None:
    (chunk,) = cut(np.zeros(1, dtype=np.int32), [[]], tmp_path / "one")
    scalar = Chunk((), StoredTensor((), DType.I32, chunk.tensor.extents))
    assert join_chunks((), DType.I32, [scalar]).numel == 1
    assert join_chunks((3, 0), DType.I32, []).numel == 0
    for wrong in ([], [scalar, scalar]):
        with pytest.raises(ValueError, match="chunk"):
            join_chunks((), DType.I32, wrong)
