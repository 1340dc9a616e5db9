"""Lazy tensors give the elements that torch and the safetensors library give, whatever the size of a block."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exporter import tensors
from exporter.checkpoints.torch_file import read_torch_file
from exporter.errors import CheckpointError
from exporter.tensors import (
    MAX_OPEN_FILES,
    DType,
    Extent,
    GrownTensor,
    LazyTensor,
    SourceFiles,
    StoredTensor,
    StridedTensor,
    Vector,
    is_same,
    start_alike,
)

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BLOCK)


def store(path: Path, tensor: torch.Tensor, cuts: Sequence[int] = ()) -> StoredTensor:
    """``tensor`` in a file, in extents that end at the elements ``cuts``, with a gap before each."""
    dtype = next(dtype for dtype in DType if dtype.torch is tensor.dtype)
    flat, extents = tensor.contiguous().reshape(-1), []
    borders = [0, *cuts, tensor.numel()]
    with path.open("wb") as file:
        for start, stop in itertools.pairwise(borders):
            file.write(b"\xff" * 3)
            extents.append(Extent(path, file.tell(), dtype, stop - start))
            file.write(flat[start:stop].view(torch.uint8).numpy().tobytes())
    return StoredTensor(tuple(tensor.shape), dtype, tuple(extents))


def read(tensor: LazyTensor) -> torch.Tensor:
    with SourceFiles() as files:
        blocks = [block.clone() for block in tensor.blocks(files)]
    assert all(block.dim() == 1 and block.dtype is tensor.dtype.torch for block in blocks)
    return torch.cat([torch.empty(0, dtype=tensor.dtype.torch), *blocks]).reshape(tensor.shape)


@pytest.mark.parametrize("dtype", DType)
def test_a_dtype_has_the_size_that_torch_and_safetensors_give_it(dtype: DType, tmp_path: Path) -> None:
    value = torch.zeros(3, dtype=dtype.torch)
    assert dtype.itemsize == value.itemsize
    assert dtype.is_floating == value.is_floating_point()
    save_file({"x": value}, tmp_path / "x")
    assert f'"dtype":"{dtype.name}"'.encode() in (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 31, 32, 33, 100])
def test_elements_come_in_order_across_blocks_and_extents(numel: int, tmp_path: Path) -> None:
    value = torch.randn(numel)
    for cuts in ([], [numel // 3], [numel // 3, numel // 3, numel // 2]):
        stored = store(tmp_path / "x", value, cuts)
        assert torch.equal(read(stored), value)
        assert torch.equal(read(pickle.loads(pickle.dumps(stored))), value)


def test_a_scalar_has_one_element(tmp_path: Path) -> None:
    assert torch.equal(read(store(tmp_path / "x", torch.tensor(3.5))), torch.tensor(3.5))


def test_a_slice_is_cut_out_of_any_extents(tmp_path: Path) -> None:
    value = torch.randn(12, 10)
    stored = store(tmp_path / "x", value, [7, 50, 50, 83])
    for row in range(12):
        for rows in range(1, 13 - row):
            assert torch.equal(read(stored.slice(row * 10, (rows, 10))), value[row : row + rows])


@pytest.mark.parametrize("numel", [1, 7, 50, 119, 120, 1000])
def test_the_parts_of_a_tensor_joined_are_the_tensor(numel: int, tmp_path: Path) -> None:
    value = torch.randn(12, 10)
    parts = list(store(tmp_path / "x", value, [7, 50, 50, 83]).parts(numel))
    assert all(part.numel == numel for part in parts[:-1])
    assert torch.equal(torch.cat([read(part).reshape(-1) for part in parts]), value.reshape(-1))


def test_a_vector_is_cut_at_its_end() -> None:
    vector = Vector((Extent(Path("x"), 8, DType.F32, 3), Extent(Path("y"), 0, DType.F32, 0)))
    assert vector.numel == 3
    assert vector.cut(2, 9) == (Extent(Path("x"), 16, DType.F32, 1),)
    assert Vector(()).numel == 0


def test_a_view_that_is_not_in_order_is_read_as_torch_sees_it(tmp_path: Path) -> None:
    base = torch.randn(37, 23)
    storage = store(tmp_path / "x", base).extents[0]
    for view in (base.t(), base[:, ::2], base[::3, 5:9], base[:1].expand(4, 23), base.t()[:, :1]):
        numel = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True)) + 1
        part = storage.part(view.storage_offset(), view.storage_offset() + numel)
        assert torch.equal(read(StridedTensor(tuple(view.shape), DType.F32, part, view.stride())), view)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 50])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16, DType.F64])
def test_new_rows_are_the_mean_of_the_old_whose_bits_stay(width: int, dtype: DType, tmp_path: Path) -> None:
    value = (torch.randn(13, width, dtype=torch.float64) * 100).to(dtype.torch)
    grown = read(GrownTensor((16, width), dtype, store(tmp_path / "x", value, [width // 2, width * 3 + 1])))
    mean = value.to(torch.float64).mean(dim=0).to(torch.float32).to(dtype.torch)
    assert torch.equal(grown[:13], value)
    assert all(torch.equal(row, mean) for row in grown[13:])


def test_a_vector_grows_by_its_mean(tmp_path: Path) -> None:
    grown = read(GrownTensor((4,), DType.F32, store(tmp_path / "x", torch.tensor([1.0, 2.0]))))
    assert grown.tolist() == [1.0, 2.0, 1.5, 1.5]


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    stored = store(tmp_path / "weights.pt", torch.randn(40))
    (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.pt ends at byte 162"):
        read(stored)


def test_a_file_that_goes_away_is_an_unreadable_checkpoint(tmp_path: Path) -> None:
    tensor = store(tmp_path / "x.bin", torch.zeros(10))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(CheckpointError, match=r"x\.bin cannot be read"):
        read(tensor)


def test_tensors_are_the_same_by_their_bits_and_dtype_wherever_their_blocks_end(tmp_path: Path) -> None:
    values = torch.randn(15, 9)
    stored = store(tmp_path / "stored.bin", values)
    torch.save({"w": values.t().contiguous().t()}, tmp_path / "strided.bin")
    strided = read_torch_file(tmp_path / "strided.bin").value["w"]
    assert isinstance(strided, StridedTensor)
    assert is_same(stored, strided)
    zeros = store(tmp_path / "zeros.bin", torch.zeros(4, dtype=torch.float16))
    assert not is_same(zeros, store(tmp_path / "other.bin", torch.zeros(4, dtype=torch.bfloat16)))


def test_the_start_of_a_view_is_compared_as_torch_sees_it(tmp_path: Path) -> None:
    values = torch.randn(300, 40)
    torch.save({"w": values.t()}, tmp_path / "strided.bin")
    strided = read_torch_file(tmp_path / "strided.bin").value["w"]
    assert start_alike(store(tmp_path / "same.bin", values.t().contiguous()), strided)
    assert not start_alike(store(tmp_path / "other.bin", values.t() + 1), strided)


def test_a_reader_of_many_ranks_holds_few_files_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{rank}.bin" for rank in range(3 * MAX_OPEN_FILES)]
    for rank, path in enumerate(paths):
        path.write_bytes(bytes([rank]) * 4)
    tensor = StoredTensor((4 * len(paths),), DType.U8, tuple(Extent(path, 0, DType.U8, 4) for path in paths))
    before = len(os.listdir("/proc/self/fd"))
    with SourceFiles() as files:
        for _ in range(2):
            content = torch.cat([block.clone() for block in tensor.blocks(files)])
            assert content.tolist() == [rank for rank in range(len(paths)) for _ in range(4)]
            assert len(os.listdir("/proc/self/fd")) <= before + MAX_OPEN_FILES
    assert len(os.listdir("/proc/self/fd")) == before
