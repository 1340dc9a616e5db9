"""Hugging Face folders: ``model.safetensors`` or ``pytorch_model.bin``, in one file or in shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.folder import read_json
from exporter.checkpoints.safetensors_file import read_safetensors_file
from exporter.checkpoints.torch_file import read_torch_file
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import LazyTensor

_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Weight file and index, in the order in which from_pretrained looks for them."""


def is_pretrained(folder: Path) -> bool:
    """Whether ``folder`` holds weights as ``save_pretrained`` writes them."""
    return any((folder / name).exists() for layout in _LAYOUTS for name in layout)


def open_pretrained(folder: Path) -> Checkpoint:
    """The weights of a Hugging Face folder.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe to read.
        RefusedError: it does not say which of its files are the weights.
    """
    return Checkpoint(format="pretrained", folder=folder, model=read_pretrained(folder))


def read_pretrained(folder: Path) -> Mapping[str, LazyTensor]:
    """The tensors of the weight files that from_pretrained would take from ``folder``, by name."""
    for single, index in _LAYOUTS:
        has_single, has_index = (folder / single).exists(), (folder / index).exists()
        if has_single and has_index:
            raise RefusedError(
                f"Both {single} and {index} are there: one of them is left over from another save.",
                "Remove the one that does not belong to this checkpoint.",
            )
        if has_single:
            return _read_weights(folder / single)
        if has_index:
            return _read_shards(folder, index)
    raise IncompleteCheckpointError(
        "There are no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards.",
        "Name the folder that the training wrote, with its weight files.",
    )


def _read_weights(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return dict(read_safetensors_file(path))
    value = read_torch_file(path).value
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, LazyTensor) for name, tensor in value.items()
    ):
        raise CheckpointError(f"{path.name} is not a mapping from names to tensors.", "Save the state dict alone.")
    return value


def _read_shards(folder: Path, index: str) -> dict[str, LazyTensor]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files.", "Copy the index again.")
    tensors: dict[str, LazyTensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index} names the file {file!r}, which is not a shard beside it.", "Repair it.")
        shard = _read_weights(folder / file)
        _check_against_index(index, file, weight_map, shard)
        tensors |= shard
    return {name: tensors[name] for name in weight_map}


def _check_against_index(index: str, file: str, weight_map: Mapping[str, str], shard: Mapping[str, LazyTensor]) -> None:
    listed = {name for name, place in weight_map.items() if place == file}
    for name in sorted(listed - shard.keys()):
        raise CheckpointError(f"{file} lacks the tensor {name} that {index} places there.", "Copy the shard again.")
    for name in sorted(shard.keys() - listed):
        raise CheckpointError(
            f"{file} holds the tensor {name}, which {index} does not place there.",
            "The shard is from another save: copy shards and index together.",
        )
