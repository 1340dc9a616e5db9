"""The header of a safetensors file, read strictly and without its tensor data.

Layout: https://huggingface.co/docs/safetensors/index#format — eight bytes of little-endian header length, a JSON
object name → {dtype, shape, data_offsets}, then the data, without holes. The library itself accepts repeated keys and
overlapping empty tensors; this reader does not.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NoReturn

from exporter.checkpoints.folder import is_name, parse_json, regular_size
from exporter.errors import CheckpointError
from exporter.tensors import DType, Extent, StoredTensor

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

_MAX_DIMENSIONS = 64


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of ``path`` by name, in the order of their data.

    Raises:
        CheckpointError: the file is no safetensors file, is damaged, or is shorter than its header says.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            _damaged(path, f"it has {size} bytes, fewer than a safetensors file's length field")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            _damaged(path, f"its header should have {length} bytes, in a file of {size}")
        raw = file.read(length)
    entries = _parse(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its __metadata__ is not a mapping from text to text")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (_start(item[1]), item[1].nbytes)))
    _check_coverage(path, ordered, 8 + length, size)
    return ordered


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw, unique_keys=True)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is not valid JSON ({error})")
    if not isinstance(header, dict):
        _damaged(path, "its header is not a JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not is_name(name):
        _damaged(path, f"it names a tensor {name[:100]!r}")
    try:
        dtype = DType[entry["dtype"]]
    except (KeyError, TypeError):
        found = entry.get("dtype") if isinstance(entry, dict) else entry
        _damaged(path, f"tensor {name} has dtype {found!r:.100}, expected one of {', '.join(d.name for d in DType)}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        _damaged(path, f"tensor {name} has no valid shape and data_offsets")
    numel, (start, stop) = math.prod(shape), offsets
    if stop - start != numel * dtype.itemsize:
        _damaged(path, f"tensor {name} has {stop - start} bytes, expected {numel * dtype.itemsize}")
    return StoredTensor(tuple(shape), dtype, (Extent(path, data_start + start, dtype, numel),))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _start(tensor: StoredTensor) -> int:
    return tensor.extents[0].offset


def _check_coverage(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for name, tensor in tensors.items():
        if _start(tensor) != position:
            _damaged(path, f"tensor {name} starts at byte {_start(tensor)}, expected {position}")
        position += tensor.nbytes
    if position != size:
        _damaged(path, f"it has {size} bytes, its header describes {position}")


def _damaged(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path.name} is damaged: {reason}.", "Copy the file again from where it was written.")
