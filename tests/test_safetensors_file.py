"""Headers of safetensors files: strict where the library is, and where it is not."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from exporter.checkpoints.safetensors_file import MAX_HEADER_BYTES, read_safetensors_file
from exporter.errors import CheckpointError
from exporter.tensors import DType, SourceFiles

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "nothing": torch.empty(0, 5, dtype=torch.float16),
    "eighth": torch.ones(3).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False]),
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(start: int = 0, stop: int = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_what_the_library_writes_reads_back(path: Path) -> None:
    save_file(TENSORS, path, metadata={"format": "pt"})
    tensors = read_safetensors_file(path)
    assert tensors.keys() == TENSORS.keys()
    with SourceFiles() as files:
        for name, value in TENSORS.items():
            found = tensors[name]
            assert (found.shape, found.dtype.torch) == (tuple(value.shape), value.dtype)
            blocks = [block.clone().view(torch.uint8) for block in found.blocks(files)]
            expected = value.reshape(-1).view(torch.uint8)
            assert torch.equal(torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.uint8), expected)


def test_a_header_padded_with_spaces_is_read(path: Path) -> None:
    raw = json.dumps({"a": entry()}).encode()
    assert read_safetensors_file(write(path, raw + b" " * 1000, bytes(4)))["a"].dtype is DType.F32


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"", b"", "not valid JSON"),
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        ({"a": 1}, b"", "dtype 1"),
        ({"a": {}}, b"", "dtype None"),
        ({"a": entry(dtype="F128")}, bytes(4), "dtype 'F128'"),
        ({"a": entry(dtype="C64", stop=8)}, bytes(8), "dtype 'C64'"),
        ({"a": entry(dtype=["F32"])}, bytes(4), "dtype"),
        ({"a": entry(shape=[-1])}, bytes(4), "no valid shape"),
        ({"a": entry(shape=[1.0])}, bytes(4), "no valid shape"),
        ({"a": entry(shape=[True])}, bytes(4), "no valid shape"),
        ({"a": entry(shape=[2**64])}, bytes(4), "no valid shape"),
        ({"a": entry(shape=[2**62] * 100_000)}, bytes(4), "no valid shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "no valid shape"),
        ({"a": entry(4, 0, [0])}, bytes(4), "has -4 bytes"),
        ({"a": entry(shape=[2])}, bytes(4), "has 4 bytes, expected 8"),
        ({"a": entry(), "b": entry(2, 6)}, bytes(6), "tensor b starts at byte"),
        ({"a": entry(), "b": entry()}, bytes(4), "tensor b starts at byte"),
        ({"a": entry(4, 8)}, bytes(8), "tensor a starts at byte"),
        ({"a": entry(), "b": entry(8, 12)}, bytes(12), "tensor b starts at byte"),
        ({"a": entry(0, 2**62, [2**60])}, bytes(4), "its header describes"),
        ({"a": entry()}, bytes(3), "its header describes"),
        ({"a": entry()}, bytes(5), "its header describes"),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4), "a key twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), "a key twice"),
        ({"a\nb": entry()}, bytes(4), r"names a tensor 'a\\nb'"),
        ({"": entry()}, bytes(4), "names a tensor ''"),
        ({"__metadata__": [1], "a": entry()}, bytes(4), "__metadata__"),
        ({"__metadata__": {"format": 1}, "a": entry()}, bytes(4), "__metadata__"),
    ],
)
def test_a_damaged_header_is_refused(path: Path, header: Any, data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"^model.safetensors is damaged: .*{reason}") as caught:
        read_safetensors_file(write(path, header, data))
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("length", [9, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_unread(path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"should have {length} bytes, in a file of 10"):
        read_safetensors_file(write(path, {}, length=length))


def test_a_header_above_the_librarys_limit_is_refused(path: Path) -> None:
    write(path, {}, length=MAX_HEADER_BYTES + 1)
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="its header should have"):
        read_safetensors_file(path)
    with pytest.raises(SafetensorError, match="header too large"), safe_open(path, "pt"):
        pass


def test_a_header_of_many_values_is_refused_before_it_is_parsed(path: Path) -> None:
    with pytest.raises(CheckpointError, match="too many values"):
        read_safetensors_file(write(path, b'{"a":[' + b"[]," * 5_000_000 + b"0]}"))


def test_every_file_cut_short_is_refused(path: Path) -> None:
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            read_safetensors_file(path)


def test_what_this_reader_takes_the_library_takes_too(path: Path) -> None:
    """One flipped bit anywhere in a header: refused, or read exactly as the library does."""
    save_file(TENSORS, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(end):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            tensors = read_safetensors_file(path)
        except CheckpointError:
            continue
        with safe_open(path, "pt") as reference:
            assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
                name: reference.get_slice(name).get_shape()
                for name in reference.keys()  # noqa: SIM118
            }
