"""What a file's tensors consist of, where transformers keeps them renamed, fused or split in memory.

What belongs into files is what the library's own reverse conversion makes of a state dict (seen in 5.24,
``core_model_loading.revert_weight_conversion``). It runs here on meta tensors, while a torch mode notes what is copied
from where: nothing of the conversion tables is repeated, and no weight is needed.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exporter.errors import RefusedError

if TYPE_CHECKING:
    import torch

_MOST_PIECES = 65_536
"""Of one tensor: a matrix permuted row by row has a piece per row; a transposed one would have a piece per element."""


@dataclass(frozen=True)
class Piece:
    """``numel`` consecutive elements of the tensor ``name`` in memory, from element ``start`` on."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class Origin:
    """Where a file's tensor of ``shape`` comes from: pieces of tensors in memory, one after the other."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """The tensor in memory that the first element comes from."""
        return self.pieces[0].name


def disk_origins(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, Origin]:
    """The names in files, in the model's order, with their origins in ``state``, the model's state dict.

    Raises:
        RefusedError: a file's tensor does not consist of pieces of tensors in memory.
    """
    sources = {name: tensor.detach().clone() for name, tensor in state.items()}
    provenance = _Provenance()
    for name, tensor in sources.items():
        provenance.note(tensor, [Piece(name, 0, tensor.numel())])
    with _copy_watch(provenance):
        converted = _reverted(model, sources)
    origins = {name: Origin(tuple(tensor.shape), provenance.pieces(name, tensor)) for name, tensor in converted.items()}
    order = {name: position for position, name in enumerate(state)}
    return dict(sorted(origins.items(), key=lambda item: (order[item[1].name], item[1].pieces[0].start)))


def _reverted(model: Any, state: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        converted: Mapping[str, torch.Tensor] = revert_weight_conversion(model, state)
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise RefusedError(
            f"transformers cannot convert the weights of {type(model).__name__} to the form that belongs into files: "
            f"{type(error).__name__}.",
            "Export a folder that save_pretrained wrote.",
        ) from error
    return converted


def _copy_watch(provenance: _Provenance) -> Any:
    """A torch mode that notes every copy, concatenation and stack of tensors.

    What else makes new tensors leaves their origin unknown; what changes a tensor in place makes it unknown.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class CopyWatch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._schema.is_mutable:
                provenance.forget(result)
            elif func is aten.clone.default:
                provenance.note(result, provenance.elements(args[0]))
            elif func in (aten.cat.default, aten.stack.default):
                dim = args[1] if len(args) > 1 else 0
                provenance.note(result, provenance.interleaved(args[0], dim % result.ndim))
            return result

    return CopyWatch()


@dataclass(frozen=True)
class _Storage:
    """The elements of a meta tensor's storage, as pieces of tensors in memory; ``ends`` are the pieces' ends in it."""

    pieces: tuple[Piece, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> _Storage:
        joined = tuple(_joined(pieces))
        return cls(joined, tuple(itertools.accumulate(piece.numel for piece in joined)))

    def cut(self, start: int, stop: int) -> Iterator[Piece]:
        """Elements ``start`` to ``stop``."""
        for index in range(bisect.bisect_right(self.ends, start), len(self.pieces)):
            piece = self.pieces[index]
            position = self.ends[index] - piece.numel
            if position >= stop:
                return
            first, last = max(start - position, 0), min(stop - position, piece.numel)
            yield Piece(piece.name, piece.start + first, last - first)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """``pieces`` with those made one that follow each other in the same tensor."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and last.name == piece.name and last.start + last.numel == piece.start:
            last = Piece(last.name, last.start, last.numel + piece.numel)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


@dataclass
class _Provenance:
    """What is known of the storages of meta tensors. An address names a storage for as long as a tensor keeps it."""

    storages: dict[int, _Storage] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)

    def note(self, tensor: torch.Tensor, pieces: Iterable[Piece]) -> None:
        """``tensor`` is new and consists of ``pieces``; one that is not laid out row by row stays unknown."""
        self.kept.append(tensor)
        if tensor.is_contiguous():
            self.storages[tensor.untyped_storage()._cdata] = _Storage.of(pieces)

    def forget(self, tensor: torch.Tensor) -> None:
        """``tensor`` has other elements now."""
        self.storages.pop(tensor.untyped_storage()._cdata, None)

    def elements(self, view: torch.Tensor) -> Iterator[Piece]:
        """The elements of ``view``, row by row; none if they are of unknown origin, or too scattered."""
        storage = self.storages.get(view.untyped_storage()._cdata, _Storage((), ()))
        for start, stop in _runs(view):
            yield from storage.cut(start, stop)

    def interleaved(self, tensors: Sequence[torch.Tensor], dim: int) -> Iterator[Piece]:
        """The elements of ``tensors`` joined along dimension ``dim``."""
        rows = max(math.prod(tensors[0].shape[:dim]), 1)
        parts = [(tensor.numel() // rows, _Storage.of(self.elements(tensor))) for tensor in tensors]
        for row, (width, storage) in itertools.product(range(rows), parts):
            yield from storage.cut(row * width, (row + 1) * width)

    def pieces(self, name: str, tensor: torch.Tensor) -> tuple[Piece, ...]:
        """The pieces that the file's tensor ``name`` consists of."""
        found = _Storage.of(self.elements(tensor)).pieces
        if not found or sum(piece.numel for piece in found) != tensor.numel():
            raise RefusedError(
                f"{name} is stored in another form than it has in memory, and there is no exact way back.",
                "Export a folder that save_pretrained wrote.",
            )
        return found


def _runs(view: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Start and stop in the storage of each run of consecutive elements of ``view``, row by row."""
    outer = list(zip(view.shape, view.stride(), strict=True))
    inner = 1
    while outer and (outer[-1][1] == inner or outer[-1][0] == 1):
        inner *= outer.pop()[0]
    if math.prod(size for size, _ in outer) > _MOST_PIECES:
        return
    for index in itertools.product(*(range(size) for size, _ in outer)):
        start = view.storage_offset() + sum(i * stride for i, (_, stride) in zip(index, outer, strict=True))
        yield start, start + inner
