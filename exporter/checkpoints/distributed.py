"""Folders of torch.distributed.checkpoint (DCP): sharded state of FSDP and FSDP2, as torch, accelerate and the Trainer
save it (torch 2.13; accelerate 1.15, ``utils/fsdp_utils.py``): ``.metadata``, written last, and ``*.distcp``, in which
each chunk of each tensor is an archive of torch.save.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from exporter.checkpoints.checkpoint import Checkpoint, refuse_tag
from exporter.checkpoints.chunks import Chunk, ChunkedTensor, join_chunks
from exporter.checkpoints.copies import find_copy
from exporter.checkpoints.distributed_metadata import METADATA_NAME, Box, Metadata, read_metadata, unexpected
from exporter.checkpoints.folder import require_inside
from exporter.checkpoints.pretrained import is_pretrained
from exporter.checkpoints.torch_file import read_torch_archive
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import DType, Extent, LazyTensor, StoredTensor

_OPTIMIZER = re.compile(r"(optim|optimizers?)(_\d+|_states?|_state_dict)?")
_OPTIMIZER_ENTRY = re.compile(r"(optim|optimizers?|state|param_groups)\..*")
"""Names of torch's ``get_optimizer_state_dict`` with ``flatten_optimizer_state_dict``."""

_MODEL_KEYS = ("model", "state_dict", "module", "model_state_dict")
"""Under which keys writers save the model: accelerate and Fabric ``model``, torch's tutorial ``app.model``."""

_LEVELS_ABOVE = 2
"""How far above the chunks config.json may lie, as in ``run/checkpoint-N/pytorch_model_fsdp_0``."""


def is_distributed(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote to ``folder``, or to one in it that is not the optimizer's."""
    return bool(_data_folders(folder))


def open_distributed(folder: Path, tag: str | None) -> Checkpoint:
    """The model's weights of a folder of torch.distributed.checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe to read, or chunks do not make up their tensor.
        RefusedError: nothing says which tensors are the model's, or they are stored in a way that cannot be read.
        UsageError: a tag is asked for, which only a DeepSpeed folder has.
    """
    refuse_tag(tag, folder)
    data = _choose_data(folder)
    metadata = read_metadata(data / METADATA_NAME)
    keys, notes = _choose_model(data.name, metadata)
    tensors = {name: _tensor(data, metadata, key) for name, key in keys.items()}
    _check_distinct(tensors.values())
    config_folder = _config_folder(data)
    if config_folder not in (data, folder.resolve()):
        notes.append(f"config.json and tokenizer are taken from {config_folder.name}, above {data.name}.")
    return Checkpoint(
        format="dcp", folder=config_folder, model=tensors, world_size=metadata.world_size, notes=tuple(notes)
    )


# Folders


def _data_folders(folder: Path) -> list[Path]:
    if _is_data(folder):
        return [folder]
    inner = (entry for entry in folder.iterdir() if entry.is_dir() and not _OPTIMIZER.fullmatch(entry.name))
    return sorted(entry for entry in inner if _is_data(entry))


def _is_data(folder: Path) -> bool:
    return (folder / METADATA_NAME).is_file() or any(folder.glob("*.distcp"))


def _choose_data(folder: Path) -> Path:
    """The folder of the chunks, resolved."""
    first, *others = _data_folders(folder)
    if others or is_pretrained(folder):
        rival = f"{others[0].name}/*.distcp" if others else "model.safetensors or pytorch_model.bin"
        raise RefusedError(
            f"Both {first.name}/*.distcp and {rival} are there, and nothing says which of them to export.",
            f"Name the folder {first.name} itself, or move away what is not to be exported.",
        )
    if first != folder:
        require_inside(first)
    if any(first.glob(f"__*{METADATA_NAME}")):
        raise RefusedError(
            f"{first.name} was saved without collectives: each rank describes only its own part.",
            "Save it with use_collectives=True, which is DCP's default.",
        )
    if not (first / METADATA_NAME).exists():
        raise IncompleteCheckpointError(
            f"{first.name} has *.distcp files but no {METADATA_NAME}, which is written last.",
            "The save did not end, or the copy left out hidden files: copy the folder again.",
        )
    return first.resolve()


def _config_folder(data: Path) -> Path:
    """Where config.json is: beside the chunks or above; the chunks' own folder where it is nowhere."""
    folders = [data, *data.parents][: 1 + _LEVELS_ABOVE]
    return next((folder for folder in folders if (folder / "config.json").exists()), data)


# Tensors


def _choose_model(folder: str, metadata: Metadata) -> tuple[dict[str, str], list[str]]:
    """The model's tensors, from their names to their keys, and notes on what is left out."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in metadata.tensors:
        *parents, name = map(str, metadata.paths.get(key, (key,)))
        if not any(map(_OPTIMIZER.fullmatch, parents)) and not _OPTIMIZER_ENTRY.fullmatch(".".join([*parents, name])):
            groups[".".join(parents)][name] = key
    named = [group for group in groups if group.rpartition(".")[2] in _MODEL_KEYS]
    candidates = named or [group for group in groups if not group] or list(groups)
    if not candidates:
        raise CheckpointError(
            f"{folder} holds no weights of a model, at most an optimizer's state.", "Name the folder of the model."
        )
    if len(candidates) > 1:
        raise RefusedError(
            f"{folder} holds several sets of weights ({', '.join(candidates)}), and nothing says which to export.",
            "Save the model to export alone, under the key model.",
        )
    notes = [
        f"{group or next(iter(names))} is not exported." for group, names in groups.items() if [group] != candidates
    ]
    return groups[candidates[0]], notes


def _tensor(folder: Path, metadata: Metadata, key: str) -> LazyTensor:
    entry = metadata.tensors[key]
    if entry.dtype is None:
        raise RefusedError(f"{key} has elements that no weight has.", "Save it with a floating-point or integer dtype.")
    parts = [(box, _part(folder, metadata, key, entry.dtype, box)) for box in entry.boxes if math.prod(box.sizes)]
    if [box for box, _ in parts] == [Box((0,) * len(entry.shape), entry.shape)]:
        return parts[0][1]
    chunks = [Chunk(box.offsets, part) for box, part in parts if isinstance(part, StoredTensor)]
    if len(chunks) < len(parts):
        raise RefusedError(f"{key} is in chunks that are not contiguous.", "Make it contiguous and save it again.")
    try:
        return join_chunks(entry.shape, entry.dtype, chunks)
    except ValueError as error:
        unexpected(f"the chunks of {key} do not make up its shape {list(entry.shape)}: {error}")


def _part(folder: Path, metadata: Metadata, key: str, dtype: DType, box: Box) -> LazyTensor:
    place = metadata.places.get((key, box.offsets))
    if place is None:
        unexpected(f"it has no place for the chunk of {key} at {list(box.offsets)}")
    if place.length <= math.prod(box.sizes) * dtype.itemsize:
        raise RefusedError(
            f"{place.file} has {place.length} bytes for the chunk of {key} at {list(box.offsets)}, too few for an "
            "archive of torch.save.",
            "Save it in DCP's default format, SerializationFormat.TORCH_SAVE.",
        )
    tensor = read_torch_archive(folder / place.file, place.offset, place.length)
    if not isinstance(tensor, LazyTensor) or (tensor.dtype, tensor.shape) != (dtype, box.sizes):
        found = f"{tensor.dtype.value} {list(tensor.shape)}" if isinstance(tensor, LazyTensor) else "no tensor"
        raise CheckpointError(
            f"{place.file} has {found} at byte {place.offset}, expected the chunk of {key} at {list(box.offsets)}, "
            f"{dtype.value} {list(box.sizes)}.",
            "Copy all files of one save again.",
        )
    return tensor


# Files


def _check_distinct(tensors: Iterable[LazyTensor]) -> None:
    """No chunk is another's, by their places; no file is a copy of another rank's, by the archives' checksums."""
    files: dict[Path, dict[int, Extent]] = defaultdict(dict)
    for tensor in tensors:
        for extent in tensor.extents if isinstance(tensor, StoredTensor | ChunkedTensor) else ():
            if extent.offset in files[extent.path]:
                unexpected(f"two chunks lie at byte {extent.offset} of {extent.path.name}")
            files[extent.path][extent.offset] = extent
    copy = find_copy((path, [extent for _, extent in sorted(found.items())]) for path, found in files.items())
    if copy is not None:
        raise CheckpointError(
            f"{copy[0].name} holds the same chunks as {copy[1].name}: one of them is a copy of the other.",
            "Copy the files of every rank again from where the training wrote them.",
        )
