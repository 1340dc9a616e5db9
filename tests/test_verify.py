"""A written file that differs from its source in any way is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import tensors
from exporter.errors import CheckpointError, RefusedError, VerificationError
from exporter.plan import PlannedTensor, Shard, plan_export
from exporter.shards import WrittenShard, block_workers, uncounted
from exporter.tensors import DType, StoredTensor
from exporter.verify import check_copy, check_file, check_shard, require_equal
from tests.test_shards import write_with
from tests.test_tensors import BLOCK, store


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def workers() -> Iterator[Executor]:
    with block_workers(2) as threads:
        yield threads


@pytest.fixture
def written(tmp_path: Path, workers: Executor) -> tuple[Shard, WrittenShard]:
    """A healthy shard of three tensors: a cast one, an integer one and one as it was."""
    values = {
        "cast": torch.randn(50),
        "ids": torch.arange(5),
        "same": torch.randn(40).to(torch.bfloat16),
        "twin": torch.randn(40).to(torch.bfloat16),
    }
    sources = {name: store(tmp_path / f"{name}.bin", value) for name, value in values.items()}
    dtypes = {"cast": DType.BF16, "ids": DType.I64, "same": DType.BF16, "twin": DType.BF16}
    (shard,) = plan_export(sources, dtypes, 10**9).shards
    made = write_with(2, shard, tmp_path)
    check_file(made.file, tmp_path)
    check_shard(shard, tmp_path, workers, uncounted)
    return shard, made


def test_a_flip_of_any_byte_of_a_file_is_found(
    written: tuple[Shard, WrittenShard], tmp_path: Path, workers: Executor
) -> None:
    shard, made = written
    path = tmp_path / shard.name
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(VerificationError):
            check_file(made.file, tmp_path)
        if place >= len(shard.header):
            with pytest.raises(VerificationError, match="differs from the checkpoint"):
                check_shard(shard, tmp_path, workers, uncounted)


def test_a_flip_in_the_source_after_the_writing_is_found(
    written: tuple[Shard, WrittenShard], tmp_path: Path, workers: Executor
) -> None:
    shard, _ = written
    source = tmp_path / "same.bin"
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    with pytest.raises(VerificationError, match="same differs from the checkpoint after element 32"):
        check_shard(shard, tmp_path, workers, uncounted)


@pytest.mark.parametrize("end", [0, 7, 8, 100, -1])
def test_a_file_cut_short_is_found(
    end: int, written: tuple[Shard, WrittenShard], tmp_path: Path, workers: Executor
) -> None:
    shard, made = written
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(VerificationError):
        check_file(made.file, tmp_path)
    with pytest.raises(VerificationError):
        check_shard(shard, tmp_path, workers, uncounted)


def test_a_file_that_is_gone_is_named(written: tuple[Shard, WrittenShard], tmp_path: Path, workers: Executor) -> None:
    shard, made = written
    (tmp_path / shard.name).unlink()
    with pytest.raises(VerificationError, match=shard.name):
        check_file(made.file, tmp_path)
    with pytest.raises(VerificationError, match=shard.name):
        check_shard(shard, tmp_path, workers, uncounted)


def test_what_is_no_file_is_not_waited_for(written: tuple[Shard, WrittenShard], tmp_path: Path) -> None:
    shard, made = written
    (tmp_path / shard.name).unlink()
    os.mkfifo(tmp_path / shard.name)
    with pytest.raises(VerificationError, match=f"{shard.name} is not a file"):
        check_file(made.file, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"same": t["twin"], "twin": t["same"]}, "same differs"),
        (lambda t: t | {"cast": t["cast"].to(torch.float16)}, "cast is torch.float16"),
        (lambda t: t | {"cast": t["cast"].reshape(5, 10)}, r"cast is torch.bfloat16 \(5, 10\)"),
        (lambda t: t | {"cast": t["cast"][:49]}, r"cast is torch.bfloat16 \(49,\)"),
        (lambda t: {name: value for name, value in t.items() if name != "ids"}, "ids is not in both"),
        (lambda t: t | {"more": t["ids"]}, "more is not in both"),
        (lambda t: t | {"same": -(-t["same"]).roll(1)}, "same differs"),
    ],
)
def test_a_tensor_that_is_not_the_planned_one_is_found(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
    written: tuple[Shard, WrittenShard],
    tmp_path: Path,
    workers: Executor,
) -> None:
    shard, _ = written
    changed = {name: value.clone() for name, value in change(load_file(tmp_path / shard.name)).items()}
    save_file(changed, tmp_path / shard.name)
    with pytest.raises(VerificationError, match=message):
        check_shard(shard, tmp_path, workers, uncounted)


def test_minus_zero_is_not_zero_and_nan_is_itself(tmp_path: Path, workers: Executor) -> None:
    value = torch.tensor([0.0, torch.nan, 1.0])
    sources = {"x": store(tmp_path / "x.bin", value)}
    (shard,) = plan_export(sources, {"x": DType.F32}, 10**9).shards
    write_with(2, shard, tmp_path)
    check_shard(shard, tmp_path, workers, uncounted)
    save_file({"x": torch.tensor([-0.0, torch.nan, 1.0])}, tmp_path / shard.name)
    with pytest.raises(VerificationError, match="x differs"):
        check_shard(shard, tmp_path, workers, uncounted)


def test_a_source_with_fewer_elements_than_its_shape_is_found(tmp_path: Path, workers: Executor) -> None:
    source = store(tmp_path / "x.bin", torch.randn(20))
    save_file({"x": torch.zeros(24)}, tmp_path / "model.safetensors")
    (shard,) = plan_export({"x": replace(source, shape=(24,))}, {"x": DType.F32}, 10**9).shards
    content = (tmp_path / "x.bin").read_bytes()[3:]
    save_file({"x": torch.frombuffer(bytearray(content + bytes(16)), dtype=torch.float32)}, tmp_path / shard.name)
    with pytest.raises(VerificationError, match="x has 20 elements"):
        check_shard(shard, tmp_path, workers, uncounted)


def test_master_weights_are_compared_with_the_models_copy_after_the_cast(tmp_path: Path) -> None:
    value = torch.randn(30, 5)
    master = store(tmp_path / "master", value, [13, 77])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        copy = value.to(dtype)
        tensor = PlannedTensor("x", DType.BF16, master)
        check_copy(tensor, store(tmp_path / "copy", copy, [50]), uncounted)
        for place in (0, 77, 149):
            other = copy.clone()
            other.view(-1)[place] *= 2
            with pytest.raises(CheckpointError, match="is not what the model's own copy says"):
                check_copy(tensor, store(tmp_path / "other", other), uncounted)
        with pytest.raises(CheckpointError):
            check_copy(tensor, store(tmp_path / "other", copy.reshape(5, 30)), uncounted)
        with pytest.raises(CheckpointError):
            check_copy(tensor, StoredTensor((30, 5), master.dtype, master.extents[:-1]), uncounted)


def test_tied_names_must_have_one_value(tmp_path: Path) -> None:
    value = torch.randn(9, 5)
    weights = {"embed": store(tmp_path / "embed", value)}
    require_equal({"head": (store(tmp_path / "head", value, [4]), "embed")}, weights)
    for other in (value + 1, value.reshape(5, 9), value[:8], value.to(torch.bfloat16)):
        with pytest.raises(RefusedError, match="head and embed"):
            require_equal({"head": (store(tmp_path / "head", other), "embed")}, weights)
    halves = {"embed": store(tmp_path / "zeros", torch.zeros(4, dtype=torch.float16))}
    with pytest.raises(RefusedError, match="head and embed"):
        require_equal({"head": (store(tmp_path / "head", torch.zeros(4, dtype=torch.bfloat16)), "embed")}, halves)
