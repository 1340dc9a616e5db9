"""DeepSpeed tensor-parallel folders: every rank's slices of the weights, joined as AutoTP itself says it cut them.

Where the layout comes from: ``universal_checkpoint_info["affine_map"]`` in the model states of DeepSpeed 0.19.8
(``deepspeed/checkpoint/affine.py``, ``deepspeed/module_inject/layers.py``), checked against the weights that a model
had before DeepSpeed cut it. For each parameter it has the whole shape, and for each rank the blocks that its slice
consists of. Shapes alone would not do: a fused query-key-value matrix is cut in three, and an embedding is not cut.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.copies import find_copy
from exporter.checkpoints.zero import Slice, choose_tag, has_file, read_slices
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import BLOCK_BYTES, DType, LazyTensor, SourceFiles, StoredTensor, are_equal

if TYPE_CHECKING:
    import torch

_SECOND_RANK = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_0*1_model_states\.pt")
_GATHER = "Load it with the trainer that wrote it, write it with engine.save_16bit_model, and export that."


def is_tensor_parallel(folder: Path) -> bool:
    """Whether a tag in ``folder`` has model states of a second model-parallel rank, as a pipeline's has too."""
    return has_file(folder, _SECOND_RANK)


def open_tensor_parallel(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of all tensor-parallel ranks of ``tag``, joined.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
        RefusedError: the checkpoint does not say how a weight was cut, or says so in a way that is not known here.
        UsageError: there is no such tag.
    """
    name, notes = choose_tag(folder, tag)
    slices = read_slices(folder, name)
    if slices[0].states[0].value["module"] is None:
        raise IncompleteCheckpointError(
            f"{name} is of a pipeline, and has no layer_*-model_states.pt.", "Copy the files of all layers."
        )
    layouts = _Layouts(_affine_map(slices), len(slices))
    checkpoint = slices[0].checkpoint(
        "zero" if slices[0].shards else "zero16",
        model=None,
        master=layouts.join([part.master() for part in slices]),
    )
    # What lies beside a ZeRO-3 tag was gathered over all ranks.
    is_gathered = checkpoint.zero_stage == 3
    return replace(
        checkpoint,
        model=slices[0].model() if is_gathered else layouts.join([part.model() for part in slices]),
        world_size=(checkpoint.world_size or 1) * len(slices),
        notes=(*notes, f"The slices of {len(slices)} tensor-parallel ranks are joined.", *checkpoint.notes),
    )


def _affine_map(slices: Sequence[Slice]) -> Mapping[str, Any]:
    """Name pattern → layout of each parameter, which the model states of every rank repeat.

    Raises:
        RefusedError: there is none.
        CheckpointError: the ranks do not agree on it.
    """
    maps: list[Mapping[str, Any]] = []
    for state in (state for part in slices for state in part.states):
        info = state.value.get("universal_checkpoint_info")
        affine = info.get("affine_map") if isinstance(info, dict) else None
        if not isinstance(affine, dict) or affine.get("version") != 1 or not isinstance(affine.get("params"), dict):
            raise RefusedError(
                f"{state.name} is of a tensor-parallel rank and does not say how the weights were cut "
                "(universal_checkpoint_info.affine_map, version 1, as DeepSpeed 0.19.8 writes it with AutoTP).",
                _GATHER,
            )
        maps.append(affine["params"])
        if maps[-1] != maps[0]:
            raise CheckpointError(
                f"{state.name} and {slices[0].states[0].name} say differently how the weights were cut.",
                "Copy the files of every rank of one save.",
            )
    return maps[0]


@dataclass(frozen=True)
class _Run:
    """``size`` positions along a layout's axis, and where in the slices of which ranks they start."""

    start: int
    size: int
    places: Mapping[int, int]


@dataclass(frozen=True)
class _Layout:
    """How a tensor of ``shape`` was cut along ``axis``: its runs, in order, lie in slices of ``slice_shapes``."""

    shape: tuple[int, ...]
    axis: int
    runs: tuple[_Run, ...]
    slice_shapes: tuple[tuple[int, ...], ...]

    @property
    def is_cut(self) -> bool:
        return len(self.runs) > 1

    @classmethod
    def of_copies(cls, shape: tuple[int, ...], ranks: int) -> _Layout:
        """The layout of what every rank has a copy of."""
        size = shape[0] if shape else 1
        return cls(shape, 0, (_Run(0, size, dict.fromkeys(range(ranks), 0)),), (shape,) * ranks)


class _Layouts:
    """The layouts of an affine map, by name."""

    def __init__(self, affine_map: Mapping[str, Any], ranks: int) -> None:
        self._map = affine_map
        self._ranks = ranks

    def join(self, parts: Sequence[Mapping[str, LazyTensor] | None]) -> dict[str, LazyTensor] | None:
        """The whole tensors, of the slices that each rank has by name; None where a rank has none."""
        slices = [part for part in parts if part is not None]
        if len(slices) != len(parts):
            return None
        layouts = {name: self._layout(name, tensor.shape) for name, tensor in slices[0].items()}
        for rank, tensors in enumerate(slices):
            for name in sorted(tensors.keys() ^ layouts.keys()):
                raise CheckpointError(
                    f"{name} is not in the files of both tensor-parallel ranks 0 and {rank}.",
                    "Copy the files of every rank of one save.",
                )
        _check_distinct(layouts, slices)
        return {name: _join(name, layout, [rank[name] for rank in slices]) for name, layout in layouts.items()}

    def _layout(self, name: str, shape: tuple[int, ...]) -> _Layout:
        entry = self._map.get(f"^{re.escape(name)}$")
        if entry is None:
            raise RefusedError(
                f"The checkpoint does not say how {name} was cut into the slices of its tensor-parallel ranks.",
                _GATHER,
            )
        try:
            return _parse(entry, self._ranks)
        except (LookupError, TypeError, ValueError) as error:
            raise RefusedError(
                f"{name} was cut into the slices of the tensor-parallel ranks in a way that is not known: {error}.",
                _GATHER,
            ) from error


def _parse(entry: Mapping[str, Any], ranks: int) -> _Layout:
    """The layout that an entry of the affine map describes.

    A piece has its ``shape``, where it lies in the whole (``source``: offset and strides, in elements) and in the
    rank's slice (``dest``), and the ranks that hold it. Every cut that is known here is along one axis.

    Raises:
        LookupError, TypeError, ValueError: it describes something else.
    """
    shape = _sizes(entry["logical_shape"])
    slice_shapes = tuple(_sizes(entry["ranks"][rank]["shard_shape"]) for rank in range(ranks))
    pieces = [(rank, piece) for rank in range(ranks) for piece in entry["ranks"][rank]["pieces"]]
    parts = {*slice_shapes, *(_sizes(piece["shape"]) for _, piece in pieces)}
    axes = sorted({axis for part in parts for axis in _unequal(shape, part)})
    if len(entry["ranks"]) != ranks or len(axes) > 1:
        raise ValueError(f"the axes {axes} of {list(shape)} are cut, for {len(entry['ranks'])} ranks")
    if not axes:
        return _Layout.of_copies(shape, ranks)
    places: dict[tuple[int, int], dict[int, int]] = {}
    for rank, piece in pieces:
        if piece.get("scale", 1.0) != 1.0:
            raise ValueError(f"it is scaled by {piece['scale']}")
        start = _position(piece["source"], shape, axes[0])
        place = _position(piece["dest"], slice_shapes[rank], axes[0])
        places.setdefault((start, piece["shape"][axes[0]]), {})[rank] = place
    runs = tuple(_Run(start, size, places[start, size]) for start, size in sorted(places) if size)
    ends = list(itertools.accumulate((run.size for run in runs), initial=0))
    if [run.start for run in runs] != ends[:-1] or ends[-1] != shape[axes[0]]:
        raise ValueError("its pieces have gaps or overlap")
    return _Layout(shape, axes[0], runs, slice_shapes)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise ValueError(f"{value!r:.100} is no shape")
    return tuple(value)


def _unequal(shape: tuple[int, ...], part: tuple[int, ...]) -> list[int]:
    """The axes along which a part of a tensor of ``shape`` is not whole."""
    return [axis for axis, (size, other) in enumerate(zip(shape, part, strict=True)) if size != other]


def _position(view: Sequence[Any], shape: tuple[int, ...], axis: int) -> int:
    """Where along ``axis`` of a row-major tensor of ``shape`` a view begins that has all of the other axes."""
    offset, strides = view
    expected = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    if type(offset) is not int or offset < 0 or _sizes(strides) != expected or offset % max(expected[axis], 1):
        raise ValueError(f"a piece of it lies at {offset!r:.30} with strides {strides!r:.100}")
    return offset // max(expected[axis], 1)


def _check_distinct(layouts: Mapping[str, _Layout], slices: Sequence[Mapping[str, LazyTensor]]) -> None:
    """No rank's file is a copy of another's."""
    cut = [name for name, layout in layouts.items() if layout.is_cut]
    parts = [[part for part in map(tensors.__getitem__, cut) if isinstance(part, StoredTensor)] for tensors in slices]
    copy = find_copy((rank, [extent for part in own for extent in part.extents]) for rank, own in enumerate(parts))
    if copy is not None:
        raise CheckpointError(
            f"The files of the tensor-parallel ranks {copy[1]} and {copy[0]} hold the same weights: one is a copy.",
            "Copy the files of every rank again from where the training wrote them.",
        )


def _join(name: str, layout: _Layout, slices: Sequence[LazyTensor]) -> LazyTensor:
    dtype = slices[0].dtype
    parts = [part for part in slices if isinstance(part, StoredTensor) and part.dtype is dtype]
    if len(parts) != len(slices):
        raise RefusedError(f"The tensor-parallel ranks hold {name} in different dtypes or as a view.", _GATHER)
    for rank, (part, shape) in enumerate(zip(parts, layout.slice_shapes, strict=True)):
        if part.shape != shape:
            raise CheckpointError(
                f"Tensor-parallel rank {rank} holds {name} of shape {list(part.shape)}, expected {list(shape)}.",
                "Copy the files of every rank of one save.",
            )
    strips = tuple(
        tuple(Strip(rank, parts[rank], place, run.size) for rank, place in run.places.items()) for run in layout.runs
    )
    return JoinedTensor(layout.shape, dtype, name, layout.axis, strips)


@dataclass(frozen=True)
class Strip:
    """The positions ``start`` to ``start + size`` along one axis of a rank's slice."""

    rank: int
    tensor: StoredTensor
    start: int
    size: int


@dataclass(frozen=True)
class JoinedTensor(LazyTensor):
    """A tensor that is joined along ``axis`` from strips of the ranks' slices.

    For each stretch of the axis there are the strips of all ranks that hold it, which are compared bit for bit
    whenever they are read.
    """

    shape: tuple[int, ...]
    dtype: DType
    name: str
    axis: int
    strips: tuple[tuple[Strip, ...], ...]

    @property
    def sources(self) -> tuple[LazyTensor, ...]:
        return tuple(copy.tensor for copies in self.strips for copy in copies)

    def blocks(self, files: SourceFiles) -> Iterator[torch.Tensor]:
        import torch

        rows = math.prod(self.shape[: self.axis])
        count = max(1, BLOCK_BYTES // max(self.nbytes // max(rows, 1), 1))
        for row in range(0, rows, count):
            if count == 1 or rows == 1:
                for copies in self.strips:
                    yield from self._row(files, copies, row)
            else:
                parts = [self._rows(files, copies, row, min(count, rows - row)) for copies in self.strips]
                yield torch.cat(parts, dim=1).flatten()

    @property
    def _inner(self) -> int:
        """Number of elements at each position of the axis."""
        return math.prod(self.shape[self.axis + 1 :])

    def _row(self, files: SourceFiles, copies: Sequence[Strip], row: int) -> Iterator[torch.Tensor]:
        """What ``copies`` add to one row of the axes before, in blocks."""
        step = BLOCK_BYTES // self.dtype.itemsize
        total = copies[0].size * self._inner
        for first in range(0, total, step):
            starts = [(row * copy.tensor.shape[self.axis] + copy.start) * self._inner + first for copy in copies]
            yield self._agreed(
                copies,
                [
                    _read(files, copy.tensor.slice(start, (min(step, total - first),)))
                    for copy, start in zip(copies, starts, strict=True)
                ],
            )

    def _rows(self, files: SourceFiles, copies: Sequence[Strip], row: int, count: int) -> torch.Tensor:
        """What ``copies`` add to ``count`` rows of the axes before: shape (count, elements)."""
        found = []
        for copy in copies:
            width = copy.tensor.shape[self.axis] * self._inner
            whole = _read(files, copy.tensor.slice(row * width, (count * width,))).reshape(count, width)
            found.append(whole.narrow(1, copy.start * self._inner, copy.size * self._inner))
        return self._agreed(copies, found)

    def _agreed(self, copies: Sequence[Strip], values: Sequence[torch.Tensor]) -> torch.Tensor:
        for copy, value in zip(copies, values, strict=True):
            if not are_equal(value, values[0]):
                raise RefusedError(
                    f"{self.name} should be the same on the tensor-parallel ranks {copies[0].rank} and {copy.rank}, "
                    "and is not.",
                    "Choose which one is right, or train on from an earlier step where they are equal.",
                )
        return values[0]


def _read(files: SourceFiles, tensor: StoredTensor) -> torch.Tensor:
    import torch

    return torch.cat([block.clone() for block in tensor.blocks(files)])
