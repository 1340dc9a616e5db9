"""Hugging Face folders: ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from exporter.checkpoints.checkpoint import Checkpoint, refuse_tag
from exporter.checkpoints.folder import is_name, read_json
from exporter.checkpoints.safetensors_file import read_safetensors_file
from exporter.checkpoints.torch_file import is_state_dict, read_torch_file
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import LazyTensor

LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Weight file and index, in the order in which from_pretrained looks for them."""


def is_pretrained(folder: Path) -> bool:
    """Whether ``folder`` holds weights as ``save_pretrained`` writes them."""
    return any((folder / name).exists() for layout in LAYOUTS for name in layout) or any(
        _shards(folder, single) for single, _ in LAYOUTS
    )


def open_pretrained(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of a Hugging Face folder.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe to read.
        RefusedError: it does not say which of its files are the weights.
        UsageError: a tag is asked for, which only a DeepSpeed folder has.
    """
    refuse_tag(tag, folder)
    return Checkpoint(format="pretrained", folder=folder, model=read_pretrained(folder))


def read_pretrained(folder: Path) -> Mapping[str, LazyTensor]:
    """The tensors of the weight files that from_pretrained would take from ``folder``, by name."""
    for single, index in LAYOUTS:
        has_single, has_index = (folder / single).exists(), (folder / index).exists()
        shards = _shards(folder, single)
        if has_single and (has_index or shards):
            raise RefusedError(
                f"Both {single} and {index if has_index else shards[0]} are there: one is left over from another save.",
                "Remove the one that does not belong to this checkpoint.",
            )
        if has_single:
            return read_weights(folder / single)
        if has_index:
            return _read_shards(folder, index, shards)
        if shards:
            raise IncompleteCheckpointError(f"{index} is missing, {shards[0]} is there.", "Copy the index too.")
    raise IncompleteCheckpointError(
        "There are no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards.",
        "Name the folder that the training wrote, with its weight files.",
    )


def _shards(folder: Path, single: str) -> list[str]:
    """The names of the shards into which ``single`` may have been cut."""
    stem, suffix = Path(single).stem, Path(single).suffix
    pattern = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}{re.escape(suffix)}")
    return sorted(entry.name for entry in folder.iterdir() if pattern.fullmatch(entry.name))


def read_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one weight file, by name."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors_file(path))
    value = read_torch_file(path).value
    if not is_state_dict(value):
        raise CheckpointError(f"{path.name} is not a mapping from names to tensors.", "Save the state dict alone.")
    return value


def _read_shards(folder: Path, index: str, shards: Sequence[str]) -> dict[str, LazyTensor]:
    """The tensors of the shards that ``index`` names, which must be all ``shards`` that are there."""
    weight_map = read_json(folder / index, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_name, (*weight_map, *weight_map.values()))):
        raise CheckpointError(f"{index} has no weight_map from names to files.", "Copy the index again.")
    for shard_name in sorted(set(shards) - set(weight_map.values())):
        raise CheckpointError(
            f"{shard_name} is there, but {index} does not name it.",
            "Remove it if it is left over from another save, or copy shards and index together.",
        )
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    tensors: dict[str, LazyTensor] = {}
    for file, names in listed.items():
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index} names the file {file!r}, which is not a shard beside it.", "Repair it.")
        shard = read_weights(folder / file)
        _check_against_index(index, file, names, shard)
        tensors |= shard
    return {name: tensors[name] for name in weight_map}


def _check_against_index(index: str, file: str, listed: Set[str], shard: Mapping[str, LazyTensor]) -> None:
    for name in sorted(listed - shard.keys()):
        raise CheckpointError(f"{file} lacks the tensor {name} that {index} places there.", "Copy the shard again.")
    for name in sorted(shard.keys() - listed):
        raise CheckpointError(
            f"{file} holds the tensor {name}, which {index} does not place there.",
            "The shard is from another save: copy shards and index together.",
        )
