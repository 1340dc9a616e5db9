"""Files of torch.save, read without torch, without their tensor data, and without running anything they name.

Formats: ``torch/serialization.py`` of torch 2.13. Since torch 1.6 a file is a zip archive: ``data.pkl`` is the value,
in which a tensor is a call of ``torch._utils._rebuild_tensor_v2`` on a storage, and ``data/<key>`` are the storages'
bytes. Before, it was a stream of pickles (magic number, protocol, system, value, storage keys), followed per storage
by its number of elements (int64) and its bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from isal import isal_zlib

from exporter.checkpoints import archive
from exporter.checkpoints.archive import Archive, Region, damaged, read_archive
from exporter.checkpoints.folder import is_name, regular_size
from exporter.checkpoints.unpickler import PickleError, Reference, Stub, Unpickler
from exporter.errors import CheckpointError
from exporter.tensors import DType, Extent, LazyTensor, Member, StoredTensor, StridedTensor

__all__ = ["Reference", "Storage", "Stub", "TorchFile", "read_pickle", "read_torch_archive", "read_torch_file"]

MAX_PICKLE_BYTES = 512 * 1024 * 1024
MAX_STRIDED_BYTES = 256 * 1024 * 1024
"""The largest view that may have more elements than its storage: it is built in memory."""

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_MAX_DIMENSIONS = 64
_NO_ROOT = "archive"

_DTYPES = {("torch", dtype.value): dtype for dtype in DType}
_STORAGE_DTYPES = {
    "torch.DoubleStorage": DType.F64,
    "torch.FloatStorage": DType.F32,
    "torch.HalfStorage": DType.F16,
    "torch.BFloat16Storage": DType.BF16,
    "torch.LongStorage": DType.I64,
    "torch.IntStorage": DType.I32,
    "torch.ShortStorage": DType.I16,
    "torch.CharStorage": DType.I8,
    "torch.ByteStorage": DType.U8,
    "torch.BoolStorage": DType.BOOL,
    "torch.storage.UntypedStorage": DType.U8,
}
_OTHER_ITEM_SIZES = {
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.QInt32Storage": 4,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QUInt4x2Storage": 1,
    "torch.QUInt2x4Storage": 1,
}
"""Bytes per element of the storages whose tensors cannot be weights here."""


@dataclass(frozen=True)
class TorchFile:
    """What was saved in a file, and under which name.

    ``root`` is the archive's root folder, which torch.save names after the file, or ``archive`` where it knew no name
    (always so for a file from before torch 1.6). In ``value`` a tensor or parameter is a LazyTensor, a dtype a DType,
    a torch.Size a tuple, an OrderedDict a dict; a class by itself is a Reference; anything else that is no plain data
    is a Stub, and so is a tensor of a kind that no weight has (complex, quantized, sparse). ``digest`` is the sha256 of
    an archive's pickle.
    """

    root: str
    value: Any
    digest: bytes | None = None


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors view; ``dtype`` is None where no weight has that element type."""

    dtype: DType | None
    path: Path
    offset: int
    nbytes: int
    member: Member | None


@dataclass(frozen=True)
class _Place:
    """Where a storage's bytes begin."""

    offset: int
    member: Member | None = None


def read_torch_file(path: Path, twin: TorchFile | None = None) -> TorchFile:
    """What torch.save wrote to ``path``, its tensors not loaded.

    Where ``twin`` has the very same pickle, its value is taken, which saves time and memory: its tensors are then those
    of the other file.

    Raises:
        IncompleteCheckpointError: there is no such file.
        CheckpointError: it is no regular file, was not written by torch.save, is damaged, or asks for what no
            checkpoint needs.
    """
    size = regular_size(path)
    with _reading(path) as file:
        return _read(path, file, size, twin)


def read_torch_archive(path: Path, offset: int, nbytes: int) -> Any:
    """The value of an archive of torch.save that lies in ``nbytes`` bytes of ``path`` from byte ``offset`` on.

    Raises:
        IncompleteCheckpointError, CheckpointError: as :func:`read_torch_file`.
    """
    size = regular_size(path)
    if offset + nbytes > size:
        damaged(path, f"it has {size} bytes, but an archive in it should go on to byte {offset + nbytes}")
    with _reading(path) as file:
        return _read_archive(path, Region(file, offset, nbytes)).value


def read_pickle(path: Path) -> Any:
    """The value of a file that holds one pickle, made of plain data, dtypes, shapes and stubs, without tensors.

    Raises:
        IncompleteCheckpointError, CheckpointError: as :func:`read_torch_file`.
    """
    size = regular_size(path)
    if size > MAX_PICKLE_BYTES:
        damaged(path, f"it has {size} bytes, expected at most {MAX_PICKLE_BYTES}")
    with _reading(path) as file:
        value = _Tensors(path, lambda key, nbytes, _: damaged(path, "its pickle has tensors")).unpickle(file)
        if file.read(1):
            raise PickleError(f"its pickle ends at byte {file.tell() - 1} of {size}")
    return value


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except PickleError as error:
        damaged(path, str(error))
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error.strerror}.", "Check the disk that holds the checkpoint."
        ) from error


def _read(path: Path, file: BinaryIO, size: int, twin: TorchFile | None) -> TorchFile:
    start = os.pread(file.fileno(), 512, 0)
    if start.startswith(archive.SIGNATURE):
        return _read_archive(path, Region(file, 0, size), twin)
    if start.startswith(b"\x80"):
        return TorchFile(_NO_ROOT, _read_stream(path, file, size))
    kind = "a tar archive" if start[257:262] == b"ustar" else f"a file of {size} bytes that begins with {start[:8]!r}"
    raise CheckpointError(
        f"{path.name} is {kind}, expected a file of torch.save.",
        "Copy it again, or load it with the torch that wrote it and save it with torch.save.",
    )


# Since torch 1.6: a zip archive


def _read_archive(path: Path, region: Region, twin: TorchFile | None = None) -> TorchFile:
    contents, file = read_archive(path, region), region.file
    if contents.member("byteorder") is not None and _read_member(path, file, contents, "byteorder", 16) != b"little":
        damaged(path, "its tensors are not little-endian")
    pickle = _read_member(path, file, contents, "data.pkl", MAX_PICKLE_BYTES)
    digest = hashlib.sha256(pickle).digest()
    if twin is not None and twin.digest == digest:
        return TorchFile(contents.root, twin.value, digest)
    stream = io.BytesIO(pickle)
    tensors = _Tensors(path, lambda key, nbytes, _: _find_storage(path, contents, key, nbytes))
    value = tensors.unpickle(stream)
    if stream.read(1):
        raise PickleError(f"its pickle ends at byte {stream.tell() - 1} of {len(stream.getbuffer())}")
    return TorchFile(contents.root, value, digest)


def _read_member(path: Path, file: BinaryIO, contents: Archive, name: str, limit: int) -> bytes:
    member = contents.member(name)
    if member is None:
        damaged(path, f"it has no member {name}")
    if member.nbytes > limit:
        damaged(path, f"its member {name} has {member.nbytes} bytes, expected at most {limit}")
    file.seek(member.offset)
    data = file.read(member.nbytes)
    if member.crc32 not in (None, isal_zlib.crc32(data)):
        damaged(path, f"its member {name} has the CRC-32 {isal_zlib.crc32(data):08x}, expected {member.crc32:08x}")
    return data


def _find_storage(path: Path, contents: Archive, key: str, nbytes: int) -> _Place:
    member = contents.member(f"data/{key}")
    if member is None:
        damaged(path, f"it lacks the storage {key!r:.100}")
    if member.nbytes != nbytes:
        damaged(path, f"its storage {key!r:.100} has {member.nbytes} bytes, expected {nbytes}")
    return _Place(member.offset, member)


# Before torch 1.6: a stream of pickles


def _read_stream(path: Path, file: BinaryIO, size: int) -> Any:
    """The value is read twice: where its storages lie is known only after it."""
    header = _Tensors(path, lambda key, nbytes, _: damaged(path, "its header has tensors"))
    if header.unpickle(file) != _MAGIC_NUMBER or header.unpickle(file) != _PROTOCOL_VERSION:
        damaged(path, "it is a pickle, but not one of torch.save")
    system = header.unpickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        damaged(path, "its tensors are not little-endian")
    value_start = file.tell()
    sizes: dict[str, tuple[int, int]] = {}

    def note_size(key: str, nbytes: int, item_size: int) -> _Place:
        sizes[key] = nbytes, item_size
        return _Place(0)

    _Tensors(path, note_size).unpickle(file)
    keys = header.unpickle(file)
    if not isinstance(keys, list) or sorted(sizes) != keys:
        damaged(path, "its list of storages is not that of its tensors")
    places = _stream_places(path, file, size, {key: sizes[key] for key in keys})
    file.seek(value_start)
    return _Tensors(path, lambda key, nbytes, _: places[key]).unpickle(file)


def _stream_places(path: Path, file: BinaryIO, size: int, sizes: dict[str, tuple[int, int]]) -> dict[str, _Place]:
    position = file.tell()
    places: dict[str, _Place] = {}
    for key, (nbytes, item_size) in sizes.items():
        if position + 8 > size:
            damaged(path, f"it has {size} bytes and ends before its storage {key!r:.100}")
        numel = int.from_bytes(os.pread(file.fileno(), 8, position), "little")
        if numel * item_size != nbytes:
            damaged(path, f"its storage {key!r:.100} has {numel} elements, expected {nbytes // item_size}")
        places[key] = _Place(position + 8)
        position += 8 + nbytes
    if position != size:
        damaged(path, f"it has {size} bytes, its storages end at byte {position}")
    return places


# Tensors


class _Tensors:
    """Turns the tensors of a pickle into lazy ones.

    ``locate`` says where a storage lies, by its key, its size in bytes and its bytes per element.
    """

    def __init__(self, path: Path, locate: Callable[[str, int, int], _Place]) -> None:
        self._path = path
        self._locate = locate
        self._storages: dict[str, Storage] = {}

    def unpickle(self, stream: BinaryIO) -> Any:
        return Unpickler(stream, _CALLS, _DTYPES, self._load_persistent).load()

    def _load_persistent(self, saved: Any) -> Any:
        """A storage, or the class of a whole module that was saved with its source code (before torch 1.6)."""
        match saved:
            case ("module", Reference() as cls, _, _):
                return cls
            case ("storage", Reference() as kind, str(key), str(), int(numel)):
                return self._storage(str(kind), key, numel)
            case ("storage", Reference() as kind, str(key), str(), int(numel), None):
                return self._storage(str(kind), key, numel)
        raise PickleError("its pickle has a persistent id that is no storage's")

    def _storage(self, kind: str, key: str, numel: int) -> Storage:
        dtype = _STORAGE_DTYPES.get(kind)
        item_size = dtype.itemsize if dtype else _OTHER_ITEM_SIZES.get(kind)
        if item_size is None or not 0 <= numel < 2**63:
            raise PickleError(f"its pickle has a storage of {numel} elements of {kind!r:.100}")
        known = self._storages.get(key)
        if known is None:
            place = self._locate(key, numel * item_size, item_size)
            known = Storage(dtype, self._path, place.offset, numel * item_size, place.member)
            self._storages[key] = known
        elif (known.dtype, known.nbytes) != (dtype, numel * item_size):
            raise PickleError(f"its pickle describes the storage {key!r:.100} in two ways")
        return known


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> LazyTensor | Stub:
    """``torch._utils._rebuild_tensor(storage, storage_offset, size, stride)``, counted in elements."""
    return _view("_rebuild_tensor", (storage, offset, shape, stride), storage.dtype)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> LazyTensor | Stub:
    """The same for any tensor but one with ``metadata``: lazily conjugated or negated."""
    return _view("_rebuild_tensor_v2", (storage, offset, shape, stride), None if metadata else storage.dtype)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> LazyTensor | Stub:
    """The same for a dtype that has no storage class of its own: the storage is one of bytes."""
    known = dtype if isinstance(dtype, DType) and not metadata else None
    return _view("_rebuild_tensor_v3", (storage, offset, shape, stride), known)


def _view(name: str, args: tuple[Any, Any, Any, Any], dtype: DType | None) -> LazyTensor | Stub:
    storage, offset, shape, stride = args
    if not isinstance(storage, Storage) or not are_sizes(shape) or not are_sizes(stride) or not are_sizes((offset,)):
        raise PickleError("its pickle has a tensor without a valid storage, offset, shape and stride")
    if len(shape) != len(stride):
        raise PickleError(f"its pickle has a tensor of shape {shape} and stride {stride}")
    if dtype is None:
        return Stub(f"torch._utils.{name}", args)
    numel, is_contiguous, itemsize = math.prod(shape), _is_contiguous(shape, stride), dtype.itemsize
    span = numel if is_contiguous or not numel else _span(shape, stride)
    if (offset + span) * itemsize > storage.nbytes:
        end = (offset + span) * itemsize
        raise PickleError(f"its pickle has a tensor that goes on to byte {end} of a storage of {storage.nbytes}")
    if numel == 0:
        return StoredTensor(shape, dtype, ())
    extent = Extent(storage.path, storage.offset + offset * itemsize, dtype, span, storage.member)
    if is_contiguous:
        return StoredTensor(shape, dtype, (extent,))
    if numel * itemsize > max(MAX_STRIDED_BYTES, storage.nbytes):
        raise PickleError(f"its pickle has a tensor of shape {shape} on a storage of {storage.nbytes} bytes")
    return StridedTensor(shape, dtype, extent, stride)


def is_state_dict(value: Any) -> TypeGuard[dict[str, LazyTensor]]:
    """Whether ``value`` maps names to tensors."""
    return isinstance(value, dict) and all(
        is_name(name) and isinstance(tensor, LazyTensor) for name, tensor in value.items()
    )


def are_sizes(values: Any) -> bool:
    """Whether ``values`` can be a shape, a stride or the like."""
    if type(values) is not tuple or len(values) > _MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements lie in row-major order; the stride of a dimension of size 1 does not matter."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of elements of the storage from the view's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> LazyTensor | Stub:
    """A parameter is its tensor; ``state``, which only ``_rebuild_parameter_with_state`` has, are its attributes."""
    if not isinstance(data, LazyTensor | Stub):
        raise PickleError("its pickle has a parameter without a tensor")
    return data


def _rebuild_from_type(function: Any, cls: Any, args: Any, state: Any) -> LazyTensor | Stub:
    """A tensor with attributes, or of a subclass that is built as a plain tensor is."""
    rebuild = _REBUILDS.get(function.name) if function.module == "torch._utils" else None
    if rebuild is None:
        return Stub("torch._tensor._rebuild_from_type_v2", (function, cls, args, state))
    return rebuild(*args)


def _size(sizes: Any = ()) -> tuple[int, ...]:
    if not are_sizes(sizes):
        raise PickleError("its pickle has a torch.Size that is no shape")
    return tuple(sizes)


_REBUILDS: dict[str, Callable[..., LazyTensor | Stub]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor_v2,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    **{("torch._utils", name): rebuild for name, rebuild in _REBUILDS.items()},
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): _size,
}
