"""DeepSpeed's universal checkpoints: a file ``zero/<parameter>/fp32.pt`` for each, made by ``ds_to_universal``.

Where the layout comes from: DeepSpeed 0.19.8, ``deepspeed/checkpoint/ds_to_universal.py``. Of ZeRO-1 and 2 a file holds
a mapping with the parameter at ``param``, of ZeRO-3 the parameter's elements as one vector. The model states are
copies of those that were converted; ``zero/optimizer_state.pt`` is what was left of rank 0's shard, of ZeRO-3 with its
partitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.folder import require_inside
from exporter.checkpoints.torch_file import read_torch_file
from exporter.checkpoints.zero import choose_tag, is_universal_tag, list_tags, read_converted
from exporter.errors import CheckpointError, IncompleteCheckpointError
from exporter.tensors import LazyTensor, StoredTensor, start_alike

_LATEST = "latest_universal"


def is_universal(folder: Path) -> bool:
    """Whether ``folder`` holds what ``ds_to_universal`` wrote."""
    return (folder / _LATEST).exists() or bool(universal_tags(folder))


def universal_tags(folder: Path) -> list[str]:
    """The tags that ``ds_to_universal`` wrote, oldest step first."""
    return list_tags(folder, is_universal_tag)


def open_universal(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of ``tag``, or of the tag that ``latest_universal`` names.

    Raises:
        CheckpointError: a file is missing, damaged, another parameter's, or unsafe to read.
        RefusedError: the checkpoint is of a kind that cannot be exported.
        UsageError: there is no such tag.
    """
    chosen, notes = choose_tag(folder, tag, _LATEST, is_universal_tag)
    converted = read_converted(folder, chosen)
    place = folder / chosen / "zero"
    require_inside(place)
    folders = _parameter_folders(place, {*converted.trained, *converted.untrained, *converted.checkpoint.aliases})
    masters = {name: _read_parameter(place, name, shape, folders) for name, shape in converted.trained.items()}
    _check_pieces(place, masters, converted.pieces)
    return replace(converted.checkpoint, master={**converted.untrained, **masters}, notes=notes)


def _parameter_folders(place: Path, known: set[str]) -> set[str]:
    """The names of the parameters' folders, which are all ``known``."""
    folders = {entry.name for entry in place.iterdir() if entry.is_dir() and not entry.is_symlink()}
    for name in sorted(folders - known):
        raise CheckpointError(
            f"{_title(place)} holds the parameter {name}, which the model states do not name.",
            "Convert the checkpoint again into an empty folder.",
        )
    return folders


def _read_parameter(place: Path, name: str, shape: tuple[int, ...], folders: set[str]) -> LazyTensor:
    title = f"{_title(place)}/{name}/fp32.pt"
    if name not in folders:
        raise IncompleteCheckpointError(f"{title} is missing.", "Copy the whole folder, or convert again.")
    value = read_torch_file(place / name / "fp32.pt").value
    tensor = value.get("param") if isinstance(value, dict) else value
    shapes = [shape] if isinstance(value, dict) else [shape, (math.prod(shape),)]
    if not isinstance(tensor, StoredTensor) or tensor.shape not in shapes or not tensor.dtype.is_floating:
        found = f"{tensor.dtype.value} {list(tensor.shape)}" if isinstance(tensor, LazyTensor) else "no tensor"
        raise CheckpointError(
            f"{title} holds {found}, expected {list(shape)}.", "Copy the file again, or convert again."
        )
    return replace(tensor, shape=shape)


def _check_pieces(place: Path, masters: Mapping[str, LazyTensor], pieces: Mapping[str, LazyTensor]) -> None:
    """Each parameter of ZeRO-3 starts as rank 0's piece of it does: no file is another parameter's."""
    for name, piece in pieces.items():
        if not start_alike(masters[name], piece):
            raise CheckpointError(
                f"{_title(place)}/{name}/fp32.pt does not start with rank 0's piece in optimizer_state.pt: "
                "it is another parameter's file, or of another save.",
                "Convert the checkpoint again into an empty folder.",
            )


def _title(place: Path) -> str:
    return f"{place.parent.name}/{place.name}"
