"""``.metadata`` of torch.distributed.checkpoint (DCP): which tensors there are, and where their chunks lie.

Where the layout comes from: torch 2.13 (``torch/distributed/checkpoint/metadata.py``, ``filesystem.py`` and
``_nested_dict.py``). It is a pickle of a few dataclasses, which are read as stubs: torch is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from exporter.checkpoints.folder import is_name
from exporter.checkpoints.torch_file import Stub, are_sizes, read_pickle
from exporter.errors import CheckpointError, RefusedError
from exporter.tensors import DType

METADATA_NAME = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_PROPERTIES = (
    f"{_CLASSES}.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",  # torch 2.0 to 2.2
)
_RANK = re.compile(r"__(\d{1,9})_\d+\.distcp")


@dataclass(frozen=True)
class Place:
    """``length`` bytes of a file beside ``.metadata``, from byte ``offset`` on."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Box:
    """What a chunk covers of its tensor: its first element's index and its size, in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor: ``dtype`` is None where no weight has that element type."""

    dtype: DType | None
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Metadata:
    """Tensors by their key; the keys of the nested state dict from which that key was joined; and the places of chunks
    by the tensor's key and the chunk's offsets."""

    tensors: Mapping[str, Entry]
    paths: Mapping[str, tuple[str | int, ...]]
    places: Mapping[tuple[str, tuple[int, ...]], Place]

    @property
    def world_size(self) -> int | None:
        """Number of ranks, as far as the names of files tell."""
        matches = (_RANK.fullmatch(place.file) for place in self.places.values())
        return max((int(match[1]) + 1 for match in matches if match), default=None)


def read_metadata(path: Path) -> Metadata:
    """What ``path`` says; what is no tensor is left out.

    Raises:
        CheckpointError: it is damaged, not what torch writes, or names a file that does not lie beside it.
        RefusedError: it names files that are compressed or encrypted.
    """
    value = _fields(read_pickle(path), f"{_CLASSES}.Metadata")
    entries, stored, paths = value.get("state_dict_metadata"), value.get("storage_data"), value.get("planner_data")
    if not isinstance(entries, dict) or not isinstance(stored, dict) or not all(map(is_name, entries)):
        unexpected("state_dict_metadata and storage_data are not mappings from names and chunks")
    paths = paths if isinstance(paths, dict) else {}
    if not all(isinstance(path, tuple) and path and all(map(_is_key, path)) for path in paths.values()):
        unexpected("planner_data does not map names to keys")
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    for index, info in stored.items():
        chunk = _fields(index, f"{_CLASSES}.MetadataIndex")
        key = (str(chunk.get("fqn")), _sizes(chunk.get("offset") or ()))
        if key in places:
            unexpected(f"{key[0]!r:.100} has two places for its chunk at {list(key[1])}")
        places[key] = _place(_fields(info, _STORAGE_INFO))
    tensors = {name: _entry(name, entry) for name, entry in entries.items() if not _is_bytes(entry)}
    return Metadata(tensors, paths, places)


def _is_key(key: Any) -> bool:
    return is_name(key) or type(key) is int


def _is_bytes(entry: Any) -> bool:
    return isinstance(entry, Stub) and entry.name == f"{_CLASSES}.BytesStorageMetadata"


def _entry(name: str, value: Any) -> Entry:
    fields = _fields(value, f"{_CLASSES}.TensorStorageMetadata")
    properties, shape, chunks = fields.get("properties"), _sizes(fields.get("size")), fields.get("chunks")
    if (
        not isinstance(properties, Stub)
        or properties.name not in _PROPERTIES
        or not isinstance(properties.state, tuple)
        or not properties.state
    ):
        unexpected(f"{name} has no TensorProperties")
    if not isinstance(chunks, list):
        unexpected(f"{name} has no chunks")
    dtype = properties.state[0]
    boxes = tuple(_box(name, chunk, len(shape)) for chunk in chunks)
    return Entry(dtype if isinstance(dtype, DType) else None, shape, boxes)


def _box(name: str, value: Any, dimensions: int) -> Box:
    fields = _fields(value, f"{_CLASSES}.ChunkStorageMetadata")
    box = Box(_sizes(fields.get("offsets")), _sizes(fields.get("sizes")))
    if not len(box.offsets) == len(box.sizes) == dimensions:
        unexpected(f"{name} has {dimensions} dimensions, but a chunk at {list(box.offsets)} of {list(box.sizes)}")
    return box


def _place(info: Mapping[str, Any]) -> Place:
    match (info.get("relative_path"), info.get("offset"), info.get("length")):
        case (str(file), int(offset), int(length)) if is_name(file) and Path(file).name == file:
            place = Place(file, *_sizes((offset, length)))
        case (file, _, _):
            unexpected(f"it places a chunk at {file!r:.100}, expected a file beside it, an offset and a length")
    if info.get("transform_descriptors"):
        raise RefusedError(f"{file} is compressed or encrypted, which cannot be read.", "Save it without extensions.")
    return place


def _fields(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Stub) or value.name != name or not isinstance(value.state, dict):
        unexpected(f"it has {value!r:.100}, expected {name}")
    return value.state


def _sizes(value: Any) -> tuple[int, ...]:
    if not are_sizes(value):
        unexpected(f"it has {value!r:.100}, expected sizes")
    return tuple(value)


def unexpected(reason: str) -> NoReturn:
    """Raise the CheckpointError that says why ``.metadata`` is not believed."""
    raise CheckpointError(
        f"{METADATA_NAME} is not what torch.distributed.checkpoint writes: {reason}.",
        "Copy the folder again from where the training wrote it.",
    )
