"""What will be written, to the last byte, before anything is written: shards, offsets, index. No torch here."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import UsageError
from exporter.tensors import DType, LazyTensor

INDEX_NAME = "model.safetensors.index.json"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the export: its name on disk, the dtype that is written, and where its elements come from."""

    name: str
    dtype: DType
    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Size in the written file, in bytes."""
        return self.source.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name and its tensors in the order of their data."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def header(self) -> bytes:
        """The length field and the header, padded so that the data starts at a multiple of eight bytes."""
        return _header(self.tensors)

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class ExportPlan:
    """All weight files of an export."""

    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, without headers: the index's ``total_size``."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def index(self) -> bytes | None:
        """The index file, or None where one file holds all weights."""
        if len(self.shards) == 1:
            return None
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(index, indent=2) + "\n").encode()


def plan_export(tensors: Mapping[str, LazyTensor], dtypes: Mapping[str, DType], max_shard_size: int) -> ExportPlan:
    """Pack ``tensors`` in their order into files of at most ``max_shard_size`` bytes, header included.

    A tensor that does not fit into such a file alone gets a file of its own, and the plan a note.
    """
    groups: list[list[PlannedTensor]] = []
    sizes: list[int] = []
    notes: list[str] = []
    for name, source in tensors.items():
        tensor = PlannedTensor(name, dtypes[name], source)
        cost = tensor.nbytes + len(_entry(tensor, max_shard_size, max_shard_size).encode())
        if groups and sizes[-1] + cost <= max_shard_size:
            groups[-1].append(tensor)
            sizes[-1] += cost
            continue
        groups.append([tensor])
        sizes.append(_EMPTY_HEADER + cost)
        if sizes[-1] > max_shard_size:
            notes.append(f"{name} alone needs {tensor.nbytes} bytes, more than the shard size: it has its own file.")
    shards = tuple(_shard(_shard_name(number, len(groups)), group) for number, group in enumerate(groups, start=1))
    return ExportPlan(shards, tuple(notes))


def plan_file(
    name: str, tensors: Mapping[str, LazyTensor], dtypes: Mapping[str, DType], max_shard_size: int
) -> ExportPlan:
    """All ``tensors`` in the one file ``name``, which is never cut; the plan has a note where it is too large."""
    shard = _shard(name, [PlannedTensor(tensor, dtypes[tensor], source) for tensor, source in tensors.items()])
    notes = [f"{name} needs {shard.size} bytes, more than the shard size: an adapter is one file."]
    return ExportPlan((shard,), tuple(notes if shard.size > max_shard_size else []))


def _shard(name: str, tensors: Sequence[PlannedTensor]) -> Shard:
    """``tensors`` in a file, larger elements first, so that each starts at a multiple of its size."""
    return Shard(name, tuple(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)))


def parse_size(text: str) -> int:
    """Bytes that ``text`` names: KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Raises:
        UsageError: it is not a positive size.
    """
    digits = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * _UNITS["" if unit == "B" else unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size.", "Write a number and a unit, such as 2GB or 500MiB.")
    return size


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _entry(tensor: PlannedTensor, start: int, stop: int) -> str:
    description = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "data_offsets": [start, stop]}
    return f"{_json(tensor.name)}:{_json(description)},"


_METADATA = '{"__metadata__":{"format":"pt"},'
_EMPTY_HEADER = 8 + len(_METADATA) + 8
"""Length field, metadata and the most padding, in bytes."""


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    position = 0
    text = _METADATA
    for tensor in tensors:
        text += _entry(tensor, position, position + tensor.nbytes)
        position += tensor.nbytes
    encoded = (text[:-1] + "}").encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
