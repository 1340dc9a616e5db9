"""A shard on the disk is a safetensors file with torch's own cast of the source, and its size, digest and counts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from exporter import shards, tensors
from exporter.errors import OutputError, VerificationError
from exporter.plan import Shard, plan_export
from exporter.shards import Batch, NonFinite, Progress, WrittenShard, batches, block_workers, write_file, write_shard
from exporter.tensors import DType, GrownTensor, LazyTensor
from exporter.verify import check_file, check_shard
from tests.test_tensors import BLOCK, store

FLOATING = [dtype for dtype in DType if dtype.is_floating]
TARGETS = [DType.BF16, DType.F16, DType.F32]
OTHER = [dtype for dtype in DType if not dtype.is_floating]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(shards, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(shards, "BATCH_BYTES", 3 * BLOCK)


def write_with(
    jobs: int,
    shard: Shard,
    folder: Path,
    progress: Progress = lambda count: None,
    finish: Callable[[Batch], None] = lambda batch: None,
) -> WrittenShard:
    """``shard`` written by ``jobs`` threads."""
    with ThreadPoolExecutor(jobs) as workers:
        return write_shard(shard, folder, workers, progress, finish)


def write(sources: dict[str, LazyTensor], dtype: DType, folder: Path) -> WrittenShard:
    """One shard with all ``sources``, written and checked."""
    dtypes = {name: dtype if source.dtype.is_floating else source.dtype for name, source in sources.items()}
    (shard,) = plan_export(sources, dtypes, 10**9).shards
    sizes: list[int] = []
    written = write_with(2, shard, folder, sizes.append)
    content = (folder / shard.name).read_bytes()
    assert written.file.size == shard.size == len(content) == len(shard.header) + sum(sizes)
    assert written.file.sha256 == hashlib.sha256(content).hexdigest()
    check_file(written.file, folder)
    with block_workers(2) as workers:
        check_shard(shard, folder, workers, sizes.append)
    return written


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", FLOATING)
def test_a_cast_is_torchs_own(source: DType, target: DType, tmp_path: Path) -> None:
    values = {f"{numel}": (torch.randn(numel) * 3).to(source.torch) for numel in (1, 7, 8, 9, 31, 32, 33, 64, 200)}
    values |= {"scalar": torch.tensor(1.7).to(source.torch), "empty": torch.empty(0, 5).to(source.torch)}
    values |= {"matrix": (torch.randn(5, 13) * 3).to(source.torch)}
    written = write({name: store(tmp_path / name, value) for name, value in values.items()}, target, tmp_path)
    found = load_file(tmp_path / written.file.path)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype is target.torch
        assert torch.equal(found[name], value.to(target.torch)), name
    assert written.nonfinite == {}
    with safe_open(tmp_path / written.file.path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("source", OTHER)
def test_integers_and_booleans_keep_every_bit(source: DType, tmp_path: Path) -> None:
    bits = torch.randint(0, 2 if source is DType.BOOL else 256, (41 * source.itemsize,), dtype=torch.uint8)
    value = bits.view(source.torch)
    written = write(
        {"x": store(tmp_path / "x", value), "y": store(tmp_path / "y", torch.randn(3))}, DType.BF16, tmp_path
    )
    assert torch.equal(load_file(tmp_path / written.file.path)["x"].view(torch.uint8), bits)


@pytest.mark.parametrize("source", FLOATING)
def test_every_bit_pattern_stays_where_the_dtype_stays(source: DType, tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (1000 * source.itemsize,), dtype=torch.uint8)
    written = write({"x": store(tmp_path / "x", bits.view(source.torch))}, source, tmp_path)
    assert torch.equal(load_file(tmp_path / written.file.path)["x"].view(torch.uint8), bits)
    finite = torch.isfinite(bits.view(source.torch).to(torch.float64))
    assert written.nonfinite.get("x", NonFinite()) == NonFinite(int((~finite).sum()), 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", FLOATING)
@pytest.mark.parametrize("place", [0, 7, 8, 40])
def test_what_is_not_finite_is_counted_in_the_source_and_in_the_cast(
    source: DType, target: DType, place: int, tmp_path: Path
) -> None:
    value = torch.zeros(50, dtype=torch.float64)
    value[place : place + 5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e300], dtype=torch.float64)
    value = value.to(source.torch)
    before, after = value.to(torch.float64), value.to(target.torch).to(torch.float64)
    in_source = int((~torch.isfinite(before)).sum())
    in_cast = int((~torch.isfinite(after)).sum()) - in_source
    written = write({"x": store(tmp_path / "x", value), "y": store(tmp_path / "y", torch.ones(9))}, target, tmp_path)
    assert in_source > 0
    assert written.nonfinite == {"x": NonFinite(in_source, in_cast)}


def test_large_finite_values_are_not_taken_for_overflow(tmp_path: Path) -> None:
    values = {
        "f64": torch.full((64,), 1e308, dtype=torch.float64),
        "f32": torch.full((64,), 3e38),
        "bf16": torch.full((64,), 3e38).to(torch.bfloat16),
        "f16": torch.full((64,), 60000.0).to(torch.float16),
    }
    for name, value in values.items():
        dtype = next(dtype for dtype in DType if dtype.torch is value.dtype)
        assert write({"x": store(tmp_path / name, value)}, dtype, tmp_path).nonfinite == {}
    overflow = write({"x": store(tmp_path / "f32", values["f32"])}, DType.F16, tmp_path)
    assert overflow.nonfinite == {"x": NonFinite(0, 64)}


def test_a_grown_matrix_is_cast_after_its_mean_was_taken(tmp_path: Path) -> None:
    value = torch.randn(11, 20)
    grown = GrownTensor((16, 20), DType.F32, store(tmp_path / "x", value))
    written = write({"x": grown}, DType.BF16, tmp_path)
    mean = value.to(torch.float64).mean(dim=0).to(torch.float32)
    wanted = torch.cat([value, mean.repeat(5, 1)]).to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / written.file.path)["x"], wanted)


def test_tensors_of_every_dtype_share_a_shard_and_are_aligned(tmp_path: Path) -> None:
    values: dict[str, torch.Tensor] = {f"naïve.{dtype.name}": torch.ones(3).to(dtype.torch) for dtype in DType}
    sources = {name: store(tmp_path / name, value) for name, value in values.items()}
    (shard,) = plan_export(sources, {name: source.dtype for name, source in sources.items()}, 10**6).shards
    write_with(1, shard, tmp_path)
    found = load_file(tmp_path / shard.name)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: value.dtype for n, value in values.items()}
    position = len(shard.header)
    for tensor in shard.tensors:
        assert position % tensor.dtype.itemsize == 0
        position += tensor.nbytes


def shard_of_all_sizes(folder: Path) -> tuple[Shard, dict[str, torch.Tensor]]:
    """Tensors smaller and larger than a batch, in one extent and in several, one of them grown; values by name."""
    values = {f"t{numel}": torch.randn(numel) for numel in (1, 5, 96, 97, 1000, 3001)}
    sources: dict[str, LazyTensor] = {
        name: store(folder / name, value, [value.numel() // 3]) for name, value in values.items()
    }
    sources["grown"] = GrownTensor((16, 20), DType.F32, store(folder / "grown", torch.ones(11, 20)))
    values["grown"] = torch.ones(16, 20)
    (shard,) = plan_export(sources, dict.fromkeys(sources, DType.BF16), 10**9).shards
    return shard, values


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_any_number_of_jobs_writes_the_same_bytes(jobs: int, tmp_path: Path) -> None:
    shard, values = shard_of_all_sizes(tmp_path)
    counts: list[int] = []

    def dawdle(count: int) -> None:
        counts.append(count)
        time.sleep(0.002 * (len(counts) % 3))

    written = write_with(jobs, shard, tmp_path, dawdle)
    content = (tmp_path / shard.name).read_bytes()
    data = b"".join(values[t.name].to(torch.bfloat16).view(torch.uint8).numpy().tobytes() for t in shard.tensors)
    assert content == shard.header + data
    assert written.file.sha256 == hashlib.sha256(content).hexdigest()
    assert sum(counts) == len(data)


def test_a_tensor_larger_than_a_batch_is_cut_and_nothing_is_left_out(tmp_path: Path) -> None:
    shard, _ = shard_of_all_sizes(tmp_path)
    position = len(shard.header)
    seen: dict[str, int] = {}
    for batch in batches(shard):
        assert batch.offset == position
        assert batch.nbytes <= shards.BATCH_BYTES or [p.tensor.name for p in batch.portions] == ["grown"]
        position += batch.nbytes
        for portion in batch.portions:
            assert portion.start == seen.get(portion.tensor.name, 0)
            seen[portion.tensor.name] = portion.start + portion.tensor.source.numel
    assert position == shard.size
    assert seen == {tensor.name: tensor.source.numel for tensor in shard.tensors}


def test_what_is_not_finite_is_counted_over_all_batches(tmp_path: Path) -> None:
    value = torch.zeros(3001)
    value[::500] = torch.nan
    value[1::1000] = 1e30
    written = write({"x": store(tmp_path / "x", value)}, DType.F16, tmp_path)
    assert written.nonfinite == {"x": NonFinite(7, 3)}


def test_batches_are_written_at_the_same_time(tmp_path: Path) -> None:
    shard, _ = shard_of_all_sizes(tmp_path)
    both = threading.Barrier(2)
    write_with(2, shard, tmp_path, finish=lambda batch: both.wait(10) if batch.offset < 2000 else None)


def test_no_batch_is_at_work_after_one_has_failed(tmp_path: Path) -> None:
    shard, _ = shard_of_all_sizes(tmp_path)
    first = next(batches(shard)).offset
    second_is_at_work = threading.Event()
    working: list[Batch] = []

    def check(batch: Batch) -> None:
        if batch.offset == first:
            assert second_is_at_work.wait(10)
            raise VerificationError("the first batch differs", "")
        working.append(batch)
        second_is_at_work.set()
        time.sleep(0.1)
        working.remove(batch)

    with ThreadPoolExecutor(4) as workers:
        with pytest.raises(VerificationError, match="the first batch"):
            write_shard(shard, tmp_path, workers, lambda count: None, check)
        assert working == []


def test_a_file_that_does_not_give_back_what_was_written_is_found(tmp_path: Path) -> None:
    shard, _ = shard_of_all_sizes(tmp_path)

    def flip(batch: Batch) -> None:
        with (tmp_path / shard.name).open("r+b") as file:
            file.seek(batch.offset)
            byte = file.read(1)[0]
            file.seek(batch.offset)
            file.write(bytes([byte ^ 16]))

    with pytest.raises(VerificationError, match="does not give back"):
        write_with(2, shard, tmp_path, finish=flip)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_a_file_has_mode_0644_less_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        written = write({"x": store(tmp_path / "x", torch.ones(3))}, DType.F32, tmp_path)
        write_file("config.json", b"{}", tmp_path)
    finally:
        os.umask(before)
    for name in (written.file.path, "config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


FULL_DISK = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from exporter.errors import OutputError
from exporter.plan import plan_export
from exporter.shards import write_file, write_shard
from exporter.tensors import DType, Extent, StoredTensor
folder = Path(sys.argv[1])
source = {"x": StoredTensor((2**20,), DType.F32, (Extent(folder / "x", 0, DType.F32, 2**20),))}
(shard,) = plan_export(source, {"x": DType.F32}, 10**9).shards
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
workers = ThreadPoolExecutor(2)
writes = [
    lambda: write_shard(shard, folder, workers, lambda count: None, lambda batch: None),
    lambda: write_file("big", bytes(2**21), folder),
]
for write in writes:
    try:
        write()
    except OutputError as error:
        print(error.exit_code, error.message)
"""


def test_a_disk_that_takes_no_more_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(2**22))
    finished = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert finished.stdout.splitlines() == [
        "5 model.safetensors cannot be written: File too large.",
        "5 big cannot be written: File too large.",
    ], finished.stderr


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "config.json").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"config\.json cannot be written"):
        write_file("config.json", b"{}", tmp_path)
    assert (tmp_path / "victim").read_text() == "mine"
